"""A fitting problem: the matrix, scaled and checked, and the points that a codebook is fitted on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from rpq_convert.core.reproducible import is_reproducible, mean, total
from rpq_convert.fit.loops.kmeans import accumulate, distinct, gather
from rpq_convert.fit.loops.nearest import CODEWORDS, blank, nearest
from rpq_convert.fit.matrix import Matrix, step_of
from rpq_convert.fit.result import check_layout

# the farthest, each with the weight of a sampled point. A 20 sigma weight survives in 8 M Gaussian pairs for 1.6 % more
# error than with a single one; 256 cost 4.4 %, and 2.9 % (64) or 7.8 % (256) on a sample half as large.
EXTREMES = 64
HEAD = 320  # rows that are looked at first for more than 256 distinct sub-vectors
CHUNK = 1 << 17  # points gathered at a time
Importance = torch.Tensor | Literal["size"] | None


@dataclass(frozen=True)
class Problem:
    """Hold a checked, scaled fitting problem."""

    matrix: Matrix  # [n, L], as given
    importance: torch.Tensor | None  # expanded to [n, L], largest 1
    per_coordinate: bool  # importance differs inside some sub-vector
    scale: float  # a power of two; points are matrix * scale, at most 1 in size
    dim: int
    books: int
    blocks: int
    size_weight: float = (
        0.0  # importance "size": what the mean square of a scaled sub-vector adds to an importance of 1
    )

    def block_range(self, book: int) -> tuple[int, int]:
        """Return the first block that reads `book` and the one after the last."""
        return -(-book * self.blocks // self.books), -(-(book + 1) * self.blocks // self.books)

    def spans(self, book: int) -> Iterator[tuple[int, int]]:
        """Divide the sub-vectors of a codebook into ranges of about CHUNK points; a padded last one is a range of its own."""
        low, high = self.block_range(book)
        tail = high == self.blocks and self.matrix.shape[1] % self.dim != 0
        step = max(1, CHUNK // self.matrix.shape[0])
        for start in range(low, high - tail, step):
            yield start, min(start + step, high - tail)
        if tail:
            yield high - 1, high

    def points(self, low: int, high: int) -> np.ndarray:
        """Gather the sub-vectors of a span, block-major: [r, m n], r = dim or less in the tail block."""
        columns = self.matrix.columns(low * self.dim, min(high * self.dim, self.matrix.shape[1]))
        return gather_points(columns, 0, high - low, self.dim, self.scale)

    def weights(self, low: int, high: int) -> np.ndarray:
        """Gather a span's importance: [1, 1] (none), [1, m n] or [r, m n]."""
        if self.size_weight:
            return 1 + np.float32(self.size_weight) * np.square(self.points(low, high)).mean(0, keepdims=True)
        if self.importance is None:
            return ONE
        weights = gather_points(self.importance, low, high, self.dim)
        return weights if self.per_coordinate else np.ascontiguousarray(weights[:1])


@dataclass(frozen=True)
class Group:
    """Hold points with r coordinates, both ways round: distances read columns, sums read rows."""

    columns: np.ndarray  # [r, N] fp32
    weights: np.ndarray  # [1, 1], [1, N] or [r, N]

    @cached_property
    def rows(self) -> np.ndarray:  # [N, r]
        return np.ascontiguousarray(self.columns.T)

    @cached_property
    def row_weights(self) -> np.ndarray:  # [1, 1], [N, 1] or [N, r]
        return np.ascontiguousarray(self.weights.T)

    def less(self, offset: np.ndarray) -> Group:
        """Return the points less offset [dim]."""
        columns = blank(self.columns.shape)
        return Group(np.subtract(self.columns, offset[: len(columns), None], out=columns), self.weights)

    def take(self, index: np.ndarray) -> Group:
        weights = self.weights if self.weights.shape[1] == 1 else self.weights[:, index]
        return Group(np.ascontiguousarray(self.columns[:, index]), weights)

    def nearest(self, codebook: np.ndarray, *, quick: bool = False) -> np.ndarray:
        """Return codes [N] under codebook [256, dim]."""
        r = self.columns.shape[0]
        return nearest(self.columns, self.weights if self.weights.shape[0] > 1 else None, codebook[:, :r], quick=quick)

    def add_to(self, codes: np.ndarray, sums: np.ndarray, mass: np.ndarray) -> None:
        """Add each point, times its weight, to its codeword's sum [256, dim] and the weight to its mass [256, dim]."""
        r = self.rows.shape[1]
        part, part_mass = np.zeros((CODEWORDS, r)), np.zeros((CODEWORDS, r))
        accumulate(self.rows, self.row_weights, codes, part, part_mass)
        sums[:, :r] += part
        mass[:, :r] += part_mass if self.row_weights.shape[1] > 1 else part_mass[:, :1]


