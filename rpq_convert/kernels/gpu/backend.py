"""The GPU's face: Triton kernels, or a decoded weight and torch's product where there are many tokens.

Held to `plain` in Triton's interpreter and compiled for real targets by the tests; its speed has not been measured on a device
yet, so FUSED is an assumption. Saved for backward are inputs, codes and codebooks, never the weight. The gradient of codebooks
is added up by atomic operations, whose order varies: with `torch.use_deterministic_algorithms(True)` gradients are plain torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.core.layout import Cut
from rpq_convert.kernels import reference
from rpq_convert.kernels.gpu import products, tiles

FUSED = 64  # tokens up to which the weight is not decoded: each 64 of them would decode it once more

Needs = tuple[bool, ...]


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, cut: Cut) -> Tensor:
    """Return `x W^T + bias`, x [tokens, inputs] of any strides, in x's dtype; sums are float32."""
    if not x.numel():
        return reference.linear(x, codes, codebooks, scales, bias, cut)
    if _recorded(x, codebooks, scales, bias):
        return _Linear.apply(x, codes, codebooks, scales, bias, cut)
    return _linear(x, codes, codebooks, scales, bias, cut)


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor | None, cut: Cut, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs], contiguous, in `dtype`: the plain decode's bits."""
    if _recorded(codebooks, scales):
        return _Decode.apply(codes, codebooks, scales, None, cut, dtype)
    return tiles.decode(codes, codebooks, scales, None, cut, dtype)


def decode_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor, cut: Cut, dtype: torch.dtype
) -> Tensor:
    """Return rows `index` [k] of a weight cut along its inputs: [k, inputs].

    An index that is none fails on the device, as in torch's own embeddings: to raise here would wait for the device.
    """
    index = index.long().contiguous()
    if not index.is_cuda and index.numel() and (int(index.min()) < 0 or int(index.max()) >= cut.n):
        raise IndexError(f"an index is out of range for an embedding of {cut.n} entries")
    if _recorded(codebooks, scales):
        return _Decode.apply(codes, codebooks, scales, index, cut, dtype)
    return tiles.decode(codes, codebooks, scales, index, cut, dtype)


def linear_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, cut: Cut, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) of a linear layer; None where not needed."""
    if not x.numel() or torch.are_deterministic_algorithms_enabled():
        return reference.linear_gradients(gradient, x, codes, codebooks, scales, cut, needs)
    dx = dbooks = dscales = None
    if needs[0] and x.shape[0] > FUSED:
        dx = gradient @ tiles.decode(codes, codebooks, scales, None, cut, x.dtype)
    elif needs[0]:
        over = "rows" if cut.axis == "in" else "columns"
        dx = products.product(gradient, codes, codebooks, cut, over, factors=scales, dtype=x.dtype)
    if needs[1]:
        dbooks = products.book_gradient(gradient, x, codes, codebooks, scales, cut)
    if needs[2]:
        assert scales is not None
        bare = _linear(x, codes, codebooks, None, None, cut, torch.float32)
        dscales = (bare * gradient).sum(0).to(scales.dtype)
    return dx, dbooks, dscales


def decode_gradients(
    gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, cut: Cut, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (codebooks, scales) from that of the weight, or of its rows `index`; None where not needed."""
    if torch.are_deterministic_algorithms_enabled():
        return reference.decode_gradients(gradient, codes, codebooks, scales, index, cut, needs)
    dscales = None
    if needs[1]:
        assert scales is not None
        sums = products.scale_gradient(gradient, codes, codebooks, index, cut)
        dscales = sums if index is None else sums.new_zeros(cut.n).index_add_(0, index, sums)
        dscales = dscales.to(scales.dtype)
    return tiles.decode_gradient(gradient, codes, codebooks, scales, index, cut) if needs[0] else None, dscales


def _linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, cut: Cut,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if x.shape[0] > FUSED:
        weight = tiles.decode(codes, codebooks, scales, None, cut, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    over = "columns" if cut.axis == "in" else "rows"
    return products.product(x, codes, codebooks, cut, over, scales=scales, bias=bias, dtype=dtype or x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Any, bias: Any, cut: Cut) -> Tensor:
        ctx.save_for_backward(x, codes, codebooks, scales, bias)
        ctx.cut = cut
        return _linear(x, codes, codebooks, scales, bias, cut)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, codes, codebooks, scales, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: ordinary operations have one
            return reference.linear_graph(gradient, ctx.saved_tensors, ctx.cut, needs)
        dbias = gradient.sum(0, dtype=torch.float32).to(bias.dtype) if needs[4] else None
        wanted = (needs[0], *needs[2:4])
        dx, dbooks, dscales = linear_gradients(gradient, x, codes, codebooks, scales, ctx.cut, wanted)
        return dx, None, dbooks, dscales, dbias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, codebooks: Tensor, scales: Any, index: Any, cut: Cut, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, codebooks, scales, index)
        ctx.cut = cut
        return tiles.decode(codes, codebooks, scales, index, cut, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        codes, codebooks, scales, index = ctx.saved_tensors
        cut, needs = ctx.cut, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, *reference.decode_graph(gradient, ctx.saved_tensors, cut, needs[1:3]), None, None, None
        dbooks, dscales = decode_gradients(gradient, codes, codebooks, scales, index, cut, needs[1:3])
        return None, dbooks, dscales, None, None, None
