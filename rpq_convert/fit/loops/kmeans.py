"""Inner loops of k-means and of additive coding: numba, single-threaded, nogil, no global state.

Callers run several fits in Python threads; nothing here starts a thread, so the order of every sum, and every bit, is
fixed. The search for the nearest codeword, where the time goes, is in `nearest.py`.

Not used: `fastmath=True` (it reorders sums that need not be).
"""

from __future__ import annotations

import numpy as np

from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.vectors import (
    add,
    load,
    minimum,
    multiply_add,
    no_codes,
    note_code,
    read_float,
    spread,
    store,
    subtract,
    write_codes,
)
from rpq_convert.kernels.jit.vectors import total as vector_total

LARGE = np.float32(3e38)
FUSE = {"contract", "nsz"}  # a * b + c may fuse; nothing is reordered
REORDER = {"contract", "nsz", "nnan", "reassoc"}  # for sums over lanes: LLVM's order, the same on every call


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def accumulate(rows, weights, codes, sums, mass):
    """Add weight * point to sums [256, r] and weight to mass [256, r], in point order, fp64.

    rows [N, r]; weights [1, 1] (all one), [N, 1] or [N, r].
    """
    total, r = rows.shape
    if weights.shape[0] == 1:
        for p in range(total):
            k = codes[p]
            for j in range(r):
                sums[k, j] += rows[p, j]
            mass[k, 0] += 1.0
    elif weights.shape[1] == 1:
        for p in range(total):
            k = codes[p]
            w = np.float64(weights[p, 0])
            for j in range(r):
                sums[k, j] += w * rows[p, j]
            mass[k, 0] += w
    else:
        for p in range(total):
            k = codes[p]
            for j in range(r):
                sums[k, j] += np.float64(weights[p, j]) * rows[p, j]
                mass[k, j] += weights[p, j]


