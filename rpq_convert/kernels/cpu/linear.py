"""A linear layer on codes: forward and backward without the dense weight, with the loops of `lookup`.

A layer whose sub-vectors run along its inputs is a lookup forward and bins backward; one whose sub-vectors run along its outputs is
the reverse. Saved for backward are the input, the codes and the codebooks. No dense weight and no gradient of one exists at any
time. `launch` says how the work is divided among threads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference
from rpq_convert.kernels.cpu import amx_products, vector_products
from rpq_convert.kernels.cpu import tasks as a
from rpq_convert.kernels.cpu.cost import LOOKUPS, TILES, VECTORS, best, best_for_pixels, decode_time, lookup_time
from rpq_convert.kernels.cpu.few_tokens import LONGEST
from rpq_convert.kernels.cpu.launch import Launch, decodes, share
from rpq_convert.kernels.cpu.prepared import SMALL, cached_float32, contiguous_float32, pointer, prepared
from rpq_convert.kernels.cpu.tasks import TASKS
from rpq_convert.kernels.jit.threads import run
from rpq_convert.kernels.jit.vectors import HAS_VBMI, HAS_VNNI

ONE_BY_ONE = 3 if HAS_VBMI else 1  # up to so many tokens go one by one
DIGITS_DIM = 6  # dim from which on bins are faster than products of digits
AT_ONCE = 4  # groups of tokens of a gradient that are taken together,
FILLED = 1 << 14  # as long as they have no more rows than this, which stay in the cache
DIGITS_WORK = 16  # tokens times dim up to which products of digits are faster


def linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """Return `x W^T + bias` for the coded weight W [outputs, inputs], its rows times `scales`.

    Args:
        x: [tokens, inputs], float32, bfloat16 or float16; the result has its dtype, sums are float32.
        codes: uint8 [stages, blocks, n], any strides.
        codebooks: [stages, books, 256, dim] (one stage may lack the axis); the key under which tables are kept.
        scales, bias: [outputs].
    """
    tensors = (x, codebooks, scales, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Linear.apply(x, codes, codebooks, scales, bias, layout)
    return _forward(x, codes, codebooks, scales, bias, layout)


def pointwise(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """Return the same product for images: x [images, inputs, pixels] to [images, outputs, pixels]; not differentiable."""
    flat, scales, bias = contiguous_float32(x), cached_float32(scales), contiguous_float32(bias)
    assert flat is not None
    images, _, pixels = x.shape
    lookup = layout.axis == "in"
    out = flat.new_empty(images, layout.outputs, pixels)
    _, way = best_for_pixels(layout, images, pixels)
    if way != LOOKUPS:
        by_token, result = flat.transpose(1, 2), out.transpose(1, 2)
        _by_pieces(way, lookup, by_token, x.dtype, codes, codebooks, layout, None, scales, bias, result)
        return out.to(x.dtype)
    books, norms = prepared(codebooks, "lookup")
    launch = Launch(lookup, layout, codes, books, norms)
    for image, result in zip(flat, out):  # tokens are the pixels of an image [columns, pixels]
        fields = launch.fields(
            (a.X, image.data_ptr()), (a.OUT, result.data_ptr()), (a.TOKENS, pixels), (a.SCALES, pointer(scales)),
            (a.BIAS, pointer(bias)), (a.BY_TOKEN_IN, 1), (a.BY_COLUMN_IN, pixels), (a.BY_TOKEN_OUT, 1),
            (a.BY_COLUMN_OUT, pixels),
        )  # fmt: skip
        run(TASKS[16][0], fields, -(-pixels // 16), launch.scratch(16))
    return out.to(x.dtype)


def _forward(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    out = apply(layout.axis == "in", x, codes, codebooks, layout, scales=scales, bias=bias, short=True)
    return out if out.dtype == x.dtype else out.to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Any, bias: Any, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(x, codes, codebooks, scales, bias)
        ctx.layout = layout
        return _forward(x, codes, codebooks, scales, bias, layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, codes, codebooks, scales, bias = ctx.saved_tensors
        layout, needs = ctx.layout, ctx.needs_input_grad
        if reference.needs_graph(gradient):
            return reference.linear_graph(gradient, ctx.saved_tensors, layout, needs)
        dbias = gradient.sum(0, dtype=torch.float32).to(bias.dtype) if needs[4] else None
        dx, dbooks, dscales = gradients(gradient, x, codes, codebooks, scales, layout, (needs[0], *needs[2:4]))
        return dx, None, dbooks, dscales, dbias, None


def gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales), the faster way; None where not needed."""
    lookup, tokens = layout.axis == "in", x.shape[0]
    by_bins = lookup_time(lookup, layout, tokens) <= decode_time(lookup, tokens, x.dtype)
    return (linear_gradients if by_bins else decoded_gradients)(gradient, x, codes, codebooks, scales, layout, needs)


