"""Additive coding: a sub-vector is the sum of one codeword per stage.

Greedy residual stages are worse than one stage at equal bits (Gaussian, 3 bits: 0.037 greedy, 0.027 joint), so after a
residual k-means two steps alternate on a sample: beam search over the stages for the codes, and a joint least-squares
refit of all codebooks (Babenko and Lempitsky 2014; Martinez et al. 2018). The refit is block coordinate descent over
stages: given the others, a stage's codebook is the mean of what they leave. Starting from the present codebooks and
stopping after a few sweeps is its regulariser.

Not used: normal equations by Cholesky (a system of 256 stages unknowns for every coordinate as soon as weights differ
inside a sub-vector, and nothing promises LAPACK's bits at every thread count). Not tried: ICM sweeps.
"""

import numpy as np
import torch

from rpq_convert.fit.kmeans import ITERATIONS, fit_kmeans, fit_points
from rpq_convert.fit.loops.beam import encode_sum, shift
from rpq_convert.fit.loops.kmeans import accumulate
from rpq_convert.fit.loops.nearest import CODEWORDS
from rpq_convert.fit.matrix import Matrix
from rpq_convert.fit.problem import (
    Group,
    Importance,
    Problem,
    collect,
    fit_distinct,
    generator,
    make_problem,
    round_codebooks,
)
from rpq_convert.fit.result import Fitted, count_dead

SAMPLE = 1 << 16  # points a set of codebooks is fitted on
ROUNDS = 10  # of re-encoding and refit; Gaussian, 3 x dim 8: 6 rounds .0257, 10 .0253, 20 .0249
SWEEPS = 3  # over the stages in a refit; 6 gain nothing
FIT_BEAM = 4  # while fitting; 2 .0257, 8 .0251 for twice the time
BEAM = 8  # for the codes that are kept


def fit_additive(
    matrix: torch.Tensor | Matrix,
    *,
    dim: int,
    books: int,
    stages: int,
    seed: int,
    codebook_dtype: torch.dtype = torch.float32,
    importance: Importance = None,
) -> Fitted:
    """Fit `stages` codebooks per book whose codewords add up, so that sum importance (matrix - decoded)^2 is small.

    Arguments, errors and layout as in `fit_kmeans`, to which one stage is equal. Codes are the best that a beam search
    of width 8 finds against the codebooks as rounded.
    """
    if stages == 1:
        return fit_kmeans(
            matrix, dim=dim, books=books, stages=1, seed=seed, codebook_dtype=codebook_dtype, importance=importance
        )
    problem = make_problem(matrix, importance, dim=dim, books=books, stages=stages)
    codebooks = np.zeros((stages, books, CODEWORDS, dim), np.float32)
    codes = np.zeros((stages, problem.blocks, problem.matrix.shape[0]), np.uint8)
    exact = []
    for book in range(books):
        table = fit_distinct(problem, book, codes[0])
        exact.append(table is not None)
        if table is None:
            codebooks[:, book] = fit_sum(problem, book, stages, seed)
        else:
            codebooks[0, book] = table  # the other stages stay zero
    rounded, near = round_codebooks(codebooks, problem, codebook_dtype)
    for book in range(books):
        if exact[book]:
            continue
        for low, high in problem.spans(book):
            rows = np.ascontiguousarray(problem.points(low, high).T)
            weights = np.ascontiguousarray(problem.weights(low, high).T) if problem.per_coordinate else None
            found = encode_sum(rows, weights, near[:, book, :, : rows.shape[1]], BEAM)
            codes[:, low:high] = found.reshape(stages, high - low, -1)
    out = torch.from_numpy(codes)
    return Fitted(rounded, out, count_dead(out, books))


def fit_sum(problem: Problem, book: int, stages: int, seed: int) -> np.ndarray:
    """Fit one book's codebooks [stages, 256, dim], scaled fp32."""
    rng = generator(seed, book)
    groups = collect(problem, book, full=SAMPLE * 2, sample=SAMPLE, rng=rng)
    codebooks = np.zeros((stages, CODEWORDS, problem.dim), np.float32)
    rest = groups
    for stage in range(stages):
        codebooks[stage] = fit_points(rest, problem.dim, rng, ITERATIONS // 2)
        left = []
        for group in rest:
            r = group.columns.shape[0]
            codes = group.nearest(codebooks[stage])
            left.append(Group(group.columns - np.ascontiguousarray(codebooks[stage][codes, :r].T), group.weights))
        rest = left
    for _ in range(ROUNDS):
        found = [_encode(group, codebooks, FIT_BEAM) for group in groups]
        codebooks = refit(groups, found, codebooks)
    return codebooks


def _encode(group: Group, codebooks: np.ndarray, width: int) -> np.ndarray:
    weights = group.row_weights if group.row_weights.shape[1] > 1 else None
    return encode_sum(group.rows, weights, codebooks[:, :, : group.rows.shape[1]], width)


def refit(groups: list[Group], codes: list[np.ndarray], codebooks: np.ndarray) -> np.ndarray:
    """Fit all stages' codebooks [stages, 256, dim] to fixed codes by SWEEPS of coordinate descent over the stages."""
    codebooks = codebooks.copy()
    rest = []
    for group, code in zip(groups, codes):
        r = group.rows.shape[1]
        left = group.rows.copy()
        for stage in range(len(codebooks)):
            shift(left, code[stage], np.ascontiguousarray(-codebooks[stage, :, :r]))
        rest.append(left)
    for _ in range(SWEEPS):
        for stage in range(len(codebooks)):
            sums, mass = np.zeros(codebooks[stage].shape), np.zeros(codebooks[stage].shape)
            for group, code, left in zip(groups, codes, rest):
                r = left.shape[1]
                part, part_mass = np.zeros((CODEWORDS, r)), np.zeros((CODEWORDS, r))
                accumulate(left, group.row_weights, code[stage], part, part_mass)
                sums[:, :r] += part
                mass[:, :r] += part_mass if group.row_weights.shape[1] > 1 else part_mass[:, :1]
            # What is left, averaged per codeword, is the step to the stage's optimum.
            step = np.divide(sums, mass, out=np.zeros_like(sums), where=mass > 0).astype(np.float32)
            codebooks[stage] += step
            for code, left in zip(codes, rest):
                shift(left, code[stage], np.ascontiguousarray(-step[:, : left.shape[1]]))
    return codebooks