ONE = np.ones((1, 1), np.float32)


def gather_points(values: torch.Tensor, low: int, high: int, dim: int, scale: float = 1.0) -> np.ndarray:
    n, length = values.shape
    r = min(high * dim, length) - (high - 1) * dim  # less than dim in the tail block, which is alone
    points = blank((r, (high - low) * n))
    down, across = (4 * step for step in values.stride())
    gather(values.data_ptr() + across * low * dim, down, across, n, np.float32(scale), points)
    return points


def make_problem(
    matrix: torch.Tensor | Matrix, importance: Importance, *, dim: int, books: int, stages: int
) -> Problem:
    """Check a fitter's arguments and scale the matrix; ValueError where no fit is possible."""
    matrix = matrix if isinstance(matrix, Matrix) else Matrix(matrix.detach().to("cpu"))
    blocks = check_layout(matrix.values, dim=dim, books=books, stages=stages)
    least, most = matrix.extremes
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("the matrix has NaN or infinite entries; a codeword cannot stand for them")
    largest = max(-least, most)
    # Squares of values below 2^-75 vanish in fp32, so the largest magnitude is brought near 1.
    scale = 2.0 ** -max(-120, min(120, math.frexp(largest)[1])) if largest > 0 else 1.0
    if isinstance(importance, str):
        if importance != "size":
            raise ValueError(f"importance must be 'size' or a tensor, not {importance!r}")
        problem = Problem(matrix, None, False, scale, dim, books, blocks)
        spans = [span for book in range(books) for span in problem.spans(book)]
        square = sum(float(np.square(problem.points(*s)).sum(dtype=np.float64)) for s in spans) / max(
            1, matrix.values.numel()
        )
        return replace(problem, size_weight=1 / square if square > 0 else 0.0)
    if importance is not None:
        importance = importance.detach().to(device="cpu", dtype=torch.float32)
        least, most = float(importance.amin()), float(importance.amax())
        if not (math.isfinite(least) and math.isfinite(most) and least >= 0):
            raise ValueError(f"importance must be finite and not negative, got values from {least} to {most}")
        importance = (importance / most).expand(matrix.shape) if most > 0 else None
    problem = Problem(matrix, importance, False, scale, dim, books, blocks)
    if importance is None or dim == 1 or importance.stride(1) == 0:
        return problem
    for book in range(books):
        for low, high in problem.spans(book):
            weights = gather_points(importance[:1] if importance.stride(0) == 0 else importance, low, high, dim)
            if (weights != weights[:1]).any():
                return Problem(matrix, importance, True, scale, dim, books, blocks)
    return problem


