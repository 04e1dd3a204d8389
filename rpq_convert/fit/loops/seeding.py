"""k-means++: the points that k-means starts from."""

from __future__ import annotations

import numpy as np

from rpq_convert.fit.loops.forms import loop
from rpq_convert.fit.loops.kmeans import FUSE
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.vectors import add, load, minimum, multiply_add, spread, store, subtract
from rpq_convert.kernels.jit.vectors import total as vector_total

BATCH = 4  # seeds that are drawn at once: their points are then read once


@njit(inline="always")
def _shrink(points, weights, codebook, low, high, nearest, chunks):
    """nearest = min(nearest, weighted squared distance to codewords low to high); chunks[i] = its sum over 256 points.

    Inlined, and summed in an order of its own: a second compiled copy, optimised in another place, once gave other bits in
    the process that compiled it than in those that read it from the cache.
    """
    r, total = points.shape
    tag = np.int32(0)  # 32 lanes
    weighted = weights.shape[1] > 1
    last = weights.shape[0] - 1
    d = np.empty(256, np.float32)
    for c in range(chunks.shape[0]):
        start = c * 256
        if start + 256 <= total and not weighted:
            at = points.ctypes.data + 4 * start
            there = nearest.ctypes.data + 4 * start
            chunk = spread(np.float32(0), tag)
            for p in range(0, 1024, 256):  # two registers' sums at once
                first, second = load(there + p, tag), load(there + p + 128, tag)
                for k in range(low, high):
                    s = spread(np.float32(0), tag)
                    u = spread(np.float32(0), tag)
                    for j in range(r):
                        v = spread(codebook[k, j], tag)
                        e = subtract(load(at + p + 4 * total * j, tag), v)
                        s = multiply_add(e, e, s)
                        e = subtract(load(at + p + 128 + 4 * total * j, tag), v)
                        u = multiply_add(e, e, u)
                    first, second = minimum(s, first), minimum(u, second)
                store(there + p, first)
                store(there + p + 128, second)
                chunk = add(chunk, add(first, second))
            chunks[c] = vector_total(chunk)
            continue
        count = min(256, total - start)
        for k in range(low, high):
            for p in range(count):
                d[p] = 0
            for j in range(r):
                v = codebook[k, j]
                for p in range(count):
                    e = points[j, start + p] - v
                    d[p] += e * e * (weights[min(j, last), start + p] if weighted else np.float32(1))
            for p in range(count):
                n = nearest[start + p]
                nearest[start + p] = d[p] if d[p] < n else n
        for p in range(256):
            d[p] = nearest[start + p] if p < count else np.float32(0)
        half = 128
        while half > 0:  # pairs, then pairs of pairs
            for p in range(half):
                d[p] += d[p + half]
            half //= 2
        chunks[c] = d[0]


@loop(FUSE)
def seed_plus_plus(points, weights, first, uniforms, codebook):
    """Choose 256 points by k-means++ (Arthur and Vassilvitskii 2007): each with odds of its distance to those before.

    Up to BATCH are drawn from the same odds; one that the seeds drawn just before have come nearer to is kept with the
    share of its odds that is left, which gives each the odds that it would have had alone.

    points [r, N]; weights [1, 1], [1, N] or [r, N]; first: the index of the first; uniforms in [0, 1), read in a circle.
    Writes codebook [256, r].
    """
    r, total = points.shape
    weighted = weights.shape[1] > 1
    last = weights.shape[0] - 1
    nearest = np.full(total, np.inf, np.float32)
    chunks = np.empty((total + 255) // 256, np.float64)
    for j in range(r):
        codebook[0, j] = points[j, first]
    low, high, at = 0, 1, 0
    while high < 256:
        _shrink(points, weights, codebook, low, high, nearest, chunks)
        whole = chunks.sum()
        low = high
        for _ in range(BATCH):
            left = uniforms[at] * whole
            chance = uniforms[at + 1]
            at = (at + 2) % uniforms.shape[0]
            c = 0
            while c < chunks.shape[0] - 1 and left >= chunks[c]:
                left -= chunks[c]
                c += 1
            pick = c * 256
            end = min(pick + 256, total) - 1
            while pick < end and (left >= nearest[pick] or nearest[pick] == 0):
                left -= nearest[pick]
                pick += 1
            odds = nearest[pick]
            for k in range(low, high):
                d = np.float32(0)
                for j in range(r):
                    e = points[j, pick] - codebook[k, j]
                    d += e * e * (weights[min(j, last), pick] if weighted else np.float32(1))
                odds = min(odds, d)
            if high < 256 and (high == low or chance * nearest[pick] < odds):
                for j in range(r):
                    codebook[high, j] = points[j, pick]
                high += 1
