"""SourceOptions: where a checkpoint comes from, and how it may be read. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from rpq_convert.core.options import setting
from rpq_convert.errors import SourceError

PANEL = "Source"


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Which revision of a repository of the hub, and how it may be asked for."""

    revision: str | None = setting(None, "Branch, tag or commit on the hub.", panel=PANEL)
    token: str | bool | None = setting(
        None, "Access token of the hub; HF_TOKEN or `hf auth login` keep it out of the shell's history.", panel=PANEL
    )
    local_files_only: bool = setting(False, "Never contact the hub; use its local cache.", panel=PANEL)

    @property
    def hub(self) -> dict[str, Any]:
        """The arguments of transformers' and huggingface_hub's functions that fetch files."""
        return {"revision": self.revision, "token": self.token, "local_files_only": self.local_files_only}


@dataclass(frozen=True, kw_only=True)
class SourceOptions(HubOptions):
    """Where a checkpoint comes from, and how it may be read."""

    factory: str | Callable[[], Any] | None = setting(
        None,
        "Builds the model of a checkpoint that is not transformers': package.module:function or file.py:function.",
        metavar="MODULE:FUNCTION",
        panel=PANEL,
    )
    state_dict: str | None = setting(
        None,
        "Which state dict is read from a pickled file that holds several, such as ema.",
        metavar="KEY",
        panel=PANEL,
    )
    max_tensors: int | None = setting(
        None,
        "Tensors that a model may have that is built from a config: some more than its weights have, or 50,000 without weights, by default.",
        least=1, panel=PANEL,
    )  # fmt: skip
    allow_pickle: bool = setting(False, "Read pickled weights, tensors only, where there are no others.", panel=PANEL)

    def __post_init__(self) -> None:
        if self.state_dict is not None and not self.allow_pickle:
            raise SourceError("state_dict chooses among those of a pickled file, which needs allow_pickle=True as well")


class HubKeywords(TypedDict, total=False):
    """What callers may give for the fields of `HubOptions`, for type checkers."""

    revision: str | None
    token: str | bool | None
    local_files_only: bool


class SourceKeywords(HubKeywords, total=False):
    """What callers may give for the fields of `SourceOptions`, for type checkers."""

    factory: str | Callable[[], Any] | None
    state_dict: str | None
    max_tensors: int | None
    allow_pickle: bool