def generator(seed: int, *path: int) -> np.random.Generator:
    """Return a generator of its own for a part of a fit."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**63, *path])))


def fit_distinct(problem: Problem, book: int, codes: np.ndarray) -> np.ndarray | None:
    """Return the distinct sub-vectors [256, dim] of a book and write their codes, or None where there are more."""
    if (
        problem.matrix.shape[0] > 2 * HEAD
        and fit_distinct(replace(problem, matrix=Matrix(problem.matrix.rows(0, HEAD))), book, codes) is None
    ):
        return None  # as nearly always
    table = np.zeros((CODEWORDS, problem.dim), np.float32)
    slots = np.full(1024, -1, np.int32)
    count = 0
    for low, high in problem.spans(book):
        points = problem.points(low, high)
        if points.shape[0] < problem.dim:
            points = np.pad(points, ((0, problem.dim - points.shape[0]), (0, 0)))
        numbers = np.empty(points.shape[1], np.uint8)
        count = distinct(points, table, slots, count, numbers)
        if count > CODEWORDS:
            return None
        codes[low:high, : len(problem.matrix)] = numbers.reshape(high - low, -1)
    return table


def collect(problem: Problem, book: int, *, full: int, sample: int, rng: np.random.Generator) -> list[Group]:
    """Gather what a codebook is fitted on: everything up to `full` points, else a stratified sample and the extremes.

    At most two groups come back: whole sub-vectors, and those of a tail block.
    """
    n = problem.matrix.shape[0]
    low, high = problem.block_range(book)
    rate = 1.0 if n * (high - low) <= full else sample / (n * (high - low))
    centre = 0.0
    if rate < 1:
        rows = _row_means(problem.matrix, low * problem.dim, min(high * problem.dim, problem.matrix.shape[1]))
        centre = float(total(rows) / len(rows)) * problem.scale  # fp64 means of fp32 rows: no wide copy
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # r -> [(columns, weights)]
    far: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}  # r -> [(columns, weights, distances)]
    for span in problem.spans(book):
        points, weights = problem.points(*span), problem.weights(*span)
        r, many = points.shape
        if rate < 1:
            distance = ((points - np.float32(centre)) ** 2 * weights).sum(0)
            top = _farthest(points, distance)
            far.setdefault(r, []).append((points[:, top], _take(weights, top), distance[top]))
            count = math.ceil(many * rate)
            index = ((np.arange(count) + rng.random(count)) * (many / count)).astype(np.int64).clip(0, many - 1)
            points, weights = points[:, index], _take(weights, index)
        parts.setdefault(r, []).append((points, weights))
    groups = []
    for r, found in parts.items():
        if r in far:
            points = _joined([p for p, _, _ in far[r]])
            distance = np.concatenate([d for _, _, d in far[r]])
            weights = _joined([w for _, w, _ in far[r]])
            top = _farthest(points, distance)
            found = [*found, (points[:, top], _take(weights, top))]
        groups.append(Group(_joined([p for p, _ in found]), _joined([w for _, w in found])))
    return groups


def _row_means(matrix: Matrix, left: int, right: int) -> torch.Tensor:
    """Return the fp32 mean of every row's columns `left` to `right`."""
    step = step_of(right - left)
    starts = range(0, len(matrix), step)
    return torch.cat([mean(matrix.block(i, min(i + step, len(matrix)), left, right), 1) for i in starts])


def _farthest(points: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the sorted indices of the EXTREMES largest distances and of every coordinate's least and largest."""
    keep = min(EXTREMES, distance.size)
    top = largest(distance, keep)
    return np.unique(np.concatenate([top, points.argmin(1), points.argmax(1)]))


def largest(values: np.ndarray, keep: int) -> np.ndarray:
    """Return the indices of the `keep` largest numbers, in no order."""
    if is_reproducible():  # of equal ones the first, whatever the library's way of choosing
        return np.argsort(-values, kind="stable")[:keep]
    return np.argpartition(values, values.size - keep)[values.size - keep :]


def _take(weights: np.ndarray, index: np.ndarray) -> np.ndarray:
    return weights if weights.shape[1] == 1 else weights[:, index]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 or parts[0].shape == (1, 1) else np.concatenate(parts, axis=1)


def round_codebooks(codebooks: np.ndarray, problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """Undo the scaling and round; returns the codebooks in `dtype` and the rounded values, scaled, in fp32."""
    scale = np.float32(problem.scale)  # a power of two: nothing else is rounded
    rounded = torch.from_numpy(codebooks / scale).to(dtype)
    near = rounded.float().numpy() * scale
    if not np.isfinite(near).all():
        largest = float(np.abs(codebooks).max()) / problem.scale
        raise ValueError(f"codewords as large as {largest:.3g} do not fit {dtype}; use bfloat16 or float32")
    return rounded, near
