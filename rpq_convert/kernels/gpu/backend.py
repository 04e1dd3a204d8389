"""The GPU backend: Triton kernels, or a decoded weight and torch's product where there are many tokens.

Shapes and dtypes are those of `reference`. The tests hold it to `reference` in Triton's interpreter and compile it for real targets. Its
speed has not been measured on a device yet, so FUSED is an assumption. Saved for backward are inputs, codes and codebooks, never the
weight. The gradient of codebooks is added by atomic operations, whose order varies: with `torch.use_deterministic_algorithms(True)`
gradients are computed by `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference
from rpq_convert.kernels.gpu import products, tiles

FUSED = 64  # tokens up to which the weight is not decoded: each 64 of them would decode it once more

Needs = tuple[bool, ...]


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """Return `x W^T + bias`, x [tokens, inputs] of any strides, in x's dtype; sums are float32."""
    if not x.numel():
        return reference.linear(x, codes, codebooks, scales, bias, layout)
    if _recorded(x, codebooks, scales, bias):
        return _Linear.apply(x, codes, codebooks, scales, bias, layout)
    return _linear(x, codes, codebooks, scales, bias, layout)


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs], contiguous, in `dtype`, with the bits of `reference.decode`."""
    if _recorded(codebooks, scales):
        return _Decode.apply(codes, codebooks, scales, None, layout, dtype)
    return tiles.decode(codes, codebooks, scales, None, layout, dtype)


def decode_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Return rows `index` [k] of a weight whose sub-vectors run along its inputs: [k, inputs].

    An index out of range fails on the device, as in torch's own embeddings: to raise here would wait for the device.
    """
    index = index.long().contiguous()
    if not index.is_cuda and index.numel() and (int(index.min()) < 0 or int(index.max()) >= layout.n):
        raise IndexError(f"an index is out of range for an embedding of {layout.n} entries")
    if _recorded(codebooks, scales):
        return _Decode.apply(codes, codebooks, scales, index, layout, dtype)
    return tiles.decode(codes, codebooks, scales, index, layout, dtype)


def linear_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) of a linear layer; None where not needed."""
    if not x.numel() or torch.are_deterministic_algorithms_enabled():
        return reference.linear_gradients(gradient, x, codes, codebooks, scales, layout, needs)
    dx = dbooks = dscales = None
    if needs[0] and x.shape[0] > FUSED:
        dx = gradient @ tiles.decode(codes, codebooks, scales, None, layout, x.dtype)
    elif needs[0]:
        over = "rows" if layout.axis == "in" else "columns"
        dx = products.product(gradient, codes, codebooks, layout, over, factors=scales, dtype=x.dtype)
    if needs[1]:
        dbooks = products.book_gradient(gradient, x, codes, codebooks, scales, layout)
    if needs[2]:
        assert scales is not None
        bare = _linear(x, codes, codebooks, None, None, layout, torch.float32)
        dscales = (bare * gradient).sum(0).to(scales.dtype)
    return dx, dbooks, dscales


def decode_gradients(
    gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (codebooks, scales) from that of the weight, or of its rows `index`; None where not needed."""
    if torch.are_deterministic_algorithms_enabled():
        return reference.decode_gradients(gradient, codes, codebooks, scales, index, layout, needs)
    dscales = None
    if needs[1]:
        assert scales is not None
        sums = products.scale_gradient(gradient, codes, codebooks, index, layout)
        dscales = sums if index is None else sums.new_zeros(layout.n).index_add_(0, index, sums)
        dscales = dscales.to(scales.dtype)
    return tiles.decode_gradient(gradient, codes, codebooks, scales, index, layout) if needs[0] else None, dscales


def _linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if x.shape[0] > FUSED:
        weight = tiles.decode(codes, codebooks, scales, None, layout, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    over = "columns" if layout.axis == "in" else "rows"
    return products.product(x, codes, codebooks, layout, over, scales=scales, bias=bias, dtype=dtype or x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Any, bias: Any, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(x, codes, codebooks, scales, bias)
        ctx.layout = layout
        return _linear(x, codes, codebooks, scales, bias, layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, codes, codebooks, scales, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if reference.needs_graph(gradient):  # a gradient of this gradient is wanted: ordinary operations have one
            return reference.linear_graph(gradient, ctx.saved_tensors, ctx.layout, needs)
        dbias = gradient.sum(0, dtype=torch.float32).to(bias.dtype) if needs[4] else None
        wanted = (needs[0], *needs[2:4])
        dx, dbooks, dscales = linear_gradients(gradient, x, codes, codebooks, scales, ctx.layout, wanted)
        return dx, None, dbooks, dscales, dbias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, codebooks: Tensor, scales: Any, index: Any, layout: Layout, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, codebooks, scales, index)
        ctx.layout = layout
        return tiles.decode(codes, codebooks, scales, index, layout, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        codes, codebooks, scales, index = ctx.saved_tensors
        layout, needs = ctx.layout, ctx.needs_input_grad
        if reference.needs_graph(gradient):
            return None, *reference.decode_graph(gradient, ctx.saved_tensors, layout, needs[1:3]), None, None, None
        dbooks, dscales = decode_gradients(gradient, codes, codebooks, scales, index, layout, needs[1:3])
        return None, dbooks, dscales, None, None, None
