"""Rotation of activations: the block-Hadamard transform of `core.rotation` by sums and differences, in numba.

A block of 64 takes 6 additions a number, where a product with the matrix takes 64 multiply-adds. Four of the six rounds stay within a
register of 16 floats.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from llvmlite import ir
from numba import carray
from numba.extending import intrinsic
from torch import Tensor

from rpq_convert.core import rotation
from rpq_convert.kernels.jit.memory import address_of, fetch_add
from rpq_convert.kernels.jit.threads import COUNT, FIRST, NEXT, Work
from rpq_convert.kernels.jit.vectors import LANES, add, f32x16, load, multiply, store, subtract

CHUNK = 1 << 13  # floats that a thread takes at a time
LANE = 16  # least block
TOTAL = FIRST + 5
X, OUT, FACTORS, SIZE, TAKEN = range(FIRST, TOTAL)
SIXTEEN = LANES[16]


@intrinsic
def within(context, vector):
    """Return the transform of 16 numbers, not scaled."""

    def emit(context, builder, signature, args):
        (value,) = args
        index, none = ir.VectorType(ir.IntType(32), 16), ir.Constant(value.type, ir.Undefined)
        for half in (1, 2, 4, 8):
            other = builder.shuffle_vector(value, none, ir.Constant(index, [i ^ half for i in range(16)]))
            sign = ir.Constant(value.type, [-1.0 if i & half else 1.0 for i in range(16)])
            value = builder.fadd(other, builder.fmul(value, sign))
        return value

    return f32x16(vector), emit


def blocks(data):
    """Transform TAKEN floats, a whole number of blocks, from X to OUT."""
    a, base = carray(data, TOTAL), address_of(data)
    size = a[SIZE]
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        step = max(CHUNK, size)
        for start in range(part * step, min((part + 1) * step, a[TAKEN]), size):
            x, out = a[X] + 4 * start, a[OUT] + 4 * start
            for i in range(0, 4 * size, 64):
                store(out + i, within(multiply(load(x + i, SIXTEEN), load(a[FACTORS] + i, SIXTEEN))))
            half = 64
            while half < 4 * size:
                for first in range(0, 4 * size, 2 * half):
                    for i in range(out + first, out + first + half, 64):
                        u, v = load(i, SIXTEEN), load(i + half, SIXTEEN)
                        store(i, add(u, v))
                        store(i + half, subtract(u, v))
                half *= 2


@functools.lru_cache(64)
def _work(size: int) -> tuple[Work, Any]:
    """Return the work of these blocks, and what must stay alive for it."""
    with torch.inference_mode(False):
        factors = torch.tensor(rotation.signs(size), dtype=torch.float32) / math.sqrt(size)
    return Work(blocks, (0, 0, factors.data_ptr(), size, 0)), factors


def rotate(x: Tensor, size: int) -> Tensor:
    """Return `R x` along the last axis as `rotation.rotate` does, by the kernel where nothing asks for a gradient."""
    if size < LANE or x.dtype != torch.float32 or (torch.is_grad_enabled() and x.requires_grad):
        return rotation.rotate(x, size)
    x = x.contiguous()
    out = torch.empty_like(x)
    work, _kept = _work(size)
    work.run(-(-x.numel() // max(CHUNK, size)), 0, ((X, x.data_ptr()), (OUT, out.data_ptr()), (TAKEN, x.numel())))
    return out
