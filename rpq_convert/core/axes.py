"""A parameter read as a matrix, and back.

Every layer type stores its weight with axes in an order of its own. A `WeightView` names those axes, and from the names
alone follows how the parameter becomes the matrix `M [n, L]` whose rows are cut into sub-vectors. So a new layer type is
a string, not code. Axis names: `out` is the output axis (an embedding's entries), `expert` counts independent matrices
(fused mixture-of-experts weights), every other name is an input axis (channels, kernel positions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

AXES = ("out", "in")


@dataclass(frozen=True)
class WeightView:
    """Names of a parameter's stored axes, and the axis that is cut by default.

    Args:
        names: the stored axes in order, separated by spaces, e.g. `"out in kh kw"`.
        axis: what is cut into sub-vectors: `"out"` (rows of `M` are input positions, `L` the outputs) or `"in"` (rows
            are outputs, `L` all the input positions).

    Example:
        >>> WeightView("out in kh kw").matrix_shape((64, 3, 7, 7), "out")
        (147, 64)
    """

    names: str
    axis: str = "out"

    def __post_init__(self) -> None:
        if self.axes.count("out") != 1:
            raise ValueError(f"view {self.names!r} must name the axis 'out' exactly once")
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"view {self.names!r} names an axis twice")
        check_axis(self.axis)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.names.split())

    @property
    def inner(self) -> WeightView:
        """The view of what one index into the first axis leaves."""
        return WeightView(" ".join(self.axes[1:]), self.axis)

    def order(self, axis: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the stored axes that make the rows and those that make the columns of `M`."""
        check_axis(axis)
        cut = [i for i, a in enumerate(self.axes) if (a == "out" if axis == "out" else a not in ("out", "expert"))]
        rows = [i for i in range(len(self.axes)) if i not in cut]
        return tuple(rows), tuple(cut)

    def matrix_shape(self, shape: tuple[int, ...], axis: str) -> tuple[int, int]:
        """Return `(n, L)` for a parameter of this stored shape."""
        self.check(shape)
        rows, cut = self.order(axis)
        return math.prod([shape[i] for i in rows]), math.prod(
            [shape[i] for i in cut]
        )  # lists: torch.compile traces this

    def to_matrix(self, tensor: Tensor, axis: str) -> Tensor:
        """Return `M [n, L]`; a view of the tensor's memory where strides allow."""
        rows, cut = self.order(axis)
        return tensor.permute(rows + cut).reshape(self.matrix_shape(tuple(tensor.shape), axis))

    def from_matrix(self, matrix: Tensor, shape: tuple[int, ...], axis: str) -> Tensor:
        """Return the parameter in its stored shape, contiguous; the inverse of `to_matrix`."""
        rows, cut = self.order(axis)
        order = rows + cut
        back = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([shape[i] for i in order]).permute(back).contiguous()

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one scale per output row (and expert), input axes left out."""
        return tuple(s for s, a in zip(shape, self.axes) if a in ("out", "expert"))

    def spread_scales(self, scales: Tensor) -> Tensor:
        """Return the scales with the input axes put back as 1, so that they broadcast over the stored parameter."""
        sizes = iter(scales.shape)
        return scales.reshape([next(sizes) if a in ("out", "expert") else 1 for a in self.axes])

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != len(self.axes):
            raise ValueError(
                f"view {self.names!r} has {len(self.axes)} axes, the parameter {tuple(shape)} {len(shape)}"
            )


def check_axis(axis: str) -> None:
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}, not {axis!r}")
