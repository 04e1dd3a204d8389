"""Inner loops of k-means and of additive coding: numba, single-threaded, nogil, no global state.

Callers run several fits in Python threads; nothing here starts a thread, so the order of every sum, and every bit, is
fixed. The search for the nearest codeword, where the time goes, is in `nearest.py`.

Not used: `fastmath=True` (it reorders sums that need not be).
"""

from __future__ import annotations

import numpy as np

from rpq_convert.fit.loops.forms import loop
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import read_float
from rpq_convert.kernels.jit.vectors import (
    load,
    minimum,
    multiply_add,
    select_code,
    spread,
    store,
    subtract,
    write_codes,
    zero_codes,
)

LARGE = np.float32(3e38)
FUSE = {"contract", "nsz"}  # a * b + c may fuse; nothing is reordered
REORDER = {"contract", "nsz", "nnan", "reassoc"}  # for sums over lanes: LLVM's order, the same on every call


@loop(FUSE)
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


@loop(FUSE)
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
        which = zero_codes(tag)
        for i in range(1, 8):
            s = load(d.ctypes.data + 128 * i, tag)
            which = select_code(s, low, 32 * i, which)
            low = minimum(s, low)
        store(best.ctypes.data, low)
        write_codes(codes.ctypes.data, which)
        least, at = best[0], 0
        for i in range(1, 32):
            if best[i] < least:
                least, at = best[i], i
        nearest[k] = codes[at] + at
        distance[k] = least
