"""k-means: one codeword per sub-vector.

Seeding decides (k-means on a random sample clips the few largest weights, and they are what a language model lives on),
so: the fit sees every point of a codebook up to FULL of them, else a stratified sample plus the extremes; k-means++ for
dim <= 8; and after Lloyd's iterations `relocate` moves the cheapest codewords to the worst points as long as the error
must fall. A line (dim 1) is solved by dynamic programming and refined on the sorted values instead.

Points whose last coordinates are padding are a group of their own with fewer coordinates: they pull, and are judged by,
the coordinates they have. Values are scaled by a power of two first, so no weight can overflow a square.

Not used: a quota of seeds among the largest points (it spends codewords on Gaussian weights, which need no such care).
Seeding on half of 4096 points was 1.5 % worse where rows differ in size. Not tried: minibatch k-means.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from rpq_convert.fit.random import Fitted, check_layout, count_dead
from rpq_convert.kernels.kmeans import (
    accumulate,
    distinct,
    errors_of,
    gather,
    line_start,
    move_to_means,
    neighbours,
    prefix_sums,
    regroup,
    seed_plus_plus,
)
from rpq_convert.kernels.nearest import CODEWORDS, blank, nearest

FULL = 1 << 18  # a codebook with at most so many points is fitted on all of them
SAMPLE = 1 << 18  # else on about so many of them, plus
# the farthest, each with the weight of a sampled point. A 20 sigma weight survives in 8 M Gaussian pairs for 1.6 % more
# error than with a single one; 256 cost 4.4 %, and 2.9 % (64) or 7.8 % (256) on a sample half as large.
EXTREMES = 64
LINE = 1 << 21  # the same for dim 1, where a fit is one sort
HEAD = 320  # rows that are looked at first for more than 256 distinct sub-vectors
CHUNK = 1 << 17  # points gathered at a time
ITERATIONS = 25
PIECES = 1024  # pieces of the line between which dynamic programming may cut


Importance = torch.Tensor | Literal["size"] | None


@dataclass(frozen=True)
class Problem:
    """Hold a checked, scaled fitting problem."""

    matrix: torch.Tensor  # [n, L] fp32, as given
    importance: torch.Tensor | None  # expanded to [n, L], largest 1
    per_coordinate: bool  # importance differs inside some sub-vector
    scale: float  # a power of two; points are matrix * scale, at most 1 in size
    dim: int
    books: int
    blocks: int
    care: float = 0.0  # importance "size": what the mean square of a scaled sub-vector adds to an importance of 1

    def block_range(self, book: int) -> tuple[int, int]:
        """Return the first block that reads `book` and the one after the last."""
        return -(-book * self.blocks // self.books), -(-(book + 1) * self.blocks // self.books)

    def spans(self, book: int) -> Iterator[tuple[int, int]]:
        """Cut the blocks of a book into ranges of about CHUNK points; a tail block is a range of its own."""
        low, high = self.block_range(book)
        tail = high == self.blocks and self.matrix.shape[1] % self.dim != 0
        step = max(1, CHUNK // self.matrix.shape[0])
        for start in range(low, high - tail, step):
            yield start, min(start + step, high - tail)
        if tail:
            yield high - 1, high

    def points(self, low: int, high: int) -> np.ndarray:
        """Gather the sub-vectors of a span, block-major: [r, m n], r = dim or less in the tail block."""
        return gather_points(self.matrix, low, high, self.dim, self.scale)

    def weights(self, low: int, high: int) -> np.ndarray:
        """Gather a span's importance: [1, 1] (none), [1, m n] or [r, m n]."""
        if self.care:
            return 1 + np.float32(self.care) * np.square(self.points(low, high)).mean(0, keepdims=True)
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

    def less(self, offset: np.ndarray) -> "Group":
        """Return the points less offset [dim]."""
        columns = blank(self.columns.shape)
        return Group(np.subtract(self.columns, offset[: len(columns), None], out=columns), self.weights)

    def take(self, index: np.ndarray) -> "Group":
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


