"""One codebook on a line (dim 1): dynamic programming, then Lloyd on the sorted values."""

from __future__ import annotations

import numpy as np

from rpq_convert.core.elementary import power
from rpq_convert.core.reproducible import is_reproducible
from rpq_convert.fit.loops.line import line_start, prefix_sums
from rpq_convert.fit.loops.nearest import CODEWORDS
from rpq_convert.fit.problem import Group

PIECES = 1024  # pieces of the line between which dynamic programming may cut


def fit_line(group: Group) -> np.ndarray:
    """Fit one codebook [256, 1] on a line: dynamic programming over 1024 pieces, then Lloyd on all sorted values."""
    values, weights = group.columns[0], group.weights[0]
    if weights.size > 1:
        order = np.argsort(values, kind="stable" if is_reproducible() else None)  # of equal ones the weights differ
        values, weights = values[order], weights[order]
        keep = weights > 0
        if not keep.all():
            values, weights = values[keep], weights[keep]
    else:
        values = np.sort(values)
    prefix = np.empty((3, values.size + 1))  # of w, w x, w x^2
    prefix_sums(values, weights, prefix)
    cuts = _pieces(values)  # [M + 1] positions
    at = np.ascontiguousarray(prefix[:, cuts])
    starts = line_start(at[0], at[1], at[2], min(CODEWORDS, cuts.size - 1))
    edges = np.unique(cuts[starts])  # first position of every cell
    for _ in range(200):
        ends = np.r_[edges[1:], values.size]
        w, f = prefix[0, ends] - prefix[0, edges], prefix[1, ends] - prefix[1, edges]
        # A cell's mean by prefix sums may leave the cell by rounding where the cell is narrow.
        means = np.clip(f / w, values[edges], values[ends - 1])
        middle = 0.5 * (means[1:] + means[:-1])
        moved = np.unique(np.r_[0, np.searchsorted(values, middle.astype(np.float32), side="left")])
        moved = moved[moved < values.size]
        if np.array_equal(moved, edges):
            break
        edges = moved
    codebook = np.full((CODEWORDS, 1), means[-1], np.float32)
    codebook[: means.size, 0] = means
    return codebook


def _pieces(values: np.ndarray) -> np.ndarray:
    """Cut sorted values where an optimal fine quantiser would: density^(1/3) per piece (Panter and Dite 1951).

    Returns positions [M + 1], 0 first, N last.
    """
    total = values.size
    knots = np.unique(np.r_[np.linspace(0, total, 4097).astype(np.int64)[:-1], total - 1])
    # Beside the quantiles a linear grid, so that a long thin tail has pieces of its own.
    grid = np.linspace(float(values[0]), float(values[-1]), 2049)[1:-1]
    knots = np.unique(np.r_[knots, np.searchsorted(values, grid.astype(np.float32))])
    knots = knots[knots < total]
    at = values[knots].astype(np.float64)
    share = power(np.diff(knots), 1 / 3) * power(np.diff(at), 2 / 3)
    level = np.r_[0.0, np.cumsum(share)]
    if level[-1] <= 0:
        return np.array([0, total], np.int64)
    wanted = np.linspace(0, level[-1], PIECES + 1)
    cuts = np.interp(wanted, level, knots.astype(np.float64)).astype(np.int64)
    # Whole values only: equal values never fall into two pieces.
    cuts = np.searchsorted(values, values[np.minimum(cuts, total - 1)], side="left")
    tail = max(0, total - 64)
    return np.unique(np.r_[0, np.arange(min(64, total)), cuts, np.arange(tail, total), total])
