"""Layout: the shape of a coded matrix, as kernels see it."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A coded matrix M [n, length], whose rows are cut into `blocks` sub-vectors of `dim` numbers; the last may be padded.

    `Spec.layout` is something else: the order in which a file stores codes ("blocks" or "rows"). Kernels get codes with strides
    and read either.

    Args:
        axis: along which the sub-vectors run: "in" (M's rows are outputs, its columns inputs) or "out" (the reverse).
        n: rows of M.
        length: columns of M.
        dim: numbers in a sub-vector.
        books: codebooks of a stage; sub-vector b of a row reads number b * books // blocks.
        stages: codewords that are summed for one sub-vector.
    """

    axis: str
    n: int
    length: int
    dim: int
    books: int
    stages: int

    @property
    def blocks(self) -> int:
        """Sub-vectors in a row."""
        return -(-self.length // self.dim)

    @property
    def inputs(self) -> int:
        return self.length if self.axis == "in" else self.n

    @property
    def outputs(self) -> int:
        return self.n if self.axis == "in" else self.length

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(stages, books, blocks, dim, n), in the order of the kernels' arguments."""
        return self.stages, self.books, self.blocks, self.dim, self.n

    @property
    def room(self) -> int:
        """Floats of scratch that hold one widened codebook."""
        return 256 * self.dim

    @functools.cached_property
    def one_token_times(self) -> tuple[float, float]:
        """The time of one token by (bins, lookups) over that of a dense product, where memory limits neither: an estimate.

        In multiply-adds of a dense product a lookup counts 1.5, an addition to a bin 2.6, an entry of a table 1.2 (measured by
        benchmarks/speed.py on two cores of an AMD EPYC 9004).
        """
        adds, entries = self.n * self.blocks * self.stages, 1.2 * 256 * self.length * self.stages
        return (2.6 * adds + entries) / (self.n * self.length), (1.5 * adds + entries) / (self.n * self.length)
