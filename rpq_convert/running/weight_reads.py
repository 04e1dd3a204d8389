"""Weight reads: which operations read a weight, and what they multiply it by.

`Watch` sees every torch function that runs within it, and tells of those in `READERS` that read one of its weights. So
whatever a module's forward does, its weights are found in use: a layer's own forward, tied weights, raw parameters, one
expert of a fused tensor, transposed views. Rejected: hooks on modules, which see only the layer types that they were written for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Vectors = Iterator[tuple[int, Tensor]]  # (part, input vectors [rows, inputs])
ROWS = 1 << 15  # patches of a convolution made at a time


@dataclass(frozen=True)
class Reading:
    """One use of a weight.

    Args:
        weight: what was read: a watched tensor, or a view of one.
        axes: how the operation takes its axes: `out` and `in`, perhaps after `expert`.
        input: the tensor that it is multiplied by; None for a lookup, which multiplies nothing.
        vectors: yields what the weight's outputs are products with, in the order of its input axes; of each part where
            parts of the weight (experts, groups of a convolution) have inputs of their own.
    """

    weight: Tensor
    axes: tuple[str, ...]
    input: Tensor | None = None
    vectors: Callable[[], Vectors] = lambda: iter(())


def _rows(x: Tensor) -> Callable[[], Vectors]:
    return lambda: iter([(0, x.reshape(-1, x.shape[-1]))])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Reading:
    return Reading(weight, ("out", "in"), input, _rows(input))


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Reading:
    if other.ndim == 3 and input.ndim == 3:
        return Reading(other, ("expert", "in", "out"), input, lambda: iter(enumerate(input)))
    return Reading(other, ("in", "out"), input, _rows(input))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> Reading:
    return _matmul(mat1, mat2)


def _grouped(input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, **_: Any) -> Reading:
    def vectors() -> Vectors:
        ends = [] if offs is None else offs.tolist()
        yield from ((e, input[start:end]) for e, (start, end) in enumerate(zip([0, *ends], ends)))

    return Reading(mat2, ("expert", "in", "out"), input, vectors)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Reading:
    def vectors() -> Vectors:
        yield 0, (input1[..., :, None] * input2[..., None, :]).reshape(-1, input1.shape[-1] * input2.shape[-1])

    return Reading(weight, ("out", "in", "in2"), input1, vectors)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, head_dim: int, in_proj: Any, *rest: Any, **_: Any
) -> Any:
    """torch's own attention in one function; a joint projection sees what its queries, keys and values are made from."""
    same = [t for i, t in enumerate((query, key, value)) if not any(t is u for u in (query, key, value)[:i])]
    return Reading(in_proj, ("out", "in"), query, lambda: iter([(0, t.reshape(-1, t.shape[-1])) for t in same]))


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _patches(
    images: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Vectors:
    """Yield the patches of images [N, channels, …] as vectors (channel of the group, *kernel position)."""
    dims = len(kernel)
    for image in images:
        for i, (k, d, s) in enumerate(zip(kernel, dilation, stride)):
            image = image.unfold(1 + i, (k - 1) * d + 1, s)[..., ::d]  # at last [channels, *positions, *kernel]
        for group, part in enumerate(image.chunk(groups)):
            patches = part.permute(*range(1, 1 + dims), 0, *range(1 + dims, 1 + 2 * dims))
            for some in patches.reshape(patches.shape[:dims].numel(), -1).split(ROWS):
                yield group, some


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Reading:  # fmt: skip
    dims = weight.ndim - 2

    def vectors() -> Vectors:
        reach = [d * (k - 1) for k, d in zip(weight.shape[2:], _each(dilation, dims))]
        if isinstance(padding, str):
            sides = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
        else:
            sides = [(p, p) for p in _each(padding, dims)]
        x = input if input.ndim == dims + 2 else input[None]
        x = F.pad(x, [n for side in reversed(sides) for n in side])
        return _patches(x, weight.shape[2:], _each(stride, dims), _each(dilation, dims), groups)

    return Reading(weight, ("out", "in", *("k",) * dims), input, vectors)


def _conv_transpose(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Reading:  # fmt: skip
    """An output of a transposed convolution is a convolution of the spread inputs, its kernel mirrored."""
    dims = weight.ndim - 2

    def vectors() -> Vectors:
        x = input if input.ndim == dims + 2 else input[None]
        steps, kernel, spaces = _each(stride, dims), weight.shape[2:], _each(dilation, dims)
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], steps)))
        spread[(..., *(slice(None, None, s) for s in steps))] = x  # type: ignore[index]
        reach = [d * (k - 1) for k, d in zip(kernel, spaces)]
        sides = [
            (r - p, r - p + o) for r, p, o in zip(reach, _each(padding, dims), _each(output_padding, dims))
        ]  # a negative one cuts
        spread = F.pad(spread, [n for side in reversed(sides) for n in side])
        for group, patches in _patches(spread, kernel, (1,) * dims, spaces, groups):
            square = patches.reshape(len(patches), -1, *kernel).flip(tuple(range(2, 2 + dims)))
            yield group, square.reshape(len(patches), -1)

    return Reading(weight, ("in", "out", *("k",) * dims), input, vectors)


def _lookup(input: Tensor, weight: Tensor, *rest: Any, **_: Any) -> Reading:
    return Reading(weight, ("out", "in"))


READERS: dict[Any, Callable[..., Reading]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), _matmul
    ),
    F.bilinear: _bilinear,
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose),
    **dict.fromkeys((F.embedding, F.embedding_bag), _lookup),
}
READERS |= {f: _grouped for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f}


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
        if reader is not None:
            reading = reader(*args, **kwargs)
            _, name, axes, part = self.known.get(id(reading.weight), (None, "", (), 0))
            if _fits(axes, reading.axes):
                self.see(name, reading, part)
        out = func(*args, **kwargs)
        if args and id(args[0]) in self.known:
            weight, name, axes, part = self.known[id(args[0])]
            if func in TURNS:
                self.known[id(out)] = out, name, TURNS[func](axes, *args[1:], *kwargs.values()) or (), part
            elif func is Tensor.__getitem__ and axes[:1] == ("expert",) and out.ndim == weight.ndim - 1:
                self.known[id(out)] = out, name, axes[1:], int(args[1])
        return out


def _fits(axes: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the axes stand as the operation takes them; kernel positions have many names."""
    return len(axes) == len(wanted) and all(a == w or w in ("k", "in2") for a, w in zip(axes, wanted))