def linear_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) by lookups and bins; None where not needed."""
    dx = dbooks = dscales = None
    if needs[2]:
        assert scales is not None
        bare = apply(layout.axis == "in", x, codes, codebooks, layout)
        dscales = (bare * gradient).sum(0).to(scales.dtype)
    if needs[1]:
        dbooks, dx = _book_gradient(x, gradient, codes, codebooks, scales, layout, needs[0])
    if needs[0] and dx is None:
        dx = apply(layout.axis != "in", gradient, codes, codebooks, layout, factors=scales)
    return None if dx is None else dx.to(x.dtype), dbooks, dscales


def decoded_linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """The same as `linear` by decoding and a dense product, for cuts that lookups do not serve; saves no weight either."""
    return _DecodedLinear.apply(x, codes, codebooks, scales, bias, layout)


class _DecodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Any, bias: Any, layout: Layout
    ) -> Tensor:
        from rpq_convert.kernels.cpu.decode import decode

        ctx.save_for_backward(x, codes, codebooks, scales, bias)
        ctx.layout = layout
        return torch.nn.functional.linear(x, decode(codes, codebooks, scales, layout, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, codes, codebooks, scales, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if reference.needs_graph(gradient):
            return reference.linear_graph(gradient, ctx.saved_tensors, ctx.layout, needs)
        wanted = (needs[0], *needs[2:4])
        dx, dbooks, dscales = gradients(gradient, x, codes, codebooks, scales, ctx.layout, wanted)
        return dx, None, dbooks, dscales, gradient.sum(0) if needs[4] else None, None


def decoded_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) by way of the dense weight; None where not needed."""
    from rpq_convert.kernels.cpu.decode import decode, decode_gradients

    dx = None
    if needs[0]:
        back, tokens = layout.axis != "in", len(x)
        time, way = best(back, layout, tokens, x.dtype)
        if way != LOOKUPS and time < decode_time(back, tokens, x.dtype):
            dx = apply(back, gradient, codes, codebooks, layout, factors=scales).to(x.dtype)
        else:
            with torch.no_grad():
                dx = gradient @ decode(codes, codebooks, scales, layout, x.dtype)
    if not any(needs[1:]):
        return dx, None, None
    return dx, *decode_gradients(gradient.T @ x, codes, codebooks, scales, None, layout, needs[1:])


def apply(
    lookup: bool, x: Tensor, codes: Tensor, codebooks: Tensor, layout: Layout, *,
    factors: Tensor | None = None, scales: Tensor | None = None, bias: Tensor | None = None, short: bool = False,
) -> Tensor:  # fmt: skip
    """Return `x M^T` (a lookup, x [tokens, length]) or `x M` (bins, x [tokens, n]) in float32; `short` allows x's dtype.

    `factors` multiply x's columns before, `scales` and `bias` the result's columns after.
    """
    dtype, tokens = x.dtype, x.shape[0]
    factors, scales, bias = cached_float32(factors), cached_float32(scales), contiguous_float32(bias)
    way = best(lookup, layout, tokens, dtype)[1] if tokens > 1 else LOOKUPS
    if not (short and way == VECTORS and factors is None and vector_products.takes_short(x)):
        x = contiguous_float32(x)  # type: ignore[assignment]
    out = x.new_empty(tokens, layout.n if lookup else layout.length)
    if way != LOOKUPS:
        _by_pieces(way, lookup, x[None], dtype, codes, codebooks, layout, factors, scales, bias, out[None])
        return out
    launch = (launch_of_one if tokens == 1 else launch_for)(lookup, codes, codebooks, layout)
    if launch.digits is not None and tokens * layout.dim <= DIGITS_WORK:
        x, factors = x if factors is None else x * factors, None
        launch.few_tokens(x, pointer(scales), pointer(bias), out)
        return out
    keep = (x, factors, scales, bias, launch, codes, out)  # alive while addresses are used
    if tokens <= ONE_BY_ONE:
        for t in range(tokens):
            to = out.data_ptr() + 4 * t * out.shape[1]
            launch.one_token(x[t], pointer(scales), pointer(bias), to, pointer(factors))
    else:
        launch.many_tokens(x, pointer(factors), pointer(scales), pointer(bias), out)
    del keep
    return out


