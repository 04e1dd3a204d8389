"""k-means: one codeword per sub-vector.

Seeding decides: k-means on a random sample clips the few largest weights, and a language model depends on them. So the fit sees
every point of a codebook up to FULL of them, else a stratified sample plus the extremes; k-means++ for dim <= 8; and after
Lloyd's iterations `relocate` moves the cheapest codewords to the worst points as long as the error must fall. A line (dim 1) is
solved by dynamic programming and refined on the sorted values instead.

Points whose last coordinates are padding are a group of their own with fewer coordinates: they are compared by, and move codewords in,
the coordinates that they have. Values are scaled by a power of two first, so no weight can overflow a square.

Not used: a quota of seeds among the largest points (it spends codewords on Gaussian weights, which need no such care).
Seeding on half of 4096 points was 1.5 % worse where rows differ in size. Not tried: minibatch k-means.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from rpq_convert.fit.line import fit_line
from rpq_convert.fit.loops.kmeans import errors_of, move_to_means, neighbours, regroup
from rpq_convert.fit.loops.nearest import CODEWORDS
from rpq_convert.fit.loops.seeding import seed_plus_plus
from rpq_convert.fit.matrix import Matrix
from rpq_convert.fit.problem import (
    EXTREMES,
    ONE,
    Group,
    Importance,
    Problem,
    collect,
    fit_distinct,
    generator,
    largest,
    make_problem,
    round_codebooks,
)
from rpq_convert.fit.result import Fitted, count_dead

FULL = 1 << 18  # a codebook with at most so many points is fitted on all of them
SAMPLE = 1 << 18  # else on about so many of them, plus
LINE = 1 << 21  # the same for dim 1, where a fit is one sort
ITERATIONS = 25


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
            top = top[largest(errors[top], 4 * limit)]
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


def fit_kmeans(
    matrix: torch.Tensor | Matrix,
    *,
    dim: int,
    books: int,
    stages: int = 1,
    seed: int,
    codebook_dtype: torch.dtype = torch.float32,
    importance: Importance = None,
) -> Fitted:
    """Fit codebooks by k-means so that sum importance (matrix - decoded)^2 is small.

    matrix [n, L], any float dtype; sub-vector b of a row reads codebook b * books // blocks. importance broadcasts to [n, L];
    "size" is 1 + the mean square of the sub-vector relative to the matrix's. Codes are the nearest codewords of the
    codebooks as rounded to `codebook_dtype`. Up to 256 distinct sub-vectors per codebook are represented exactly.
    Raises ValueError for stages != 1, an impossible layout, NaN or infinity, or codewords too large for the dtype.

    >>> fitted = fit_kmeans(torch.arange(12.0).reshape(3, 4), dim=2, books=1, stages=1, seed=0)
    >>> fitted.codebooks[0, 0][fitted.codes[0, 0].long()].tolist()
    [[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]
    """
    if stages != 1:
        raise ValueError(f"kmeans fits one stage, got stages={stages}; the fitter 'additive' fits several")
    problem = make_problem(matrix, importance, dim=dim, books=books, stages=stages)
    rounded = torch.empty(books, CODEWORDS, dim, dtype=codebook_dtype)
    codes = np.empty((problem.blocks, problem.matrix.shape[0]), np.uint8)
    for book in range(books):
        parts: Iterator[tuple[int, int, Group]] = iter(())
        codebook = fit_distinct(problem, book, codes)
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
