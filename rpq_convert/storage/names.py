"""Names of a checkpoint that are those of a model, but for what wrappers put before or between them.

DistributedDataParallel, torch.compile, FSDP and Lightning wrap a model or its parts, and their state dicts say so: `module.`,
`_orig_mod.`, `model.`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rpq_convert.errors import SourceError

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
COUNTER = (
    "num_batches_tracked"  # of batch norms; files from before torch 0.4.1 lack it, and torch itself does not miss it
)


class NamedSource(Mapping[str, Tensor]):
    """A source under other names.

    Args:
        source: the tensors under their own names. names: new name -> own name. counters: names that hold a zero.
    """

    def __init__(self, source: Any, names: Mapping[str, str], counters: Collection[str] = ()) -> None:
        self.source, self.names, self.counters = source, dict(names), set(counters)
        self.infos = {new: replace(source.infos[own], name=new) for new, own in names.items()}
        self.extra: dict[str, Any] = getattr(source, "extra", {})

    def __len__(self) -> int:
        return len(self.names) + len(self.counters)

    def __iter__(self) -> Iterator[str]:
        yield from (*self.names, *self.counters)

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.counters

    def __getitem__(self, name: str) -> Tensor:
        if name in self.counters:
            return torch.tensor(0)
        return self.source[self.names[name]]  # type: ignore[no-any-return]


def unwrapped(source: Any) -> Any:
    """Return a source without the parts of its names that wrappers added; itself where there are none."""
    names = {key: plain(key) for key in source}
    while names and all(new.startswith("module.") for new in names.values()):
        names = {key: new.removeprefix("module.") for key, new in names.items()}
    return _renamed(source, names)


def under_names(source: Any, wanted: Collection[Collection[str]]) -> Any:
    """Return a source under the names that a model has, if only wrappers keep them apart; itself where they do.

    Args:
        wanted: for every tensor of the model, the names that it has.
    """
    without = unwrapped(source)
    tried = [source, without]
    names = {key: key for key in without}
    while (
        names and len({new.partition(".")[0] for new in names.values()}) == 1 and all("." in n for n in names.values())
    ):
        names = {key: new.partition(".")[2] for key, new in names.items()}
        tried.append(_renamed(without, names))
    fitting = next((t for t in tried if not missing(t, wanted)), source)
    counters = [own[0] for own in map(list, wanted) if not any(n in fitting for n in own) and own[0].endswith(COUNTER)]
    return NamedSource(fitting, {n: n for n in fitting}, counters) if counters else fitting


def missing(source: Collection[str], wanted: Collection[Collection[str]]) -> list[str]:
    """Return the first name of every tensor that a source does not have; a counter of batches is not missed."""
    lacks = [next(iter(names)) for names in wanted if not any(n in source for n in names)]
    return [n for n in lacks if not n.endswith(COUNTER)]


def plain(key: str) -> str:
    """Return a name without the parts that wrappers of submodules added."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _renamed(source: Any, names: Mapping[str, str]) -> Any:
    if all(new == own for own, new in names.items()):
        return source
    back = {new: own for own, new in names.items()}
    if len(back) < len(names):
        twice = next(own for own, new in names.items() if back[new] != own)
        raise SourceError(f"{twice} and {back[names[twice]]} would both be {names[twice]}; keep one of them")
    return NamedSource(source, back)
