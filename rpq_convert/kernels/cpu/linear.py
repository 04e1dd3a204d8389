"""A linear layer on codes: forward and backward without the weight. The torch face of `lookup`.

Which primitive serves which pass: a layer cut along its inputs is a lookup forward and bins backward, one cut along its
outputs the reverse. Saved for backward are the input, the codes and the codebooks; no dense weight and no dense gradient
of one exists at any time. `call` says how the work is shared out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.layout import Cut
from rpq_convert.kernels import reference
from rpq_convert.kernels.cpu import amx_products
from rpq_convert.kernels.cpu.call import Call, share
from rpq_convert.kernels.cpu.cost import decode_time, lookup_time, pixel_times, tile_time
from rpq_convert.kernels.cpu.few_tokens import LONGEST
from rpq_convert.kernels.cpu.prepared import SMALL, kept_float, plain_float, pointer, ready
from rpq_convert.kernels.cpu.tasks import TASKS
from rpq_convert.kernels.jit.threads import run
from rpq_convert.kernels.jit.vectors import HAS_DOT, HAS_PICK

FEW = 3 if HAS_PICK else 1  # up to so many tokens go one by one
DOTS = 6  # dim from which on bins are faster than products of digits
AT_ONCE = 4  # groups of tokens of a gradient that are taken together,
FILLED = 1 << 14  # as long as they have no more rows than this, which stay in the cache
FEW_DOTS = 16  # tokens times dim up to which products of digits are faster


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, cut: Cut) -> Tensor:
    """Return `x W^T + bias` for the coded weight W [outputs, inputs], its rows times `scales`.

    Args:
        x: [tokens, inputs], float32, bfloat16 or float16; the result has its dtype, sums are float32.
        codes: uint8 [stages, blocks, n], any strides.
        codebooks: [stages, books, 256, dim] (one stage may lack the axis); the key under which tables are kept.
        scales, bias: [outputs].
    """
    tensors = (x, codebooks, scales, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Linear.apply(x, codes, codebooks, scales, bias, cut)
    return _forward(x, codes, codebooks, scales, bias, cut)


def pointwise(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, cut: Cut
) -> Tensor:
    """Return the same product for images: x [images, inputs, pixels] to [images, outputs, pixels]; not differentiable."""
    flat, scales, bias = plain_float(x), kept_float(scales), plain_float(bias)
    assert flat is not None
    images, _, pixels = x.shape
    looks = cut.axis == "in"
    by_lookups, by_tiles = pixel_times(cut, images, pixels)
    if by_tiles < by_lookups:
        out = flat.new_empty(images, cut.outputs, pixels)
        by_token, result = flat.transpose(1, 2), out.transpose(1, 2)
        _by_tiles(looks, by_token, x.dtype, codes, codebooks, cut, None, scales, bias, result)
        return out.to(x.dtype)
    books, norms = ready(codebooks, "lookup")
    call = Call(looks, cut, codes, books, norms)
    out = flat.new_empty(images, cut.outputs, pixels)
    for image, result in zip(flat, out):
        fields = call.fields(
            image.data_ptr(), pixels, 0, pointer(scales), pointer(bias), result.data_ptr(), pixels=pixels
        )
        run(TASKS[16][0], fields, -(-pixels // 16), call.scratch(16))
    return out.to(x.dtype)


def _forward(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, cut: Cut
) -> Tensor:
    out = apply(cut.axis == "in", x, codes, codebooks, cut, scales=scales, bias=bias)
    return out if out.dtype == x.dtype else out.to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Any, bias: Any, cut: Cut) -> Tensor:
        ctx.save_for_backward(x, codes, codebooks, scales, bias)
        ctx.cut = cut
        return _forward(x, codes, codebooks, scales, bias, cut)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, codes, codebooks, scales, bias = ctx.saved_tensors
        cut, needs = ctx.cut, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return reference.linear_graph(gradient, ctx.saved_tensors, cut, needs)
        dbias = gradient.sum(0, dtype=torch.float32).to(bias.dtype) if needs[4] else None
        dx, dbooks, dscales = gradients(gradient, x, codes, codebooks, scales, cut, (needs[0], *needs[2:4]))
        return dx, None, dbooks, dscales, dbias, None


def gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, cut: Cut, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales), the faster way; None where not needed."""
    looks, tokens = cut.axis == "in", x.shape[0]
    by_bins = lookup_time(looks, cut, tokens) <= decode_time(looks, tokens, x.dtype)
    return (linear_gradients if by_bins else decoded_gradients)(gradient, x, codes, codebooks, scales, cut, needs)


