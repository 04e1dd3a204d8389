"""Weight reads: which operations read a weight, and what they multiply it by.

`Watch` sees every torch function that runs within it, and tells of those in `READERS` that read one of its weights. So
whatever a module's forward does, its weights are found in use: a layer's own forward, tied weights, raw parameters, one
expert of a fused tensor, transposed views. Rejected: hooks on modules, which see only the layer types that they were written for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

from rpq_convert.running import einsum_readings, readings, recurrent_readings
from rpq_convert.running.readings import Reading, Vectors

READERS = {**readings.READERS, **recurrent_readings.READERS, **einsum_readings.READERS}


def _swapped(axes: tuple[str, ...], *dims: int) -> tuple[str, ...] | None:
    order = list(range(len(axes)))
    a, b = dims or (0, 1)
    order[a], order[b] = order[b], order[a]
    return tuple(axes[i] for i in order)


# Views that only turn the axes, and taking one expert: function -> the new axes.
TURNS: dict[Any, Callable[..., tuple[str, ...] | None]] = {
    Tensor.t: _swapped,
    torch.t: _swapped,
    Tensor.T.__get__: lambda axes: axes[::-1],  # type: ignore[attr-defined]
    Tensor.mT.__get__: lambda axes: _swapped(axes, -1, -2),  # type: ignore[attr-defined]
    Tensor.transpose: _swapped,
    torch.transpose: _swapped,
}


class Watch(TorchFunctionMode):
    """Tell of every reading of some weights, before it happens.

    Args:
        weights: name -> (the parameter, its axes: `out`, `in`, `expert`; any other is a further input axis).
        see: called with the name, the reading, and the part of the weight (the expert) that its part 0 is.
    """

    def __init__(
        self, weights: Mapping[str, tuple[Tensor, Sequence[str]]], see: Callable[[str, Reading, int], None]
    ) -> None:
        super().__init__()
        self.see = see
        self.known = {id(w): (w, name, tuple(axes), 0) for name, (w, axes) in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reader = READERS.get(func)
        if reader is not None and any(id(t) in self.known for t in _tensors((*args, *kwargs.values()))):
            for reading in reader(*args, **kwargs):
                weight, name, axes, part = self.known.get(id(reading.weight), (None, "", (), 0))
                if _fits(axes, reading.axes):
                    with _outside(reading) as seen:
                        self.see(name, seen, part)
                elif weight is not None and _fits(["out" if a == "expert" else a for a in axes], reading.axes):
                    with _outside(_for_each(reading, weight.shape[axes.index("expert")])) as seen:
                        self.see(name, seen, part)
        out = func(*args, **kwargs)
        if args and id(args[0]) in self.known:
            weight, name, axes, part = self.known[id(args[0])]
            if func in TURNS:
                self.known[id(out)] = out, name, TURNS[func](axes, *args[1:], *kwargs.values()) or (), part
            elif func is Tensor.__getitem__ and axes[:1] == ("expert",) and out.ndim == weight.ndim - 1:
                self.known[id(out)] = out, name, axes[1:], int(args[1])
        return out


@contextmanager
def _outside(reading: Reading) -> Iterator[Reading]:
    """Give a reading as it is where `torch.func` rewrites nothing: ordinary vectors, all of a batch that vmap hides."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is None:
        yield reading
        return
    found = []
    for part, x in reading.vectors():
        while functorch.is_functorch_wrapped_tensor(x):
            inner = functorch.get_unwrapped(x)
            batched = functorch.is_batchedtensor(x)
            x = inner.movedim(functorch.maybe_get_bdim(x), 0).flatten(0, 1) if batched else inner
        found.append((part, x))
    with temporarily_clear_interpreter_stack():
        yield replace(reading, vectors=lambda: iter(found))


def _for_each(reading: Reading, parts: int) -> Reading:
    """Return the reading of a weight whose parts, matrices of their own to its view, all multiply the same vectors."""

    def vectors() -> Vectors:
        return ((part, x) for _, x in reading.vectors() for part in range(parts))

    return replace(reading, vectors=vectors, source=(reading.source, parts))


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _fits(axes: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the axes stand as the operation takes them; kernel positions have many names."""
    return len(axes) == len(wanted) and all(a == w or w in ("k", "in2") for a, w in zip(axes, wanted))
