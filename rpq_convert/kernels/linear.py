"""A linear layer on codes: forward and backward without the weight. The torch face of `lookup`.

Which primitive serves which pass: a layer cut along its inputs is a lookup forward and bins backward, one cut along its
outputs the reverse. Saved for backward are the input, the codes and the codebooks; no dense weight and no dense gradient
of one exists at any time. `call` says how the work is shared out.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpq_convert.kernels import plain, tile_products
from rpq_convert.kernels.call import Call, share
from rpq_convert.kernels.cut import Cut
from rpq_convert.kernels.dots import LONGEST, TOP
from rpq_convert.kernels.tasks import TASKS
from rpq_convert.kernels.team import run
from rpq_convert.kernels.vectors import HAS_AMX, HAS_BFLOAT16, HAS_DOT, HAS_HALF, HAS_PICK, TWO_FULL

FEW = 3 if HAS_PICK else 1  # up to so many tokens go one by one
SMALL = 1 << 16  # codebooks of fewer numbers are kept wide
DOTS = 6  # dim from which on bins are faster than products of digits
AT_ONCE = 4  # groups of tokens of a gradient that are taken together,
FILLED = 1 << 14  # as long as they have no more rows than this, which stay in the cache
FEW_DOTS = 16  # tokens times dim up to which products of digits are faster
IMAGES = 1.6  # what lookups over the pixels of images cost more: pixels lie along rows, and 16 seldom divide them


def cost(cut: Cut, tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the time of a layer that never expands its weight over that of decoding it and multiplying, roughly."""
    looks = cut.axis == "in"
    own = min(lookup_time(looks, cut, tokens), tile_time(looks, cut, tokens, dtype))
    return own / decode_time(looks, tokens, dtype)


def pointwise_cost(cut: Cut, images: int, pixels: int) -> float:
    """The same for `pointwise`."""
    return min(pixel_times(cut, images, pixels)) / decode_time(cut.axis == "in", images * pixels, torch.float32)


