"""The best cells of a sorted line, by dynamic programming."""

from __future__ import annotations

import numpy as np

from rpq_convert.kernels.jit.cache import njit


@njit(cache=True, nogil=True, error_model="numpy")
def prefix_sums(values, weights, out):
    """Fill out [3, N + 1] with prefix sums of w, w x and w x^2; weights [1] (all one) or [N]."""
    a = b = c = 0.0
    out[0, 0] = out[1, 0] = out[2, 0] = 0.0
    for p in range(values.shape[0]):
        x = np.float64(values[p])
        w = np.float64(weights[p]) if weights.shape[0] > 1 else 1.0
        a += w
        b += w * x
        c += w * x * x
        out[0, p + 1] = a
        out[1, p + 1] = b
        out[2, p + 1] = c


@njit(inline="always")
def _push(stack, top, lo, hi, a, b):
    """Put a range onto the stack, number by number: numba compiles assignments of whole rows for seconds."""
    stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = lo, hi, a, b
    return top + 1


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
        top = _push(stack, 0, 1, m, 0, m - 1)
        now[0] = 0.0
        while top > 0:
            top -= 1
            lo, hi, a, b = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
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
                top = _push(stack, top, lo, i - 1, a, at)
            if i < hi:
                top = _push(stack, top, i + 1, hi, at, b)
        before, now = now, before
    starts = np.zeros(pieces, np.int32)
    i = m
    for k in range(pieces - 1, 0, -1):
        i = split[k, i]
        starts[k] = i
    return starts
