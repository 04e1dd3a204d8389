"""The file by which a tuning run goes on after it was killed. It carries the hash of what it holds, and the mark of its run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rpq_convert.errors import TimeLimitReached, TuneError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check, parse_json
from rpq_convert.storage.assembly import partial_of, raw, write_tensors
from rpq_convert.storage.pieces import sealed

ANEW = "; remove it to start anew"  # what to do about a checkpoint that does not serve


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, and when it has to stop.

    Args:
        file: written at every evaluation, and when time is up; None for a run that is not continued.
        of: what decides the run besides its model, data and options: runs that differ in it do not go on with each other.
        stays: the file stays when the run has ended, which a repeated call sees; else it is removed.
        is_over: whether time is up.
    """

    file: Path | None = None
    of: str = ""
    stays: bool = False
    is_over: Callable[[], bool] = lambda: False

    def part(self, name: str, of: str) -> Checkpoint:
        """Return that of a part of the run, which stays until the whole has ended."""
        return replace(self, file=self.file and self.file / name, of=of, stays=True)

    def write(self, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the state, completely or not at all; `groups` are tensors by the part that they play."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{group}/{n}": t.detach().cpu().contiguous() for group, found in groups.items() for n, t in found.items()
        }
        text = json.dumps(facts)
        write_tensors(self.file, tensors, {"rpq_tune": text, "sha256": sealed(text, tensors)})

    def read(self, mark: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what was written; None where nothing was.

        Raises:
            TuneError: it is damaged, or of another run.
        """
        if self.file is None or not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as f:
                metadata = f.metadata() or {}
                tensors = {key: f.get_tensor(key).clone() for key in f.keys()}  # noqa: SIM118 - it is no mapping
        except SafetensorError as e:
            raise TuneError(f"{self.file} is damaged: {e}{ANEW}") from None
        text = metadata.get("rpq_tune", "")
        facts: dict[str, Any] = parse_json(text, kinds.TUNING, self.file, TuneError, ANEW)
        check(facts, kinds.TUNING, self.file, TuneError, ANEW)
        if facts["mark"] != mark:
            raise TuneError(f"{self.file} is of another run (model, data or settings differ){ANEW}")
        if metadata.get("sha256", sealed(text, tensors)) != sealed(text, tensors):  # earlier versions wrote none
            raise TuneError(f"{self.file} is damaged: its content is not what was written{ANEW}")
        return facts, tensors

    def clear(self) -> None:
        """Remove it, where the run has ended and nobody else will."""
        if self.file is not None and not self.stays:
            for file in (self.file, partial_of(self.file)):
                file.unlink(missing_ok=True)

    def stop(self, done: int, steps: int) -> TimeLimitReached:
        """Return the error that ends a run whose time is up."""
        kept = " and kept" if self.file is not None else ""
        return TimeLimitReached(f"the time limit is reached: {done} of {steps} steps of tuning are done{kept}")


def content(module: nn.Module) -> str:
    """Return the sha256 of all parameters of a model."""
    found = hashlib.sha256()
    for name, p in module.named_parameters():
        if not p.is_meta:
            found.update(name.encode())
            found.update(raw(p.detach().cpu().contiguous()))
    return found.hexdigest()