def pixel_times(cut: Cut, images: int, pixels: int) -> tuple[float, float]:
    """Return the times of lookups and of tiles for images: tiles take whole groups of an image's pixels."""
    looks, padded = cut.axis == "in", images * -(-pixels // 16) * 16
    return IMAGES * lookup_time(looks, cut, images * pixels), tile_time(looks, cut, padded, torch.float32)


# Times of a product with every token, in those of one token by a dense product in float32. Few tokens are bound by memory,
# where codes always win. From benchmarks/speed.py on AMD EPYC 9004 and Intel Sapphire Rapids, where dense products are 1.75
# times as fast beside lookups.
FASTER = 1.75 if TWO_FULL else 1.0


def lookup_time(looks: bool, cut: Cut, tokens: int) -> float:
    return FASTER * tokens * cut.works[looks]


def decode_time(looks: bool, tokens: int, dtype: torch.dtype) -> float:
    """A decoded weight counts as 50 tokens (90 where a sub-vector lies along a row).

    Dense bfloat16 is 2.4 times as fast as float32 where the processor has it, with AMX 5.8 times.
    """
    decoded = 90.0 if looks else 50.0
    if dtype == torch.bfloat16 and HAS_AMX:
        return tokens / 5.8 + 2.4 * decoded
    if dtype == torch.bfloat16 and HAS_BFLOAT16:
        return (tokens + 1.5 * decoded) / 2.4
    return tokens + decoded


def tile_time(looks: bool, cut: Cut, tokens: int, dtype: torch.dtype) -> float:
    if tokens <= 16 or not tile_products.serves(cut):
        return math.inf
    rows, terms = (cut.n, cut.length) if looks else (cut.length, cut.n)
    expanded = cut.stages * (45 + 90 / cut.dim if looks else 70)
    if dtype == torch.bfloat16:
        return tokens * (0.2 + 60 / rows + 30 / terms) + 0.85 * expanded
    return tokens * (0.45 + 100 / rows + 30 / terms) + expanded


# id(codebooks) -> (weak reference, version, address, shape, sample, its values, {kind: tensors}); torch's dictionary of
# weak references takes a microsecond longer
_READY: dict[int, tuple[Any, ...]] = {}


def ready(codebooks: Tensor, kind: Any, make: Callable[[], Any] | None = None) -> Any:
    """Return codebooks [stages, books, 256, dim] as a kernel reads them.

    Kind "lookup": (as [stages, books, dim, 256], norms of the longest codewords [stages, books]); float32, or float16 where
    that is what they are and there are many, as memory is what limits a few tokens. Kind "digits": (bytes
    [stages, books, dim, 3, 256], steps [stages, books]), see `dots`. A dtype's name: in that dtype, as stored; with " down",
    as [stages, books, dim, 256]. Any other: what `make` returns.

    Kept while the tensor lives and does not change. Writes through `.data` leave no mark on a tensor's version, so some of
    its values are compared as well.
    """
    if codebooks.is_inference():
        return make() if make else _prepare(codebooks.detach(), kind)
    held = _READY.get(id(codebooks))
    if (
        held is None
        or held[0]() is not codebooks
        or held[1] != codebooks._version
        or held[2] != codebooks.data_ptr()
        or held[3] != codebooks.shape
        or held[4].tolist() != held[5]
    ):
        values = codebooks.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // 13)]
        name = id(codebooks)
        weak = weakref.ref(codebooks, lambda gone: _forget(name, gone))
        state = (weak, codebooks._version, codebooks.data_ptr(), codebooks.shape)
        held = _READY[name] = (*state, sample, sample.tolist(), {})
    kinds = held[6]
    if kind not in kinds:
        kinds[kind] = make() if make else _prepare(codebooks.detach(), kind)
    return kinds[kind]


def _forget(name: int, gone: Any) -> None:
    if name in _READY and _READY[name][0] is gone:
        del _READY[name]


def _prepare(codebooks: Tensor, kind: str) -> Any:
    if kind == "lookup":
        wide = codebooks.float()
        keep_half = codebooks.dtype == torch.float16 and codebooks.numel() > SMALL and HAS_HALF
        kept = codebooks if keep_half else wide
        return kept.transpose(-1, -2).contiguous(), torch.linalg.vector_norm(wide, dim=-1).amax(-1).contiguous()
    if kind == "digits":
        step = codebooks.float().abs().amax((-1, -2)) / TOP
        step = torch.where(step == 0, 1.0, step)
        whole = (codebooks.double() / step[..., None, None].double()).round().long() + 0x808080
        digits = torch.stack([whole >> 8 * i & 255 for i in range(3)], -1).to(torch.uint8)  # [..., 256, dim, 3]
        return digits.movedim(-3, -1).contiguous(), step * 65536
    name, _, down = kind.partition(" ")
    kept = codebooks.to(getattr(torch, name))
    return (kept.transpose(-1, -2) if down else kept).contiguous()


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
            return plain.linear_graph(gradient, ctx.saved_tensors, cut, needs)
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
        from rpq_convert.kernels.decode import decode

        ctx.save_for_backward(x, codes, codebooks, scales, bias)
        ctx.cut = cut
        return torch.nn.functional.linear(x, decode(codes, codebooks, scales, cut, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, codes, codebooks, scales, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return plain.linear_graph(gradient, ctx.saved_tensors, ctx.cut, needs)
        wanted = (needs[0], *needs[2:4])
        dx, dbooks, dscales = gradients(gradient, x, codes, codebooks, scales, ctx.cut, wanted)
        return dx, None, dbooks, dscales, gradient.sum(0) if needs[4] else None, None


def decoded_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, cut: Cut, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) by way of the dense weight; None where not needed."""
    from rpq_convert.kernels.decode import decode, decode_gradients

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


def plain_float(t: Tensor | None) -> Tensor | None:
    """Return a tensor whose address kernels can use; mostly the tensor itself."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.detach().float().contiguous()


def kept_float(scales: Tensor | None) -> Tensor | None:
    """Return scales as float32, kept for the next call where they are narrower."""
    return scales if scales is None or scales.dtype == torch.float32 else ready(scales, "float32")


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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
    parts = tile_products.parts_of(dtype, codebooks)
    tile_products.multiply(
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
