"""Inner loops of additive coding: beam search over the stages, and residuals that follow a change of codebooks."""

from __future__ import annotations

from functools import cache

import numpy as np

from rpq_convert.fit.loops.forms import loop
from rpq_convert.fit.loops.kmeans import FUSE, LARGE, REORDER
from rpq_convert.fit.loops.nearest import NONE
from rpq_convert.kernels.jit.cache import njit


@njit(inline="always")
def _stage_scores(rows, p, codebooks, s, halves, base):
    """base [256] = |c|^2 / 2 - x.c of the codewords of stage `s`."""
    r = rows.shape[1]
    for k in range(256):
        base[k] = halves[s, k]
    for j in range(0, r - 3, 4):
        x0, x1, x2, x3 = rows[p, j], rows[p, j + 1], rows[p, j + 2], rows[p, j + 3]
        for k in range(256):
            a = x0 * codebooks[s, j, k] + x1 * codebooks[s, j + 1, k]
            base[k] -= a + (x2 * codebooks[s, j + 2, k] + x3 * codebooks[s, j + 3, k])
    for j in range(r & ~3, r):
        x0 = rows[p, j]
        for k in range(256):
            base[k] -= x0 * codebooks[s, j, k]


@njit(inline="always")
def _weighted_scores(rows, weights, p, codebooks, s, path, b, residual, score):
    """score [b, 256] = sum w (x - c)^2 of stage `s`, x being what the beam's earlier codewords leave of the point."""
    r = rows.shape[1]
    for j in range(r):
        residual[j] = rows[p, j]
        for t in range(s):
            residual[j] -= codebooks[t, j, path[b, t]]
    for k in range(256):
        score[b, k] = 0
    for j in range(r):
        x = residual[j]
        w = weights[p, j]
        for k in range(256):
            d = x - codebooks[s, j, k]
            score[b, k] += w * d * d


@njit(inline="always")
def _strided_minima(score, b, half, least):
    """Write the least of every sixteenth score of beam `b` to least [b, 16]; return the least of all."""
    for k in range(128):
        u, v = score[b, k], score[b, k + 128]
        half[k] = v if v < u else u  # halving: one loop over 16 strided minima compiles to scalar code
    for k in range(64):
        u, v = half[k], half[k + 64]
        half[k] = v if v < u else u
    for k in range(32):
        u, v = half[k], half[k + 32]
        half[k] = v if v < u else u
    for g in range(16):
        u, v = half[g], half[g + 16]
        least[b, g] = v if v < u else u
    low = least[b, 0]
    for g in range(1, 16):
        v = least[b, g]
        low = v if v < low else low
    return low


@njit(inline="always")
def _best(score, least, top, alive):
    """Return (beam, place of its minimum in `least`, code) of the least score of all beams."""
    b = 0
    for i in range(1, alive):
        b = i if top[i] < top[b] else b
    v = top[b]
    g = 0
    while g < 15 and least[b, g] != v:
        g += 1
    k = g
    while k < 240 and score[b, k] != v:
        k += 16
    return b, g, k


@njit(inline="always")
def _without(score, least, b, g, k):
    """Take code `k` of beam `b` out of its scores; return the least of the others."""
    score[b, k] = LARGE
    low = LARGE
    for i in range(g, 256, 16):
        v = score[b, i]
        low = v if v < low else low
    least[b, g] = low
    low = LARGE
    for i in range(16):
        v = least[b, i]
        low = v if v < low else low
    return low


@cache
def _beam(per_coordinate: bool):
    """Compile the beam search over stages; per_coordinate: weights differ inside a sub-vector, so no tables."""

    @loop(REORDER)
    def beam(rows, weights, codebooks, halves, tables, width, codes):
        total, r = rows.shape
        stages = codebooks.shape[0]
        base = np.empty(256, np.float32)
        score = np.empty((width, 256), np.float32)
        # Sixteen minima per beam, over every sixteenth score: a pick then reads 8 + 16 + 16 numbers and has no
        # branch to mispredict, unlike a sorted list with insertion.
        least = np.empty((width, 16), np.float32)
        half = np.empty(128, np.float32)
        top = np.empty(width, np.float32)
        residual = np.empty(r, np.float32)
        cost = np.zeros(width, np.float32)
        new_cost = np.empty(width, np.float32)
        path = np.zeros((width, stages), np.int64)
        new_path = np.zeros((width, stages), np.int64)
        for p in range(total):
            alive = 1
            cost[0] = 0
            for s in range(stages):
                if not per_coordinate:
                    _stage_scores(rows, p, codebooks, s, halves, base)
                for b in range(alive):
                    if per_coordinate:
                        _weighted_scores(rows, weights, p, codebooks, s, path, b, residual, score)
                    elif s == 0:
                        for k in range(256):
                            score[b, k] = base[k]
                    else:
                        start = cost[b]
                        row = tables[0, s, path[b, 0]]
                        for k in range(256):
                            score[b, k] = base[k] + start + row[k]
                        for t in range(1, s):
                            row = tables[t, s, path[b, t]]
                            for k in range(256):
                                score[b, k] += row[k]
                    top[b] = _strided_minima(score, b, half, least)
                found = width if s < stages - 1 else 1
                for e in range(found):
                    b, g, k = _best(score, least, top, alive)
                    new_cost[e] = top[b]
                    for t in range(s):
                        new_path[e, t] = path[b, t]
                    new_path[e, s] = k
                    if e < found - 1:
                        top[b] = _without(score, least, b, g, k)
                alive = found
                for e in range(found):
                    cost[e] = new_cost[e]
                    for t in range(s + 1):
                        path[e, t] = new_path[e, t]
            for s in range(stages):
                codes[s, p] = path[0, s]

    return beam


def encode_sum(rows, weights, codebooks, width):
    """Find codewords, one per stage, whose sum is near each point, by beam search over the stages.

    rows [N, r] fp32; weights None or [N, r]; codebooks [stages, 256, r] fp32. Returns codes [stages, N] uint8. Without
    weights the cost of one more stage is |c|^2 / 2 - x.c + (codewords so far).c, and the last term is a table.
    """
    stages = codebooks.shape[0]
    codes = np.empty((stages, rows.shape[0]), np.uint8)
    columns = np.ascontiguousarray(codebooks.transpose(0, 2, 1), np.float32)  # [stages, r, 256]
    wide = codebooks.astype(np.float64)
    halves = (0.5 * (wide**2).sum(2)).astype(np.float32)  # [stages, 256]
    # einsum without optimize runs numpy's own loops: BLAS bits would depend on its threads.
    tables = np.einsum("sjk,tjl->stkl", columns, columns, optimize=False) if weights is None else _NO_TABLES
    _beam(weights is not None)(rows, NONE if weights is None else weights, columns, halves, tables, width, codes)
    return codes


_NO_TABLES = np.zeros((1, 1, 1, 1), np.float32)


@loop(FUSE)
def shift(residual, codes, change):
    """residual [N, r] += change [256, r] at each point's code."""
    total, r = residual.shape
    for p in range(total):
        k = codes[p]
        for j in range(r):
            residual[p, j] += change[k, j]