def linear_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, cut: Cut, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) by lookups and bins; None where not needed."""
    dx = dbooks = dscales = None
    if needs[2]:
        assert scales is not None
        bare = apply(cut.axis == "in", x, codes, codebooks, cut)
        dscales = (bare * gradient).sum(0).to(scales.dtype)
    if needs[1]:
        dbooks, dx = _book_gradient(x, gradient, codes, codebooks, scales, cut, needs[0])
    if needs[0] and dx is None:
        dx = apply(cut.axis != "in", gradient, codes, codebooks, cut, factors=scales)
    return None if dx is None else dx.to(x.dtype), dbooks, dscales


def decoded_linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, cut: Cut
) -> Tensor:
    """The same as `linear` by decoding and a dense product, for cuts that lookups do not serve; saves no weight either."""
    return _DecodedLinear.apply(x, codes, codebooks, scales, bias, cut)


class _DecodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Any, bias: Any, cut: Cut) -> Tensor:
        from rpq_convert.kernels.cpu.decode import decode

        ctx.save_for_backward(x, codes, codebooks, scales, bias)
        ctx.cut = cut
        return torch.nn.functional.linear(x, decode(codes, codebooks, scales, cut, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, codes, codebooks, scales, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return reference.linear_graph(gradient, ctx.saved_tensors, ctx.cut, needs)
        wanted = (needs[0], *needs[2:4])
        dx, dbooks, dscales = gradients(gradient, x, codes, codebooks, scales, ctx.cut, wanted)
        return dx, None, dbooks, dscales, gradient.sum(0) if needs[4] else None, None


def decoded_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, cut: Cut, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) by way of the dense weight; None where not needed."""
    from rpq_convert.kernels.cpu.decode import decode, decode_gradients

    dx = None
    if needs[0]:
        back, tokens = cut.axis != "in", len(x)
        if tile_time(back, cut, tokens, x.dtype) < decode_time(back, tokens, x.dtype):
            dx = apply(back, gradient, codes, codebooks, cut, factors=scales).to(x.dtype)
        else:
            with torch.no_grad():
                dx = gradient @ decode(codes, codebooks, scales, cut, x.dtype)
    if not any(needs[1:]):
        return dx, None, None
    return dx, *decode_gradients(gradient.T @ x, codes, codebooks, scales, None, cut, needs[1:])


