"""Scales: what rows and columns of a weight are divided by before they are coded, and how that is stored."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from rpq_convert.core.axes import WeightView
from rpq_convert.core.reproducible import geometric_mean, mean, norm, total
from rpq_convert.core.results import Statistics
from rpq_convert.core.spec import DTYPES
from rpq_convert.errors import EncodeError
from rpq_convert.fit.matrix import PART, Matrix, step_of
from rpq_convert.planning.plan import Job

SQUARED = 1e15  # float32 holds the squares of numbers up to this far from one, and sums of them


def row_scales(view: WeightView, dense: Tensor, over: Tensor | None = None) -> Tensor:
    """Return the root mean square of each output row in fp32, in a shape that broadcasts over the tensor.

    Args:
        over: [inputs], what rows are divided by before.
    """
    inputs = [i for i, a in enumerate(view.axes) if a not in ("out", "expert") and dense.shape[i] != 1]
    root = math.sqrt(math.prod(dense.shape[i] for i in inputs))
    out = view.axes.index("out")
    step = max(1, PART * dense.shape[out] // max(1, dense.numel()))
    parts = (part.float() for part in torch.split(dense, step, out))
    if over is not None:
        row = view.from_matrix(over[None], tuple(1 if i == out else n for i, n in enumerate(dense.shape)), "in")
        parts = (part / row for part in parts)
    norms = [_size(p, inputs, root) if inputs else p.abs() for p in parts]
    return torch.cat(norms, out)


def _size(part: Tensor, inputs: list[int], root: float) -> Tensor:
    """Return the root mean square of rows; in float64 where float32 holds no squares of them."""
    found = norm(part, inputs) / root
    far = ~((found >= 1 / SQUARED) & (found <= SQUARED))
    if not bool(far.any()):
        return found
    exact = (total(part.double().square(), inputs, keepdim=True) / root**2).sqrt()
    return torch.where(far, exact.to(found.dtype), found)


# How far codewords may be shifted below the weights that they stand for, as a power of two: float16 then still has steps of
# 2^-8 of a row's scale.
SHIFTS = {"float16": 16, "bfloat16": 64, "float32": 64, "float64": 64}
ULPS = 4  # the least scale, in steps of its dtype


def stored_scales(job: Job, scales: Tensor) -> Tensor:
    """Return the row scales as they are stored. Where some are too small for their dtype, codewords take over a power of two.

    Raises:
        EncodeError: they are still too small, or too large.
    """
    dtype = DTYPES[job.spec.scales or "float32"]
    if not torch.isfinite(scales.to(dtype)).all():
        raise EncodeError(f"{job.name}: a row scale overflows {job.spec.scales}; use scales='float32'")
    about = torch.finfo(dtype)
    least = about.tiny * about.eps * ULPS
    held = scales[scales > 0]
    if held.numel() and float(held.min()) < least:
        wanted = math.ceil(math.log2(least / float(held.min())))
        room = math.floor(math.log2(about.max / float(held.max()))) - 1
        shift = max(0, min(wanted, room, SHIFTS.get(job.spec.codebook_dtype, 0)))
        scales = scales * 2.0**shift
        if float(held.max()) * 2.0**shift < least:
            raise EncodeError(f"{job.name}: row scales underflow {job.spec.scales}; use scales='float32'")
    return scales.to(dtype)


def divisors(job: Job, exact: Tensor) -> Tensor:
    """Return what the matrix is divided by, as `Matrix` takes it: its row scales, where they are not zero."""
    view, over = job.weight_view, torch.where(exact > 0, exact, 1.0)
    if job.spec.axis == "in":
        return over.reshape(-1, 1)
    if "expert" in view.axes[1:]:  # rows of an expert are not side by side
        return view.to_matrix(over.expand(job.shape), "out")
    return over.reshape(-1, job.shape[view.axes.index("out")])


# Without statistics a column of large weights is taken to meet quiet inputs, so its steps may be larger: by the root of its size
# relative to its rows'. SmolLM2 at 4 bits, all layers but the table: divergence .247 -> .184; by the whole size .439.
TRUST, TURNS = 0.5, 8
FAR = 64.0  # the most that the scale of an input may differ from the others'


def input_scales(matrix: Matrix, statistics: Statistics | None) -> Tensor:
    """Return what the weights [outputs, inputs] of each input are divided by before they are coded with even steps."""
    from rpq_convert.fit.gptq import step_sizes  # numba: imported on use

    if statistics is not None and statistics.hessian.ndim == 2:
        return step_sizes(statistics.hessian).clamp(1 / FAR, FAR)
    rows = torch.ones(len(matrix), 1, dtype=torch.float64)
    columns = torch.zeros(matrix.shape[1], dtype=torch.float64)
    step = step_of(matrix.shape[1])
    for _ in range(TURNS):  # as Sinkhorn and Knopp: all rows and all columns of one size
        parts = (part.double().square() for part in matrix.parts(0))
        found = [total(part / size, 0) for part, size in zip(parts, rows.split(step), strict=True)]
        columns = reduce(torch.add, found) / len(matrix)
        over = columns.clamp_min(torch.finfo(torch.float64).tiny)
        rows = torch.cat([mean(part.double().square() / over, 1, keepdim=True) for part in matrix.parts(0)])
        rows = torch.where(rows > 0, rows, 1.0)
    columns = torch.where(columns > 0, columns, 1.0)
    sizes = columns.sqrt() ** TRUST
    return (sizes / geometric_mean(sizes)).clamp(1 / FAR, FAR).float()