@njit(cache=True, nogil=True)
def gather(matrix, down, across, n, scale, points):
    """Copy sub-vectors of r neighbouring columns of a matrix, times `scale`, to points [r, blocks n], block after block.

    matrix: the address of the first number (fp32); down and across: bytes from row to row and from column to column.
    """
    r = points.shape[0]
    for start in range(0, n, 16):  # a line of the result at a time
        stop = min(start + 16, n)
        for b in range(points.shape[1] // n):
            for j in range(r):
                at = matrix + across * (b * r + j)
                for i in range(start, stop):
                    points[j, b * n + i] = read_float(at + down * i) * scale + np.float32(0)  # -0 becomes 0


@njit(cache=True, nogil=True, error_model="numpy")
def regroup(rows, found, codes, sums, mass):
    """Take points whose code has changed from their old codeword's sum and count to the new one's; returns how many have.

    rows [N, r]; found [N] becomes codes [N]; sums and mass [256, dim] fp64. Counts are whole numbers, so a codeword that
    lost all its points has none, exactly.
    """
    total, r = rows.shape
    moved = 0
    eight = total & ~7
    new, old = found[:eight].view(np.uint64), codes[:eight].view(np.uint64)
    for start in range(0, total, 8):
        if start < eight and new[start >> 3] == old[start >> 3]:
            continue
        for p in range(start, min(start + 8, total)):
            k, i = found[p], codes[p]
            if k != i:
                codes[p] = k
                moved += 1
                for j in range(r):
                    x = np.float64(rows[p, j])
                    sums[i, j] -= x
                    mass[i, j] -= 1.0
                    sums[k, j] += x
                    mass[k, j] += 1.0
    return moved


@njit(cache=True, nogil=True, error_model="numpy")
def move_to_means(sums, mass, codebook):
    """Write each codeword's mean to codebook [256, dim], where it has points; returns how many have none at all."""
    empty = 0
    for k in range(codebook.shape[0]):
        some = False
        for j in range(codebook.shape[1]):
            if mass[k, j] > 0:
                codebook[k, j] = sums[k, j] / mass[k, j]
                some = True
        empty += not some
    return empty


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def errors_of(rows, weights, codes, codebook):
    """Return the weighted squared distance [N] of points [N, r] from their codewords; weights as in `accumulate`."""
    total, r = rows.shape
    errors = np.empty(total, np.float32)
    each, last = weights.shape[0] > 1, weights.shape[1] - 1
    for p in range(total):
        k = codes[p]
        s = np.float32(0)
        for j in range(r):
            d = rows[p, j] - codebook[k, j]
            s += d * d * (weights[p, min(j, last)] if each else np.float32(1))
        errors[p] = s
    return errors


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


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
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


@njit(cache=True, nogil=True)
def distinct(points, table, slots, count, codes):
    """Number the distinct points in order of appearance; stop, and return 257, at the 257th.

    points [r, N] fp32 without -0; table [256, r] and slots [1024] int32 (-1 = free) carry over between calls, as `count`
    does. Returns the new count; codes [N] are each point's number.
    """
    r, total = points.shape
    bits = points.view(np.uint32)
    for p in range(total):
        h = np.uint64(14695981039346656037)
        for j in range(r):
            h = (h ^ np.uint64(bits[j, p])) * np.uint64(1099511628211)
        h ^= h >> np.uint64(29)
        at = np.int64(h & np.uint64(1023))
        while True:
            k = slots[at]
            if k < 0:
                if count == 256:
                    return 257
                for j in range(r):
                    table[count, j] = points[j, p]
                slots[at] = count
                codes[p] = count
                count += 1
                break
            same = True
            for j in range(r):
                if table[k, j] != points[j, p]:
                    same = False
                    break
            if same:
                codes[p] = k
                break
            at = (at + 1) & 1023
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def prefix_sums(values, weights, out):
    """Fill out [3, N + 1] with prefix sums of w, w x and w x^2; weights [1] (all one) or [N]."""
    a = b = c = 0.0
    out[:, 0] = 0
    for p in range(values.shape[0]):
        x = np.float64(values[p])
        w = np.float64(weights[p]) if weights.shape[0] > 1 else 1.0
        a += w
        b += w * x
        c += w * x * x
        out[0, p + 1] = a
        out[1, p + 1] = b
        out[2, p + 1] = c


@njit(cache=True, nogil=True, error_model="numpy")
def line_start(mass, first, second, pieces):
    """Split a sorted line of M pieces into `pieces` cells with the least squared error; exact, by dynamic programming.

    mass, first, second [M + 1]: prefix sums of w, w x, w x^2. Divide and conquer over monotone split points
    (Gronlund et al. 2017): pieces * M * log M. Returns the cells' first pieces [pieces].
    """
    m = mass.shape[0] - 1
    before = np.empty(m + 1)
    now = np.empty(m + 1)
    split = np.zeros((pieces, m + 1), np.int32)
    for i in range(m + 1):
        w = mass[i]
        before[i] = second[i] - first[i] * first[i] / w if w > 0 else 0.0
    stack = np.empty((64, 4), np.int64)
    for k in range(1, pieces):
        stack[0] = (1, m, 0, m - 1)
        now[0] = 0.0
        top = 1
        while top > 0:
            top -= 1
            lo, hi, a, b = stack[top]
            i = (lo + hi) >> 1
            best = np.inf
            at = a
            for s in range(a, min(b, i - 1) + 1):
                w = mass[i] - mass[s]
                f = first[i] - first[s]
                e = before[s] + (second[i] - second[s] - (f * f / w if w > 0 else 0.0))
                if e < best:
                    best = e
                    at = s
            now[i] = best
            split[k, i] = at
            if lo < i:
                stack[top] = (lo, i - 1, a, at)
                top += 1
            if i < hi:
                stack[top] = (i + 1, hi, at, b)
                top += 1
        before[:] = now
    starts = np.zeros(pieces, np.int32)
    i = m
    for k in range(pieces - 1, 0, -1):
        i = split[k, i]
        starts[k] = i
    return starts


@njit(cache=True, nogil=True, error_model="numpy")
def neighbours(codebook, nearest, distance):
    """Write each codeword's nearest other codeword [256] and the squared distance to it [256]."""
    tag = np.int32(0)  # 32 lanes
    r = codebook.shape[1]
    columns = np.ascontiguousarray(codebook.T)
    d, best, codes = np.empty(256, np.float32), np.empty(32, np.float32), np.empty(32, np.uint8)
    for k in range(256):
        for i in range(0, 1024, 128):
            s = spread(np.float32(0), tag)
            for j in range(r):
                e = subtract(load(columns.ctypes.data + i + 1024 * j, tag), spread(codebook[k, j], tag))
                s = multiply_add(e, e, s)
            store(d.ctypes.data + i, s)
        d[k] = np.inf
        low = load(d.ctypes.data, tag)
        which = no_codes(tag)
        for i in range(1, 8):
            s = load(d.ctypes.data + 128 * i, tag)
            which = note_code(s, low, 32 * i, which)
            low = minimum(s, low)
        store(best.ctypes.data, low)
        write_codes(codes.ctypes.data, which)
        least, at = best[0], 0
        for i in range(1, 32):
            if best[i] < least:
                least, at = best[i], i
        nearest[k] = codes[at] + at
        distance[k] = least
