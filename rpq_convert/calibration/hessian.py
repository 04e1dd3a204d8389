"""The Hessian X^T X of what a weight multiplies, and the cross-moment D^T X with the dense model's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


class Hessian:
    """Sums over the inputs x of one weight, in fp64: `sum x x^T` of each part that has inputs of its own.

    `cross` is the cross-moment `sum d x^T`, where d is what the dense model's weight multiplies in place of x; None without it.
    `rows` counts the input vectors.
    """

    def __init__(self) -> None:
        self.parts: dict[int, Tensor] = {}
        self.cross: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor, part: int = 0) -> None:
        """Add input vectors [rows, inputs] of a part."""
        found = gram(x.float()).double()
        self.parts[part] = self.parts[part].add_(found) if part in self.parts else found
        self.rows += len(x)

    def add_cross(self, dense: Tensor, x: Tensor) -> None:
        """Add pairs of input vectors, both [rows, inputs]: the dense model's, and the converted model's in their place."""
        found = (dense.float().T @ x.float()).double()
        self.cross = found if self.cross is None else self.cross.add_(found)

    def matrix(self, parts: int = 1) -> Tensor | None:
        """Return `sum x x^T` [inputs, inputs], or [parts, inputs, inputs] with zeros for parts that were not reached.

        None where no part was reached.
        """
        if not self.parts:
            return None
        zero = torch.zeros_like(next(iter(self.parts.values())))
        return torch.stack([self.parts.get(p, zero) for p in range(parts)]) if parts > 1 else self.parts[0]


PANEL = 192  # inputs


def gram(x: Tensor) -> Tensor:
    """Return `x^T x` [inputs, inputs] of vectors [rows, inputs], each pair of panels multiplied once."""
    inputs = x.shape[1]
    if inputs < 2 * PANEL:
        return x.T @ x
    found = x.new_empty(inputs, inputs)
    for start in range(0, inputs, PANEL):
        panel = slice(start, start + PANEL)
        part = found[panel, start:] = x[:, panel].T @ x[:, start:]
        found[start:, panel] = part.T
    return found
