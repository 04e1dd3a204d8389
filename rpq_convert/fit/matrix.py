"""The matrix that a fit reads, block by block, so that no wide copy of it is in memory.

A weight stays in the dtype of its file. Blocks become float32 and are divided by the row scales when they are read; both are done
number by number, so that a block has the bits that it would have in a copy of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PART = 1 << 19  # numbers of a block, about: they stay in the cache
LANES = 64  # rows or columns that torch sums side by side: with a multiple of them every sum has the order that it has in the whole


def step_of(width: int) -> int:
    """Return how many rows of this width are read at a time."""
    return max(LANES, PART // max(1, width) // LANES * LANES)


@dataclass(frozen=True)
class Matrix:
    """A matrix [n, L] of any float dtype, over scales.

    Args:
        values: [n, L]; any strides.
        scales: what its numbers are divided by, [parts, 1] or [parts, L] fp32: row r has those of part `r * parts // n`.
        inputs: what they are divided by before, [1, L] or [n, 1] fp32.
    """

    values: Tensor
    scales: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def block(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Return rows `top` to `bottom` and columns `left` to `right` in fp32; do not change it, it may be the matrix's memory."""
        found = self.values[top:bottom, left:right].float()
        if self.inputs is not None:
            found = found / (self.inputs[:, left:right] if len(self.inputs) == 1 else self.inputs[top:bottom])
        if self.scales is None:
            return found
        scales = self.scales if self.scales.shape[1] == 1 else self.scales[:, left:right]
        if len(scales) > 1:
            scales = scales[torch.arange(top, min(bottom, len(self))) * len(scales) // len(self)]
        return found / scales

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.block(top, bottom, 0, self.shape[1])

    def columns(self, left: int, right: int) -> Tensor:
        return self.block(0, len(self), left, right)

    def parts(self, axis: int) -> Iterator[Tensor]:
        """Yield blocks of whole rows (axis 0) or whole columns (axis 1), in order, fp32."""
        step = step_of(self.shape[1 - axis])
        take = self.columns if axis else self.rows
        for start in range(0, self.shape[axis], step):
            yield take(start, min(start + step, self.shape[axis]))

    @property
    def whole(self) -> Tensor:
        """All of it, a wide copy."""
        return self.rows(0, len(self))

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The least and the largest number."""
        along = 0 if self.values.stride(0) >= self.values.stride(1) else 1  # as it lies in memory
        found = torch.stack([torch.stack([part.amin(), part.amax()]) for part in self.parts(along)])
        return float(found[:, 0].amin()), float(found[:, 1].amax())  # NaN where there is one
