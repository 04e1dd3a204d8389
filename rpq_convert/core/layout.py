"""Cut: the shape of a coded matrix, as kernels see it."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A coded matrix M [n, length]: rows in `blocks` sub-vectors of `dim`, `books` codebooks, `stages` summed.

    `axis` "in": M's rows are outputs, its columns inputs; "out": the other way round.
    """

    axis: str
    n: int
    length: int
    dim: int
    books: int
    stages: int

    @property
    def blocks(self) -> int:
        return -(-self.length // self.dim)

    @property
    def inputs(self) -> int:
        return self.length if self.axis == "in" else self.n

    @property
    def outputs(self) -> int:
        return self.n if self.axis == "in" else self.length

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.stages, self.books, self.blocks, self.dim, self.n

    @property
    def room(self) -> int:
        """Floats of scratch that hold one widened codebook."""
        return 256 * self.dim

    @functools.cached_property
    def one_token_times(self) -> tuple[float, float]:
        """The time of one token by (bins, lookups) over that of a dense product, roughly, where memory limits neither.

        In multiply-adds of a dense product a lookup counts 1.5, a bin 2.6, a table entry 1.2 (from benchmarks/speed.py, two
        cores of an AMD EPYC 9004).
        """
        adds, entries = self.n * self.blocks * self.stages, 1.2 * 256 * self.length * self.stages
        return (2.6 * adds + entries) / (self.n * self.length), (1.5 * adds + entries) / (self.n * self.length)