def pose(matrix: torch.Tensor, importance: Importance, *, dim: int, books: int, stages: int) -> Problem:
    """Check a fitter's arguments and scale the matrix; ValueError where no fit is possible."""
    blocks = check_layout(matrix, dim=dim, books=books, stages=stages)
    matrix = matrix.detach().to(device="cpu", dtype=torch.float32)
    least, most = float(matrix.amin()), float(matrix.amax())  # aminmax would copy a transposed matrix
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
        square = sum(float(np.square(problem.points(*s)).sum(dtype=np.float64)) for s in spans) / max(1, matrix.numel())
        return replace(problem, care=1 / square if square > 0 else 0.0)
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


def few(problem: Problem, book: int, codes: np.ndarray) -> np.ndarray | None:
    """Return the distinct sub-vectors [256, dim] of a book and write their codes, or None where there are more."""
    if problem.matrix.shape[0] > 2 * HEAD and few(replace(problem, matrix=problem.matrix[:HEAD]), book, codes) is None:
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
        rows = problem.matrix[:, low * problem.dim : high * problem.dim].mean(1)  # fp64 means of fp32 rows: no wide copy
        centre = float(rows.mean(dtype=torch.float64)) * problem.scale
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # r -> [(columns, weights)]
    far: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}  # r -> [(columns, weights, distances)]
    for span in problem.spans(book):
        points, weights = problem.points(*span), problem.weights(*span)
        r, total = points.shape
        if rate < 1:
            distance = ((points - np.float32(centre)) ** 2 * weights).sum(0)
            top = _farthest(points, distance)
            far.setdefault(r, []).append((points[:, top], _take(weights, top), distance[top]))
            count = math.ceil(total * rate)
            index = ((np.arange(count) + rng.random(count)) * (total / count)).astype(np.int64).clip(0, total - 1)
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


