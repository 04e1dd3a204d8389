"""The CPU backend: numba kernels, the fastest of them for a shape, a number of tokens and a dtype.

Shapes and dtypes are those of `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import linear as lookups
from rpq_convert.kernels.cpu.cost import cost, pointwise_cost
from rpq_convert.kernels.cpu.decode import decode, decode_gradients, decode_into_buffer, decode_rows, tiled_linear
from rpq_convert.kernels.cpu.hadamard import rotate
from rpq_convert.kernels.cpu.linear import gradients as linear_gradients
from rpq_convert.kernels.cpu.linear import pointwise
from rpq_convert.kernels.cpu.product import Product

__all__ = [
    "Product",
    "cost",
    "decode",
    "decode_gradients",
    "decode_into_buffer",
    "decode_rows",
    "linear",
    "linear_gradients",
    "pointwise",
    "pointwise_cost",
    "rotate",
]


def linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """Return `x W^T + bias`, x [tokens, inputs]: from codes, or by decoding where that is faster."""
    if x.shape[0] == 1 or cost(layout, x.shape[0], x.dtype) <= 1:
        return lookups.linear(x, codes, codebooks, scales, bias, layout)
    tensors = (x, codebooks, scales, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return lookups.decoded_linear(x, codes, codebooks, scales, bias, layout)
    return tiled_linear(x, codes, codebooks, scales, bias, layout)
