"""Pickled weights as people have them: a state dict, or one inside a training checkpoint, with other values beside it.

torch's weights-only reader is the only one that sees them. Which mapping is the state dict is told by what it holds: floating-point
tensors with axes under names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpq_convert.errors import SourceError
from rpq_convert.storage.reader import TensorInfo

EXTRA = "_extra_state"  # torch's name of what `get_extra_state` returns
DEPTH = 4  # of mappings around a state dict
NOT_MODELS = re.compile(
    r".*(optim|sched|scaler|rng|random_state|callbacks|loops|hyper_?param|args|config|metrics|history|_extra_state).*"
)


class PickleSource(Mapping[str, Tensor]):
    """The tensors of pickled files, memory-mapped where the file allows it.

    Args:
        paths: the files.
        key: which state dict is taken where a file holds several, e.g. `"ema"` or `"model.state_dict"`.

    Raises:
        SourceError: a file that the weights-only reader refuses, that holds no state dict, or several while `key` is None.
    """

    def __init__(self, paths: Iterable[str | Path], key: str | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.extra: dict[str, Any] = {}  # states of modules that are no tensors
        self.notes: list[str] = []
        self.infos: dict[str, TensorInfo] = {}
        for path in map(Path, paths):
            found = _state_dict(_read(path), path, key)
            tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)}
            self.extra |= {k: v for k, v in found.items() if k.endswith(EXTRA) and k not in tensors}
            if others := sorted(set(found) - set(tensors) - set(self.extra)):
                self.notes.append(f"{path.name}: not tensors, and left out: {', '.join(others[:5])}")
            for name, tensor in tensors.items():
                self.tensors[name] = _plain(name, tensor, path)
                size = tensor.numel() * tensor.element_size()
                self.infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, 0, size)

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].clone()


def _read(path: Path) -> Any:
    mapped = True
    while True:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as e:  # torch raises several kinds, from RuntimeError to UnpicklingError
            if mapped and "mmap" in str(e):  # a file from before torch 1.6
                mapped = False
                continue
            held = re.search(r"GLOBAL ([\w.]+)", str(e))  # what the reader will not make
            said = f"it holds {held[1]}" if held else next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise SourceError(
                f"{path} cannot be read as weights only: {said}; where you trust it, load it and save its state_dict() alone"
            ) from None


def _plain(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.is_quantized or type(tensor) not in (Tensor, torch.nn.Parameter):
        kind = tensor.dtype if tensor.is_quantized else f"a {type(tensor).__name__}"
        raise SourceError(f"{path}: {name} is quantized already ({kind}); start from the original weights")
    if tensor.layout is not torch.strided:
        raise SourceError(f"{path}: {name} is sparse ({tensor.layout}); save it with to_dense()")
    return tensor.detach()


def _state_dict(loaded: Any, path: Path, key: str | None) -> Mapping[str, Any]:
    """Return the state dict of a loaded file."""
    if not isinstance(loaded, Mapping):
        raise SourceError(f"{path} holds {type(loaded).__name__}, no state dict; save the model's state_dict()")
    found = dict(_candidates(loaded, ()))
    names = [".".join(where) or "." for where in found]  # "." is the file itself
    if key is not None:
        wanted = () if key == "." else tuple(key.split("."))
        if wanted not in found:
            raise SourceError(f"{path} has no state dict under {key!r}; it has {', '.join(names) or 'none'}")
        return found[wanted]
    if not found:
        some = ", ".join(map(str, list(loaded)[:5]))
        raise SourceError(f"{path} holds no state dict; its keys are {some or 'none'}")
    if len(found) > 1:
        raise SourceError(f"{path} holds several state dicts: {', '.join(names)}; choose one with state_dict='KEY'")
    return next(iter(found.values()))


def _candidates(
    value: Mapping[Any, Any], where: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield (path, mapping) of everything that looks like a state dict."""
    named = {k: v for k, v in value.items() if isinstance(k, str)}
    if any(isinstance(v, Tensor) and v.is_floating_point() and v.ndim for v in named.values()):
        yield where, named
    if len(where) < DEPTH:
        for k, v in named.items():
            if isinstance(v, Mapping) and not NOT_MODELS.fullmatch(k.lower()):
                yield from _candidates(v, (*where, k))
