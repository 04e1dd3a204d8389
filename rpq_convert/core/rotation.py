"""Rotation: an orthogonal block-Hadamard transform of a weight's inputs, which spreads outliers over their block.

Codes then describe `W R^T`, and the layer rotates its inputs: `W x = (W R^T)(R x)`. R is block-diagonal, with blocks of `size`
inputs. A block is Sylvester's Hadamard matrix over sqrt(size), its columns multiplied by fixed signs. R is a function of `size`
alone, so nothing is stored. By sums and differences it costs a layer `log2(size) / outputs` of a dense product.

Source: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) rotates whole models, which only some architectures allow.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rpq_convert.core.axes import WeightView
from rpq_convert.core.reproducible import is_reproducible

LEAST = 8  # smallest block that is worth a transform


def fitting(size: int, inputs: int) -> int:
    """Return the largest power of two up to `size` that divides the number of inputs; 0 where it is below LEAST."""
    found = min(1 << (size.bit_length() - 1), inputs & -inputs) if size > 0 else 0
    return found if found >= LEAST else 0


def signs(size: int) -> list[float]:
    """Return the signs, 1.0 or -1.0, of a block's `size` inputs, from a hash (Wellons' lowbias32): they never change."""

    def mixed(i: int) -> int:
        i = (i ^ i >> 16) * 0x7FEB352D & 0xFFFFFFFF
        i = (i ^ i >> 15) * 0x846CA68B & 0xFFFFFFFF
        return i ^ i >> 16

    return [1.0 if mixed(i) & 1 else -1.0 for i in range(1, size + 1)]


@functools.lru_cache(64)
def matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return R [size, size]."""
    transform = torch.ones(1, 1, dtype=torch.float64)
    while len(transform) < size:
        transform = torch.cat([torch.cat([transform, transform], 1), torch.cat([transform, -transform], 1)])
    transform = transform / math.sqrt(size) * torch.tensor(signs(size), dtype=torch.float64)
    with torch.inference_mode(False):  # kept, and so used where gradients are recorded
        return transform.to(dtype).to(device)


def rotate(x: Tensor, size: int, *, back: bool = False) -> Tensor:
    """Return `R x` along the last axis of x [..., inputs], or `R^T x` with `back`; x itself for size 0. Differentiable.

    `size` must divide the inputs. torch's tracers and transforms see the operations. The inputs of layers on the CPU are rotated
    by `kernels/cpu/hadamard.py`, which is faster.
    """
    if not size:
        return x
    if (
        torch.compiler.is_compiling() or is_reproducible()
    ):  # a graph holds operations, not a tensor that this process keeps
        return _steps(x, size, back)
    transform = matrix(size, x.dtype, x.device)
    return (x.reshape(-1, size) @ (transform if back else transform.T)).reshape(x.shape)


def _steps(x: Tensor, size: int, back: bool) -> Tensor:
    """The same as log2(size) sums and differences, which a compiler fuses."""
    sign = torch.tensor(signs(size), dtype=x.dtype, device=x.device)
    y = x.reshape(-1, size) if back else x.reshape(-1, size) * sign
    half = 1
    while half < size:
        pairs = y.reshape(-1, size // (2 * half), 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    y = y.reshape(-1, size) / math.sqrt(size)
    return (y * sign if back else y).reshape(x.shape)


def rotate_weight(weight: Tensor, view: WeightView, size: int) -> Tensor:
    """Return a weight, in its stored shape, with its inputs rotated; 0 for no rotation."""
    if not size:
        return weight
    return view.from_matrix(rotate(view.to_matrix(weight, "in"), size), tuple(weight.shape), "in")
