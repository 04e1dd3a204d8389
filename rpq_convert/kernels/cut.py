"""Cut: the shape of a coded matrix, as kernels see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
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
