"""The reference backend: coded weights by ordinary torch operations, on every device; the tests hold other backends to it.

All functions are differentiable. The gradients are here once more as functions, for operators, which run where autograd does not
record. Shapes: codes uint8 [stages, blocks, n], of any strides; codebooks [stages, books, 256, dim], of any float dtype (one
stage may lack the first axis); scales [outputs]; x [tokens, inputs].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.core.layout import Layout

Needs = tuple[bool, ...]


def _places(codes: Tensor, books: int) -> Tensor:
    """Return codes [blocks, n] of one stage as rows of its flat table, [n, blocks] int32."""
    blocks = codes.shape[0]
    first = torch.arange(blocks, device=codes.device, dtype=torch.int32) * books // blocks * 256
    return codes.T.int() + first


def matrix(codes: Tensor, codebooks: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return M [n, length] in `dtype`, for however many rows the codes [stages, blocks, n] have."""
    table = codebooks.reshape(layout.stages, layout.books * 256, layout.dim)
    if layout.stages > 1:
        table = table.to(torch.promote_types(table.dtype, torch.float32))  # sums of stages are not rounded on the way
    total = F.embedding(_places(codes[0], layout.books), table[0])  # [n, blocks, dim]
    for stage in range(1, layout.stages):
        total = total + F.embedding(_places(codes[stage], layout.books), table[stage])
    return total.to(dtype).flatten(1)[:, : layout.length]


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs], contiguous, in `dtype`.

    Args:
        codes: uint8 [stages, blocks, n], any strides.
        codebooks: [stages, books, 256, dim] (one stage may lack the axis), of any float dtype.
        scales: [outputs].
    """
    weight = matrix(codes, codebooks, layout, dtype)
    weight = (weight if layout.axis == "in" else weight.T).contiguous()
    return weight if scales is None else weight * scales.to(dtype)[:, None]


def decode_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Return rows `index` [k] of a weight whose sub-vectors run along its inputs: [k, inputs]."""
    rows = matrix(codes[:, :, index], codebooks, layout, dtype)
    return rows if scales is None else rows * scales[index].to(dtype)[:, None]


def linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """Return `x W^T + bias`, x [tokens, inputs], in x's dtype."""
    return F.linear(x, decode(codes, codebooks, scales, layout, x.dtype), None if bias is None else bias.to(x.dtype))


def decode_gradients(
    gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (codebooks, scales) from that of the weight, or of its rows `index`; None where not needed."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    gradient, dbooks, dscales = gradient.to(wide), None, None
    codes = codes if index is None else codes[:, :, index]
    if needs[1]:
        assert scales is not None
        bare = matrix(codes, codebooks, layout, wide)
        dscales = ((bare if layout.axis == "in" else bare.T) * gradient).sum(1)
        if index is not None:
            dscales = torch.zeros(layout.n, dtype=wide, device=gradient.device).index_add_(0, index, dscales)
        dscales = dscales.to(scales.dtype)
    if needs[0]:
        if scales is not None:
            gradient = gradient * (scales if index is None else scales[index]).to(wide)[:, None]
        rows = gradient if layout.axis == "in" else gradient.T  # [n, length]
        points = F.pad(rows, (0, layout.blocks * layout.dim - layout.length)).reshape(-1, layout.dim)
        places = [_places(part, layout.books).reshape(-1) for part in codes]
        grads = [torch.ops.aten.embedding_dense_backward(points, at, layout.books * 256, -1, False) for at in places]
        dbooks = torch.stack(grads).reshape(codebooks.shape).to(codebooks.dtype)
    return dbooks, dscales


def linear_gradients(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (x, codebooks, scales) of a linear layer; None where not needed."""
    dx = gradient @ decode(codes, codebooks, scales, layout, x.dtype) if needs[0] else None
    if not any(needs[1:]):
        return dx, None, None
    return dx, *decode_gradients(gradient.T @ x, codes, codebooks, scales, None, layout, needs[1:])


def needs_graph(gradient: Tensor) -> bool:
    """Whether a backward pass must consist of ordinary operations: a gradient of it is wanted, or vmap looks through it."""
    functorch = torch._C._functorch
    return (
        torch.is_grad_enabled() or functorch.is_legacy_batchedtensor(gradient) or functorch.is_batchedtensor(gradient)
    )


@torch.enable_grad()
def linear_graph(gradient: Tensor, saved: tuple[Any, ...], layout: Layout, needs: Needs) -> tuple[Any, ...]:
    """Return the gradients of `linear`'s arguments with a graph of their own, for when a gradient of them is wanted."""
    x, codes, codebooks, scales, bias = saved
    weight = decode(codes, codebooks, scales, layout, torch.float32)
    wide = gradient.to(weight.dtype)
    inner = [t for t, need in ((codebooks, needs[2]), (scales, needs[3])) if need]
    dw = wide.T @ x.to(weight.dtype)
    grads = iter(torch.autograd.grad(weight, inner, dw, create_graph=True) if inner else ())
    return (
        (wide @ weight).to(x.dtype) if needs[0] else None, None, next(grads) if needs[2] else None,
        next(grads) if needs[3] else None, gradient.sum(0).to(bias.dtype) if needs[4] else None, None,
    )  # fmt: skip


@torch.enable_grad()
def decode_graph(
    gradient: Tensor, saved: tuple[Any, ...], layout: Layout, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of (codebooks, scales) of a decode of `saved`: codes, codebooks, scales, index; with a graph too."""
    codes, codebooks, scales, index = saved
    weight = decode(codes, codebooks, scales, layout, torch.float32)
    weight = weight if index is None else weight[index]
    inner = [t for t, need in zip((codebooks, scales), needs) if need]
    grads = iter(torch.autograd.grad(weight, inner, gradient.to(weight.dtype), create_graph=True))
    return next(grads) if needs[0] else None, next(grads) if needs[1] else None
