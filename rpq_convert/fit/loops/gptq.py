"""GPTQ error compensation within a block of inputs, for one stage: numba, single-threaded, nogil.

`fit/gptq.py` does the same step by step in numpy and torch. Here a step does not cost the microseconds of a call, and a few
hundred outputs are served at a time, so that the weights that errors are spread over stay in the cache. Outputs do not depend
on each other.
"""

from __future__ import annotations

import numpy as np

from rpq_convert.fit.loops.kmeans import FUSE
from rpq_convert.fit.loops.nearest import NONE, search_by
from rpq_convert.kernels.jit.cache import njit

OUTPUTS = 512  # at a time
_difference, _weighted = search_by("difference"), search_by("weighted")


@njit(inline="always")
def _compensate(work, upper, errors, start, at, size, far, left, right):
    """Spread the errors of `size` inputs at `at` over the later inputs before `far`."""
    for row in range(at + size, far):
        later = work[row, left:right]
        for j in range(at, at + size):
            share = upper[j, row]
            error = errors[j - start, left:right]
            for c in range(right - left):
                later[c] -= share * error[c]


@njit(inline="always")
def _basis(upper, at, size):
    """Return the inverse of the factor's triangle of `size` inputs at `at`: their errors e cost |e basis|^2."""
    basis = np.zeros((size, size))
    for j in range(size):
        basis[j, j] = 1.0 / upper[at + j, at + j]
        for i in range(j):
            for k in range(i, j):
                basis[i, j] -= basis[i, k] * upper[at + k, at + j]
            basis[i, j] *= basis[j, j]
    return basis.astype(np.float32)


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def code_inputs(matrices, upper, order, span, tables, gains, codes, updates, tag):
    """Choose the codes of a block of inputs, with sub-vectors along the inputs; return the input after the last.

    Args:
        matrices: the weights that are left to code, and what codes decode to, [inputs, outputs] fp32, both in the order of
            `order`; the errors over the factor's diagonal, [inputs of this block, outputs] fp32.
        upper: Cholesky factor of the inverse Hessian [inputs, inputs] fp32, in that order.
        span: the first input; the input from which on errors are not spread here; how many inputs to code at least.
        tables: codebooks [books, 256, dim] fp32.
        gains: [outputs], what an error's square is multiplied by.
        codes: [blocks, outputs].
        updates: sums and mass [books, 256, dim] fp64, to which each codeword's targets are added unless they are empty.
        tag: lanes of a register.
    """
    work, decoded, errors = matrices
    start, far, least = span
    sums, mass = updates
    inputs, outputs = work.shape
    books, _, dim = tables.shape
    at = start
    for left in range(0, outputs, OUTPUTS):
        right = min(outputs, left + OUTPUTS)
        count = right - left
        found = np.empty(count, np.uint8)
        at = start
        while at < inputs and at - start < least:
            here = order[at]
            size = min(dim, inputs - here)
            block = here // dim
            book = block * books // len(codes)
            basis = _basis(upper, at, size)
            rotated = np.zeros((256, size), np.float32)
            points = np.zeros((size, count), np.float32)
            for j in range(size):
                for i in range(j + 1):
                    share = basis[i, j]
                    for k in range(256):
                        rotated[k, j] += tables[book, k, i] * share
                    for c in range(count):
                        points[j, c] += work[at + i, left + c] * share
            _difference(points, NONE, rotated, tag, found)
            for c in range(count):
                codes[block, left + c] = found[c]
            for j in range(size):
                own = upper[at + j, at + j]
                cost = 1.0 / (np.float64(own) * own)
                error = errors[at + j - start, left:right]
                for c in range(count):
                    word = tables[book, found[c], j]
                    decoded[at + j, left + c] = word
                    error[c] = work[at + j, left + c] - word
                if len(mass):
                    for c in range(count):
                        k = found[c]
                        weight = gains[left + c] * cost
                        sums[book, k, j] += weight * error[c]
                        mass[book, k, j] += weight
                for i in range(j):
                    share = upper[at + i, at + j]
                    earlier = errors[at + i - start, left:right]
                    for c in range(count):
                        error[c] -= share * earlier[c]
                for c in range(count):
                    error[c] /= own
            _compensate(work, upper, errors, start, at, size, far, left, right)
            at += size
    return at


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def code_outputs(matrices, upper, order, span, tables, costs, flat, codes, updates, tag):
    """Choose the codes of a block of inputs, with sub-vectors along the outputs; return the input after the last.

    Arguments as for `code_inputs`, but for costs [blocks, dim], what an error's square costs, 0 where the last sub-vector is
    padding, `flat` where all are one; codes [blocks, inputs], in the inputs' own order.
    """
    work, decoded, errors = matrices
    start, far, most = span
    sums, mass = updates
    inputs, outputs = work.shape
    books, _, dim = tables.shape
    blocks = len(codes)
    stop = min(inputs, start + most)
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
                    decoded[at, c] = word
                    error = work[at, c] - word
                    errors[at - start, c] = error / own
                    if len(mass):
                        weight = costs[first + b, j] / (np.float64(own) * own)
                        sums[book, k, j] += weight * error
                        mass[book, k, j] += weight
            _compensate(work, upper, errors, start, at, 1, far, left, right)
        first = last
    return stop
