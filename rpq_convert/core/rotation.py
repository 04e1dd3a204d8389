"""Rotation: an orthogonal block-Hadamard transform of a weight's inputs, which spreads outliers over their block.

Codes then describe `W R^T`, and a layer rotates its inputs instead of its weight: `W x = (W R^T)(R x)`. R is the Hadamard matrix
of `size` (Sylvester's), its columns with signs, the same for each run of `size` inputs; as it is fixed, nothing is stored. By sums
and differences it costs a layer `log2(size) / outputs` of a dense product (Ashkboos et al. 2024, arXiv:2404.00456, rotate
whole models instead, which only some architectures allow).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LEAST = 8  # smallest block that is worth a transform


def fitting(size: int, inputs: int) -> int:
    """Return the largest power of two up to `size` that divides the inputs; 0 where that is too small to serve."""
    found = min(1 << (size.bit_length() - 1), inputs & -inputs) if size > 0 else 0
    return found if found >= LEAST else 0


def signs(size: int) -> list[float]:
    """Return the fixed signs of a block's inputs, from a hash (Wellons' lowbias32): the same everywhere and for ever."""

    def mixed(i: int) -> int:
        i = (i ^ i >> 16) * 0x7FEB352D & 0xFFFFFFFF
        i = (i ^ i >> 15) * 0x846CA68B & 0xFFFFFFFF
        return i ^ i >> 16

    return [1.0 if mixed(i) & 1 else -1.0 for i in range(1, size + 1)]


@functools.lru_cache(64)
def matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return R [size, size]."""
    turn = torch.ones(1, 1, dtype=torch.float64)
    while len(turn) < size:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    turn = turn / math.sqrt(size) * torch.tensor(signs(size), dtype=torch.float64)
    with torch.inference_mode(False):  # kept, and so used where gradients are recorded
        return turn.to(dtype).to(device)


def rotate(x: Tensor, size: int, *, back: bool = False) -> Tensor:
    """Return `R x` along the last axis, or `R^T x` with `back`; the same for size 0. Differentiable.

    In operations that torch's tracers and transforms see; what layers multiply is rotated faster by `kernels/hadamard.py`.
    """
    if not size:
        return x
    if torch.compiler.is_compiling():  # a graph holds operations, not a tensor that this process keeps
        return _steps(x, size, back)
    turn = matrix(size, x.dtype, x.device)
    return (x.reshape(-1, size) @ (turn if back else turn.T)).reshape(x.shape)


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