def _by_pieces(
    way: str, lookup: bool, x: Tensor, dtype: torch.dtype, codes: Tensor, codebooks: Tensor, layout: Layout, factors: Tensor | None,
    scales: Tensor | None, bias: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Write the products of x [images, tokens, columns], which was of `dtype`, to out, expanding pieces of the matrix."""
    if way != TILES:
        vector_products.multiply_all(
            lookup, x, dtype, codes, codebooks, layout, pointer(factors), pointer(scales), pointer(bias), out
        )
        return
    tables = prepared(codebooks, "float32" if lookup else "float32 transposed")
    parts = amx_products.parts_of(dtype, codebooks)
    amx_products.multiply(
        lookup, x, codes, tables, layout, parts, pointer(factors), pointer(scales), pointer(bias), out
    )  # fmt: skip


def turns(lookup: bool, layout: Layout, codes: Tensor) -> bool:
    """Whether codes of single weights along inputs lie row by row: along outputs the same matrix lies side by side."""
    return lookup and layout.dim == 1 and layout.books == 1 and codes.stride(1) == 1 and layout.length <= LONGEST


@functools.cache
def turned(layout: Layout) -> Layout:
    """Return the layout of the same matrix, of single weights, with its codes turned around."""
    axis = "out" if layout.axis == "in" else "in"
    return dataclasses.replace(layout, axis=axis, n=layout.length, length=layout.n)


def launch_of_one(lookup: bool, codes: Tensor, codebooks: Tensor, layout: Layout) -> Launch:
    """Return what a product of one token with these codes needs, kept from call to call."""
    if turns(lookup, layout, codes):
        return launch_for(not lookup, codes.transpose(1, 2), codebooks, turned(layout))
    return launch_for(lookup, codes, codebooks, layout)


def launch_for(lookup: bool, codes: Tensor, codebooks: Tensor, layout: Layout) -> Launch:
    """Return what a product with these codes needs, kept from call to call."""
    kind = (lookup, layout, codes.data_ptr(), codes.stride())

    def make() -> Launch:
        by_digits = HAS_VNNI and not lookup and layout.dim < DIGITS_DIM and codes.stride(2) == 1 and layout.n <= LONGEST
        digits = prepared(codebooks, "digits") if by_digits and codebooks.numel() <= SMALL else None
        codewords = prepared(codebooks, "float32") if digits is None and decodes(lookup, layout, codes) else None
        books, norms = prepared(codebooks, "lookup")
        return Launch(lookup, layout, codes, books, norms, digits, codewords)

    return prepared(codebooks, kind, make)  # type: ignore[no-any-return]


def _book_gradient(
    x: Tensor, gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, wants_x: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the codebooks' gradient and, where the same bins give it, the input's."""
    x, gradient, factors = contiguous_float32(x), contiguous_float32(gradient), cached_float32(scales)  # type: ignore[assignment]
    books, norms = prepared(codebooks, "lookup")
    tokens = x.shape[0]
    lanes = 8 if tokens <= 8 else 16
    _, _, _, load, task = TASKS[lanes]
    groups = -(-tokens // lanes)
    # what fills the bins has n columns, what meets them has `length`
    sides = []
    for lookup, values, on_outputs in (
        (False, gradient if layout.axis == "in" else x, layout.axis == "in"),
        (True, x if layout.axis == "in" else gradient, layout.axis == "out"),
    ):
        launch = Launch(lookup, layout, codes, books, norms)
        loaded = x.new_empty(groups, launch.padded_in * lanes)
        factor = pointer(factors) if on_outputs else 0
        operand = (a.X, values.data_ptr()), (a.TOKENS, tokens), (a.FACTORS, factor), (a.LOADED, loaded.data_ptr())
        run(load, launch.fields(*operand), groups)
        sides.append(loaded)
    filling, multiplying = sides
    other = torch.zeros_like(multiplying) if wants_x and layout.axis == "in" else None
    part = share(layout.blocks, layout.n * layout.blocks * layout.stages * groups, 1)
    pieces = -(-layout.blocks // part)
    own = 1 if layout.books == layout.blocks else pieces  # parts that share a codebook sum apart
    grads = x.new_zeros(own, layout.stages * layout.books * 256 * layout.dim)
    at_once = max(1, min(FILLED // layout.n, AT_ONCE, groups))
    fields = (
        codes.data_ptr(), *codes.stride(), books.data_ptr(), *layout.shape,
        books.dtype == torch.float16, filling.data_ptr(), multiplying.data_ptr(), groups, at_once,
        grads.data_ptr(), 4 * grads.shape[1] * (own > 1), pointer(other), *[0] * 4, part,
    )  # fmt: skip
    run(task, fields, pieces, 256 * lanes * at_once + layout.room)
    dx = None
    if other is not None:  # [groups, length padded, lanes] -> [tokens, length]
        wide = other.view(groups, -1, lanes)[:, : layout.length]
        dx = wide.transpose(1, 2).reshape(groups * lanes, layout.length)[:tokens].contiguous()
    total = grads[0] if own == 1 else grads.sum(0)
    total = total.view(-1, layout.dim, 256).transpose(1, 2)
    return total.reshape(codebooks.shape).to(codebooks.dtype), dx
