"""Readings: what an operation multiplies a weight by. One reader for every operation of torch that reads weights.

A reader takes the operation's own arguments and returns a reading of every tensor among them that may be a weight. Recurrent
layers and `einsum` have files of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
        source: what the vectors are made of: the tensors, and how they are cut. Readings of one source have the same vectors.
    """

    weight: Tensor
    axes: tuple[str, ...]
    input: Tensor | None = None
    vectors: Callable[[], Vectors] = lambda: iter(())
    source: Hashable = None


def made_of(how: str, *what: Any) -> Hashable:
    """Return a reading's source: how its vectors are cut from these tensors, by these numbers.

    A tensor is known by its identity as long as nothing writes to it. Those of inference mode do not count writes, so
    each reading of one is a source of its own.
    """
    return (how, *((id(w), object() if w.is_inference() else w._version) if isinstance(w, Tensor) else w for w in what))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Reading]:
    return [_operand(weight, ("out", "in"), input, "rows")]


OPERANDS = (
    "self",
    "input",
    "mat1",
    "batch1",
    "mat2",
    "batch2",
    "vec",
    "vec2",
    "other",
    "tensor2",
)  # torch's names, left first


def _matmul(*args: Any, **kwargs: Any) -> list[Reading]:
    """A product, whatever torch calls its two operands; either may be the weight."""
    left, right = [*args, *(kwargs[name] for name in OPERANDS if name in kwargs)][:2]
    columns = right if right.ndim == 1 else right.mT  # vectors along the last axis
    return [_operand(right, ("in", "out"), left, "rows"), _operand(left, ("out", "in"), columns, "columns", right)]


def _operand(weight: Tensor, axes: tuple[str, ...], x: Tensor, how: str, whole: Tensor | None = None) -> Reading:
    """Return the reading of one operand of a product: a matrix, or a stack of them that each multiply their part of x."""
    whole = x if whole is None else whole  # what x is a view of
    if weight.ndim < 3:
        return Reading(weight, axes, whole, lambda: iter([(0, x.reshape(-1, x.shape[-1]))]), made_of(how, whole))

    def vectors() -> Vectors:
        parts = x[None] if x.ndim == 2 else x.movedim(-3, 0)
        for part, own in enumerate(parts.expand(len(weight), *parts.shape[1:])):
            yield part, own.reshape(-1, x.shape[-1])

    return Reading(weight, ("expert", *axes), whole, vectors, made_of(f"{how} of parts", whole))


def _swapped_matmul(right: Tensor, left: Tensor) -> list[Reading]:
    return _matmul(left, right)