def _farthest(points: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the sorted indices of the EXTREMES largest distances and of every coordinate's least and largest."""
    keep = min(EXTREMES, distance.size)
    top = np.argpartition(distance, distance.size - keep)[distance.size - keep :]
    return np.unique(np.concatenate([top, points.argmin(1), points.argmax(1)]))


def _take(weights: np.ndarray, index: np.ndarray) -> np.ndarray:
    return weights if weights.shape[1] == 1 else weights[:, index]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 or parts[0].shape == (1, 1) else np.concatenate(parts, axis=1)


def relocate(groups: list[Group], codes: list[np.ndarray], codebook: np.ndarray, mass: np.ndarray, limit: int) -> int:
    """Move up to `limit` codewords, in place, to the points with the largest errors where the total error must fall.

    Moving codeword k away costs at most mass_k |c_k - c_nearest|^2, and a point that becomes a codeword saves at least
    its own error. Codewords without points cost nothing. Returns the number moved.
    """
    neighbour, between = np.zeros(CODEWORDS, np.int64), np.zeros(CODEWORDS, np.float32)
    neighbours(codebook, neighbour, between)
    cost = mass.max(1) * between
    victims = np.argsort(cost, kind="stable")[:limit].tolist()
    found = []  # [(errors, groups, points)]
    for g, (group, code) in enumerate(zip(groups, codes)):
        errors = errors_of(group.rows, group.row_weights, code, codebook)
        top = np.flatnonzero(errors > cost[victims[0]])
        if top.size > 4 * limit:
            top = top[np.argpartition(errors[top], top.size - 4 * limit)[-4 * limit :]]
        found.append((errors[top], np.full(top.size, g), top))
    worst, at, which = (np.concatenate(part) for part in zip(*found))
    moved: list[int] = []
    heirs: set[int] = set()  # codewords that take over the points of a moved one, and so must stay
    for i in np.lexsort((which, at, -worst)):
        error, g, p = float(worst[i]), at[i], which[i]
        while victims and (int(neighbour[victims[0]]) in moved or victims[0] in heirs):
            victims.pop(0)
        if not victims or error <= cost[victims[0]] or error == 0:
            break
        point = groups[g].rows[p]
        r, old = point.size, codebook[codes[g][p]]
        near = ((point - codebook[[*moved, codes[g][p]], :r]) ** 2).sum(1)
        if near.min() < near[-1]:  # a codeword that moved has come nearer
            continue
        fresh = old.copy()
        fresh[:r] = point
        k = victims.pop(0)
        codebook[k] = fresh
        moved.append(k)
        heirs.add(int(neighbour[k]))
    return len(moved)


def lloyd(groups: list[Group], codebook: np.ndarray, iterations: int) -> np.ndarray:
    """Run Lloyd's iterations until no code changes; codebook [256, dim] -> [256, dim] fp32.

    When they settle or end, `relocate` looks for codewords that serve better elsewhere and a few more follow. Points
    should be centred: their nearest codewords are found by products, unless that is too coarse for them.
    """
    codebook = codebook.copy()
    sums, mass = np.zeros(codebook.shape), np.zeros(codebook.shape)
    even = groups[0].weights.shape[1] == 1  # points that change their codewords can take their share of the sums along
    codes: list[np.ndarray] = []
    quick = True
    left, moves = iterations, 3  # `left` grows only where a move is used up, so this ends
    while left > 0:
        left -= 1
        found = [group.nearest(codebook, quick=quick) for group in groups]
        if not codes and _tight(groups, found, codebook):
            quick = False
            found = [group.nearest(codebook) for group in groups]
        if even and codes:
            settled = not sum([regroup(g.rows, new, old, sums, mass) for g, new, old in zip(groups, found, codes)])
        else:
            settled = bool(codes) and all(np.array_equal(new, old) for new, old in zip(found, codes))
            sums[:], mass[:], codes = 0, 0, found
            for group, code in zip(groups, codes):
                group.add_to(code, sums, mass)
        empty = move_to_means(sums, mass, codebook)
        if settled or left == 0:
            if not moves or not relocate(groups, codes, codebook, mass, limit=max(empty, 32)):
                break
            moves, left = moves - 1, max(left, 4)
        elif empty:
            relocate(groups, codes, codebook, mass, limit=empty)
    return codebook


def _tight(groups: list[Group], codes: list[np.ndarray], codebook: np.ndarray) -> bool:
    """Say whether points lie so near their codewords that the rounding of quick scores, 2^-16 |x| |c|, matters there."""
    error = sum(float(errors_of(g.rows, ONE, c, codebook).sum()) for g, c in zip(groups, codes))
    return error < 2**-10 * sum(float(np.einsum("jp,jp->", g.columns, g.columns)) for g in groups)


def seed_codebook(groups: list[Group], dim: int, rng: np.random.Generator) -> np.ndarray:
    """Choose 256 points: by k-means++ up to dim 8, beyond that (no gain there) at random. [256, dim] fp32."""
    group = groups[0]
    codebook = np.zeros((CODEWORDS, dim), np.float32)
    r, total = group.columns.shape
    if dim <= 8:
        part = np.zeros((CODEWORDS, r), np.float32)
        seed_plus_plus(group.columns, group.weights, int(rng.integers(total)), rng.random(4 * CODEWORDS), part)
        codebook[:, :r] = part
    else:
        index = rng.choice(total, CODEWORDS, replace=total < CODEWORDS)
        codebook[:, :r] = group.rows[index]
    return codebook


def fit_points(groups: list[Group], dim: int, rng: np.random.Generator, iterations: int = ITERATIONS) -> np.ndarray:
    """Fit one codebook [256, dim] fp32 to groups of points, the larger ones on an eighth of the points first."""
    if dim == 1:
        return fit_line(groups[0])
    offset = np.zeros(dim, np.float32)
    offset[: groups[0].columns.shape[0]] = groups[0].columns.mean(1, dtype=np.float64)
    groups = [group.less(offset) for group in groups]
    thin = groups
    if groups[0].rows.shape[0] >= 1 << 15:
        thin = []
        for group in groups:
            total = group.rows.shape[0]
            thin.append(group.take(np.unique(np.r_[0:total:8, max(0, total - EXTREMES) : total])))
    codebook = seed_codebook(thin, dim, rng)
    if thin is not groups:
        codebook = lloyd(thin, codebook, 15)
    return lloyd(groups, codebook, iterations if thin is groups else iterations // 2) + offset


def fit_line(group: Group) -> np.ndarray:
    """Fit one codebook [256, 1] on a line: dynamic programming over 1024 pieces, then Lloyd on all sorted values."""
    values, weights = group.columns[0], group.weights[0]
    if weights.size > 1:
        order = np.argsort(values)
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
    share = np.diff(knots) ** (1 / 3) * np.diff(at) ** (2 / 3)
    level = np.r_[0.0, np.cumsum(share)]
    if level[-1] <= 0:
        return np.array([0, total], np.int64)
    wanted = np.linspace(0, level[-1], PIECES + 1)
    cuts = np.interp(wanted, level, knots.astype(np.float64)).astype(np.int64)
    # Whole values only: equal values never fall into two pieces.
    cuts = np.searchsorted(values, values[np.minimum(cuts, total - 1)], side="left")
    tail = max(0, total - 64)
    return np.unique(np.r_[0, np.arange(min(64, total)), cuts, np.arange(tail, total), total])


def round_codebooks(codebooks: np.ndarray, problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """Undo the scaling and round; returns the codebooks in `dtype` and the rounded values, scaled, in fp32."""
    scale = np.float32(problem.scale)  # a power of two: nothing else is rounded
    rounded = torch.from_numpy(codebooks / scale).to(dtype)
    near = rounded.float().numpy() * scale
    if not np.isfinite(near).all():
        largest = float(np.abs(codebooks).max()) / problem.scale
        raise ValueError(f"codewords as large as {largest:.3g} do not fit {dtype}; use bfloat16 or float32")
    return rounded, near


def fit_kmeans(
    matrix: torch.Tensor,
    *,
    dim: int,
    books: int,
    stages: int = 1,
    seed: int,
    codebook_dtype: torch.dtype = torch.float32,
    importance: Importance = None,
) -> Fitted:
    """Fit codebooks by k-means so that sum importance (matrix - decoded)^2 is small.

    matrix [n, L]; block b of a row reads codebook b * books // blocks. importance broadcasts to [n, L], or
    "size" is 1 + the mean square of the sub-vector relative to the matrix's. Codes are the nearest codewords of the
    codebooks as rounded. At most 256 distinct sub-vectors per codebook are met exactly.
    Raises ValueError for stages != 1, an impossible layout, NaN or infinity, or codewords too large for the dtype.

    >>> fitted = fit_kmeans(torch.arange(12.0).reshape(3, 4), dim=2, books=1, stages=1, seed=0)
    >>> fitted.codebooks[0, 0][fitted.codes[0, 0].long()].tolist()
    [[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]
    """
    if stages != 1:
        raise ValueError(f"kmeans fits one stage, got stages={stages}; the fitter 'additive' fits several")
    problem = pose(matrix, importance, dim=dim, books=books, stages=stages)
    rounded = torch.empty(books, CODEWORDS, dim, dtype=codebook_dtype)
    codes = np.empty((problem.blocks, problem.matrix.shape[0]), np.uint8)
    for book in range(books):
        parts: Iterator[tuple[int, int, Group]] = iter(())
        codebook = few(problem, book, codes)
        if codebook is None:  # else each point has its own codeword, and rounding keeps it the nearest
            codebook, parts = fit_book(problem, book, generator(seed, book))
        rounded[book], near = round_codebooks(codebook, problem, codebook_dtype)
        for low, high, group in parts:
            codes[low:high] = group.nearest(near).reshape(high - low, -1)
    out = torch.from_numpy(codes)[None]
    return Fitted(rounded[None], out, count_dead(out, books))


def fit_book(
    problem: Problem, book: int, rng: np.random.Generator
) -> tuple[np.ndarray, Iterator[tuple[int, int, Group]]]:
    """Fit one codebook [256, dim], scaled fp32: on its points or a sample, then one step on all of them.

    Returns also the points that are to be coded, as (first block, the one after the last, group).
    """
    n, dim = problem.matrix.shape[0], problem.dim
    low, high = problem.block_range(book)
    limit = LINE if dim == 1 else FULL
    groups = collect(problem, book, full=limit, sample=LINE // 2 if dim == 1 else SAMPLE, rng=rng)
    codebook = fit_points(groups, dim, rng)
    if n * (high - low) <= limit:
        ends = low + np.cumsum([group.columns.shape[1] // n for group in groups])
        return codebook, zip([low, *ends], ends, groups)
    if dim > 1:
        sums, mass = np.zeros(codebook.shape), np.zeros(codebook.shape)
        for _, _, group in _parts(problem, book):
            group.add_to(group.nearest(codebook), sums, mass)
        move_to_means(sums, mass, codebook)
    return codebook, _parts(problem, book)


def _parts(problem: Problem, book: int) -> Iterator[tuple[int, int, Group]]:
    for low, high in problem.spans(book):
        yield low, high, Group(problem.points(low, high), problem.weights(low, high))
