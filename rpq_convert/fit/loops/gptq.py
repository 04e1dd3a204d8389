"""Error feedback within some inputs, for one stage: numba, single-threaded, nogil.

What `fit/feedback.py` does step by step in numpy and torch, without the microseconds of every call, and for a few hundred
outputs at a time, so that the weights that errors are passed on to stay in the cache: outputs know nothing of each other.
"""

from __future__ import annotations

import numpy as np

from rpq_convert.fit.loops.kmeans import FUSE
from rpq_convert.fit.loops.nearest import NONE, search_by
from rpq_convert.kernels.jit.cache import njit

OUTPUTS = 512  # at a time
_difference, _weighted = search_by("difference"), search_by("weighted")


@njit(inline="always")
def _pass_on(work, upper, rest, start, at, size, far, left, right):
    """Spread what `size` inputs at `at` have lost over the later ones before `far`."""
    for row in range(at + size, far):
        later = work[row, left:right]
        for j in range(at, at + size):
            share = upper[j, row]
            lost = rest[j - start, left:right]
            for c in range(right - left):
                later[c] -= share * lost[c]


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def code_inputs(work, near, upper, order, start, far, lazy, tables, gains, codes, rest, sums, mass, tag):
    """Code inputs from `start` on, at least `lazy` of them, cut along the inputs; returns where it stopped.

    work, near [inputs, outputs], upper [inputs, inputs] fp32, all in the order of `order`; far: inputs from there on are not
    passed errors; tables [books, 256, dim] fp32; gains [outputs], what an error's square is multiplied by; codes
    [blocks, outputs]; rest [inputs of this call, outputs] fp32: errors over the factor; sums, mass [books, 256, dim] fp64,
    to which targets are added unless `mass` is empty; tag: lanes of a register.
    """
    inputs, outputs = work.shape
    books, _, dim = tables.shape
    at = start
    for left in range(0, outputs, OUTPUTS):
        right = min(outputs, left + OUTPUTS)
        count = right - left
        found = np.empty(count, np.uint8)
        at = start
        while at < inputs and at - start < lazy:
            here = order[at]
            size = min(dim, inputs - here)
            block = here // dim
            book = block * books // len(codes)
            turn = np.zeros(
                (size, size)
            )  # the inverse of the factor's triangle here: the cost of errors e is |e turn|^2
            for j in range(size):
                turn[j, j] = 1.0 / upper[at + j, at + j]
                for i in range(j):
                    for k in range(i, j):
                        turn[i, j] -= turn[i, k] * upper[at + k, at + j]
                    turn[i, j] *= turn[j, j]
            narrow = turn.astype(np.float32)
            turned = np.zeros((256, size), np.float32)
            points = np.zeros((size, count), np.float32)
            for j in range(size):
                for i in range(j + 1):
                    share = narrow[i, j]
                    for k in range(256):
                        turned[k, j] += tables[book, k, i] * share
                    for c in range(count):
                        points[j, c] += work[at + i, left + c] * share
            _difference(points, NONE, turned, tag, found)
            for c in range(count):
                codes[block, left + c] = found[c]
            for j in range(size):
                own = upper[at + j, at + j]
                cost = 1.0 / (np.float64(own) * own)
                lost = rest[at + j - start, left:right]
                for c in range(count):
                    word = tables[book, found[c], j]
                    near[at + j, left + c] = word
                    lost[c] = work[at + j, left + c] - word
                if len(mass):
                    for c in range(count):
                        k = found[c]
                        weight = gains[left + c] * cost
                        sums[book, k, j] += weight * lost[c]
                        mass[book, k, j] += weight
                for i in range(j):
                    share = upper[at + i, at + j]
                    earlier = rest[at + i - start, left:right]
                    for c in range(count):
                        lost[c] -= share * earlier[c]
                for c in range(count):
                    lost[c] /= own
            _pass_on(work, upper, rest, start, at, size, far, left, right)
            at += size
    return at


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def code_outputs(work, near, upper, order, start, far, lazy, tables, costs, flat, codes, rest, sums, mass, tag):
    """Code `lazy` inputs from `start` on, cut along the outputs; returns where it stopped.

    Arguments as for `code_inputs`, but for costs [blocks, dim], what an error's square costs, 0 where the last sub-vector is
    padding, `flat` where all are one; codes [blocks, inputs], in the inputs' own order.
    """
    inputs, outputs = work.shape
    books, _, dim = tables.shape
    blocks = len(codes)
    stop = min(inputs, start + lazy)
    step = max(1, OUTPUTS // dim)
    first = 0
    while first < blocks:  # the next blocks that share a codebook
        book = first * books // blocks
        last = first
        while last < blocks and last - first < step and last * books // blocks == book:
            last += 1
        count = last - first
        left, right = first * dim, min(outputs, last * dim)
        found = np.empty(count, np.uint8)
        points = np.zeros((dim, count), np.float32)
        weights = np.empty((dim, count), np.float32)
        for b in range(count):
            for j in range(dim):
                weights[j, b] = costs[first + b, j]
        table = tables[book]
        for at in range(start, stop):
            own = upper[at, at]
            for b in range(count):
                for j in range(min(dim, right - left - b * dim)):
                    points[j, b] = work[at, left + b * dim + j]
            if flat:
                _difference(points, NONE, table, tag, found)
            else:
                _weighted(points, weights, table, tag, found)
            for b in range(count):
                k = found[b]
                codes[first + b, order[at]] = k
                for j in range(min(dim, right - left - b * dim)):
                    c = left + b * dim + j
                    word = table[k, j]
                    near[at, c] = word
                    lost = work[at, c] - word
                    rest[at - start, c] = lost / own
                    if len(mass):
                        weight = costs[first + b, j] / (np.float64(own) * own)
                        sums[book, k, j] += weight * lost
                        mass[book, k, j] += weight
            _pass_on(work, upper, rest, start, at, 1, far, left, right)
        first = last
    return stop