def _addmm(*args: Any, **kwargs: Any) -> list[Reading]:
    """A sum and a product: `input` is no operand."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("input", "self")}
    return _matmul(*args[-2:] if len(args) > 2 else args[1:], **kwargs)


def _grouped(input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, **_: Any) -> list[Reading]:
    def vectors() -> Vectors:
        ends = [] if offs is None else offs.tolist()
        yield from ((e, input[start:end]) for e, (start, end) in enumerate(zip([0, *ends], ends)))

    return [Reading(mat2, ("expert", "in", "out"), input, vectors, made_of("runs", input, offs))]


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Reading]:
    def vectors() -> Vectors:
        yield 0, (input1[..., :, None] * input2[..., None, :]).reshape(-1, input1.shape[-1] * input2.shape[-1])

    return [Reading(weight, ("out", "in", "in2"), input1, vectors, made_of("pairs", input1, input2))]


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> list[Reading]:
    """torch's own attention in one function.

    A joint projection sees what its queries, keys and values are made from; the last one, what the heads give.
    """
    names = inspect.signature(F.multi_head_attention_forward).parameters
    given = {**dict(zip(list(names)[3:], args)), **kwargs}
    same = [t for i, t in enumerate((query, key, value)) if not any(t is u for u in (query, key, value)[:i])]

    def heads() -> Vectors:
        weight = given["out_proj_weight"]
        one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        plain = {**given, "out_proj_weight": one, "out_proj_bias": None, "need_weights": False}
        out = F.multi_head_attention_forward(query, key, value, **plain)[0]
        yield 0, out.reshape(-1, out.shape[-1])

    axes = ("out", "in")
    separate = (given.get(f"{name}_proj_weight") for name in "qkv")
    found = [_operand(w, axes, x, "rows") for w, x in zip(separate, (query, key, value)) if w is not None]
    if given["in_proj_weight"] is not None:
        every: Callable[[], Vectors] = lambda: iter([(0, t.reshape(-1, t.shape[-1])) for t in same])  # noqa: E731
        found.append(Reading(given["in_proj_weight"], axes, query, every, made_of("all rows", *same)))
    if given["out_proj_weight"] is not None:
        found.append(Reading(given["out_proj_weight"], axes, query, heads, object()))
    return found


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
) -> list[Reading]:  # fmt: skip
    kernel, dims = tuple(weight.shape[2:]), weight.ndim - 2
    steps, spaces = _each(stride, dims), _each(dilation, dims)
    reach = [d * (k - 1) for k, d in zip(kernel, spaces)]
    if isinstance(padding, str):
        sides = tuple((r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach)
    else:
        sides = tuple((p, p) for p in _each(padding, dims))

    def vectors() -> Vectors:
        x = input if input.ndim == dims + 2 else input[None]
        x = F.pad(x, [n for side in reversed(sides) for n in side])
        return _patches(x, kernel, steps, spaces, groups)

    source = made_of("patches", input, kernel, steps, sides, spaces, groups)
    return [Reading(weight, ("out", "in", *("k",) * dims), input, vectors, source)]


def _conv_transpose(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> list[Reading]:  # fmt: skip
    """An output of a transposed convolution is a convolution of the spread inputs, its kernel mirrored."""
    kernel, dims = tuple(weight.shape[2:]), weight.ndim - 2
    steps, spaces = _each(stride, dims), _each(dilation, dims)
    reach = [d * (k - 1) for k, d in zip(kernel, spaces)]
    edges = zip(reach, _each(padding, dims), _each(output_padding, dims))
    sides = tuple((r - p, r - p + o) for r, p, o in edges)  # a negative one cuts

    def vectors() -> Vectors:
        x = input if input.ndim == dims + 2 else input[None]
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], steps)))
        spread[(..., *(slice(None, None, s) for s in steps))] = x  # type: ignore[index]
        spread = F.pad(spread, [n for side in reversed(sides) for n in side])
        for group, patches in _patches(spread, kernel, (1,) * dims, spaces, groups):
            square = patches.reshape(len(patches), -1, *kernel).flip(tuple(range(2, 2 + dims)))
            yield group, square.reshape(len(patches), -1)

    source = made_of("spread patches", input, kernel, steps, sides, spaces, groups)
    return [Reading(weight, ("in", "out", *("k",) * dims), input, vectors, source)]


def _lookup(input: Tensor, weight: Tensor, *rest: Any, **_: Any) -> list[Reading]:
    return [Reading(weight, ("out", "in"))]


PRODUCTS = (
    torch.matmul, torch.mm, torch.bmm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.__matmul__,
)  # fmt: skip
SUMS = (torch.addmm, torch.addmv, torch.baddbmm, Tensor.addmm, Tensor.addmv, Tensor.baddbmm)
READERS: dict[Any, Callable[..., list[Reading]]] = {
    F.linear: _linear,
    **dict.fromkeys(SUMS, _addmm),
    **dict.fromkeys(PRODUCTS, _matmul),
    Tensor.__rmatmul__: _swapped_matmul,
    F.bilinear: _bilinear,
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose),
    **dict.fromkeys((F.embedding, F.embedding_bag), _lookup),
}
READERS |= {f: _grouped for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f}
