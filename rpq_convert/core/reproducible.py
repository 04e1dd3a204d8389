"""Reproducible: fits whose bytes are the same on every processor.

Processors differ in three ways: which instructions a library chooses, in how many lanes it adds, and how it rounds functions such as a
logarithm. A reproducible fit uses only operations that IEEE 754 rounds in one way (+, -, *, /, square root), in an order that is written
down: sums are numpy's pairwise ones over float64, compiled loops fuse and reorder nothing (`fit/loops/forms.py`), and no matrix unit is used.

What costs nothing is always done so (`core/elementary.py`); the rest inside `reproducible(True)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

from rpq_convert.core.elementary import LN2, exp2, log2

_asked: ContextVar[bool] = ContextVar("reproducible", default=False)


@contextmanager
def reproducible(asked: bool) -> Iterator[None]:
    """Let what this thread computes inside be the same on every processor, or not."""
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)


def is_reproducible() -> bool:
    return _asked.get()


def total(x: Tensor, dim: int | Sequence[int] | None = None, *, keepdim: bool = False) -> Tensor:
    """Return the sum of numbers over axes, all by default, in float64."""
    if not is_reproducible():
        return x.sum(dim if dim is None or isinstance(dim, int) else list(dim), keepdim=keepdim, dtype=torch.float64)
    axes = sorted(range(x.ndim) if dim is None else {d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)})
    others = [i for i in range(x.ndim) if i not in axes]
    rows = x.permute(*others, *axes).double().reshape(*(x.shape[i] for i in others), -1).contiguous()
    found = torch.from_numpy(np.asarray(np.add.reduce(rows.numpy(), -1)))
    return found.reshape([1 if i in axes else n for i, n in enumerate(x.shape)]) if keepdim else found


def mean(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """Return the mean of numbers over an axis, in their own dtype."""
    if not is_reproducible():
        return x.mean(dim, keepdim=keepdim)
    return (total(x, dim, keepdim=keepdim) / x.shape[dim]).to(x.dtype)


def norm(x: Tensor, dim: Sequence[int]) -> Tensor:
    """Return the root of the sum of squares over axes, which stay with length 1, in float32."""
    if not is_reproducible():
        found: Tensor = torch.linalg.vector_norm(x, dim=list(dim), keepdim=True)
        return found
    return total(x.double().square(), dim, keepdim=True).sqrt_().to(x.dtype)


GROUP = 32  # numbers whose product's logarithm is taken: at least 2^-32, as each is at least a half


def total_log(x: Tensor) -> float:
    """Return the sum of the natural logarithms of positive numbers."""
    if not is_reproducible():
        return float(x.log().sum(dtype=torch.float64))
    parts, powers = np.frexp(x.double().reshape(-1).numpy())
    padded = np.concatenate([parts, np.ones(-len(parts) % GROUP)]).reshape(GROUP, -1)
    product = padded[0]
    for row in padded[1:]:
        product = product * row
    return float((int(powers.sum(dtype=np.int64)) + np.add.reduce(log2(product))) * LN2)


def geometric_mean(x: Tensor) -> Tensor | float:
    """Return the geometric mean of positive numbers."""
    return float(exp2(total_log(x) / LN2 / x.numel())) if is_reproducible() else x.log().mean().exp()