def apply(
    looks: bool, x: Tensor, codes: Tensor, codebooks: Tensor, cut: Cut, *,
    factors: Tensor | None = None, scales: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return `x M^T` (a lookup, x [tokens, length]) or `x M` (bins, x [tokens, n]) in float32.

    `factors` multiply x's columns before, `scales` and `bias` the result's columns after.
    """
    dtype, tokens = x.dtype, x.shape[0]
    x, factors, scales, bias = plain_float(x), kept_float(factors), kept_float(scales), plain_float(bias)  # type: ignore[assignment]
    out = x.new_empty(tokens, cut.n if looks else cut.length)
    if tile_time(looks, cut, tokens, dtype) < lookup_time(looks, cut, tokens):
        _by_tiles(looks, x[None], dtype, codes, codebooks, cut, factors, scales, bias, out[None])
        return out
    call = call_of(looks, codes, codebooks, cut)
    if call.digits is not None and tokens * cut.dim <= FEW_DOTS:
        x, factors = x if factors is None else x * factors, None
        call.dots(x, pointer(scales), pointer(bias), out)
        return out
    keep = (x, factors, scales, bias, call, codes, out)  # alive while addresses are used
    if tokens == 1 and factors is None:
        call.one(x, pointer(scales), pointer(bias), out.data_ptr())
    elif tokens <= FEW:
        for t in range(tokens):
            one = x[t] if factors is None else x[t] * factors
            call.one(one, pointer(scales), pointer(bias), out.data_ptr() + 4 * t * out.shape[1])
    else:
        call.many(x, pointer(factors), pointer(scales), pointer(bias), out)
    del keep
    return out


def _by_tiles(
    looks: bool, x: Tensor, dtype: torch.dtype, codes: Tensor, codebooks: Tensor, cut: Cut, factors: Tensor | None,
    scales: Tensor | None, bias: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Write the products of x [images, tokens, columns], which was of `dtype`, to out."""
    tables = ready(codebooks, "float32" if looks else "float32 down")
    parts = amx_products.parts_of(dtype, codebooks)
    amx_products.multiply(
        looks, x, codes, tables, cut, parts, pointer(factors), pointer(scales), pointer(bias), out
    )  # fmt: skip


def call_of(looks: bool, codes: Tensor, codebooks: Tensor, cut: Cut) -> Call:
    """Return what a product with these codes needs, kept from call to call."""
    kind = (looks, cut, codes.data_ptr(), codes.stride())

    def make() -> Call:
        by_digits = HAS_DOT and not looks and cut.dim < DOTS and codes.stride(2) == 1 and cut.n <= LONGEST
        digits = ready(codebooks, "digits") if by_digits and codebooks.numel() <= SMALL else None
        books, norms = ready(codebooks, "lookup")
        return Call(looks, cut, codes, books, norms, digits)

    return ready(codebooks, kind, make)  # type: ignore[no-any-return]


def _book_gradient(
    x: Tensor, gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, cut: Cut, wants_x: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the codebooks' gradient and, where the same bins give it, the input's."""
    x, gradient, factors = plain_float(x), plain_float(gradient), kept_float(scales)  # type: ignore[assignment]
    books, norms = ready(codebooks, "lookup")
    tokens = x.shape[0]
    lanes = 8 if tokens <= 8 else 16
    _, _, _, enters, task = TASKS[lanes]
    groups = -(-tokens // lanes)
    # what fills the bins has n columns, what meets them has `length`
    sides = []
    for looks, values, on_outputs in (
        (False, gradient if cut.axis == "in" else x, cut.axis == "in"),
        (True, x if cut.axis == "in" else gradient, cut.axis == "out"),
    ):
        call = Call(looks, cut, codes, books, norms)
        entered = x.new_empty(groups, call.enters * lanes)
        factor = pointer(factors) if on_outputs else 0
        run(enters, call.fields(values.data_ptr(), tokens, factor, 0, 0, 0, entered=entered.data_ptr()), groups)
        sides.append(entered)
    filling, meeting = sides
    other = torch.zeros_like(meeting) if wants_x and cut.axis == "in" else None
    part = share(cut.blocks, cut.n * cut.blocks * cut.stages * groups, 1)
    pieces = -(-cut.blocks // part)
    own = 1 if cut.books == cut.blocks else pieces  # parts that share a codebook sum apart
    grads = x.new_zeros(own, cut.stages * cut.books * 256 * cut.dim)
    at_once = max(1, min(FILLED // cut.n, AT_ONCE, groups))
    fields = (
        codes.data_ptr(), *codes.stride(), books.data_ptr(), *cut.shape,
        books.dtype == torch.float16, filling.data_ptr(), meeting.data_ptr(), groups, at_once,
        grads.data_ptr(), 4 * grads.shape[1] * (own > 1), pointer(other), *[0] * 4, part,
    )  # fmt: skip
    run(task, fields, pieces, 256 * lanes * at_once + cut.room)
    dx = None
    if other is not None:  # [groups, length padded, lanes] -> [tokens, length]
        wide = other.view(groups, -1, lanes)[:, : cut.length]
        dx = wide.transpose(1, 2).reshape(groups * lanes, cut.length)[:tokens].contiguous()
    total = grads[0] if own == 1 else grads.sum(0)
    total = total.view(-1, cut.dim, 256).transpose(1, 2)
    return total.reshape(codebooks.shape).to(codebooks.dtype), dx
