"""Products of many tokens with a coded matrix that expand no more of it than stays in the cache.

What is expanded is OUTPUTS columns by some 192 terms, in the order in which vector registers read it, and it is multiplied by all
tokens at once. `tiled_linear` expands rows for torch's own product instead, which orders them once more; and that product, of Intel's
library, is less than half as fast as AMD's registers allow. So these are faster than a dense layer there.
"""

from __future__ import annotations

import threading

import numpy as np
from numba import carray
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import address_of, fetch_add, read_byte, read_float, read_long, write_float
from rpq_convert.kernels.jit.register_tiles import BYTES, OUTPUTS, TOKENS, multiply_tile
from rpq_convert.kernels.jit.threads import COUNT, FIRST, NEXT, SCRATCH, SCRATCH_BYTES, SLOT, run
from rpq_convert.kernels.jit.vectors import LANES, add, load, multiply, store

TOTAL = 48
(
    CODES, BY_STAGE, BY_BLOCK, BY_ROW, BOOKS, STAGES, BOOK_COUNT, BLOCKS, DIM, ROWS, HALF,
    LOOKUP, X, BY_IMAGE_IN, BY_TOKEN_IN, BY_COLUMN_IN, FACTORS, TOTAL_TOKENS, PER_IMAGE, WIDTH_IN, TERMS, LOADED,
    OUT, BY_IMAGE_OUT, BY_TOKEN_OUT, BY_COLUMN_OUT, SCALES, BIAS, WIDTH_OUT,
) = range(FIRST, FIRST + 29)  # fmt: skip
DEPTH = 192  # terms expanded at a time: with twelve tokens they fill a first-level cache of 32 KiB
SLAB = 1 << 23  # bytes of tokens that are held in their new order at a time
LEAST = 240  # tokens, or more of them where they are short
SIXTEEN = LANES[16]


@njit(cache=True, nogil=True)
def _load_group(a, group):
    """Write TOKENS tokens, times FACTORS, as [pieces of TERMS terms, groups, TOKENS, TERMS]; those beyond the last are zeros."""
    groups = (a[TOTAL_TOKENS] + TOKENS - 1) // TOKENS
    for t in range(TOKENS):
        number = group * TOKENS + t
        there = number < a[TOTAL_TOKENS]
        from_ = a[X] + 4 * (number // a[PER_IMAGE] * a[BY_IMAGE_IN] + number % a[PER_IMAGE] * a[BY_TOKEN_IN])
        for first in range(0, a[WIDTH_IN], a[TERMS]):
            to = a[LOADED] + 4 * a[TERMS] * TOKENS * (first // a[TERMS] * groups + group) + 4 * t * a[TERMS]
            count = min(a[TERMS], a[WIDTH_IN] - first)
            i = 0
            if not there:
                for i in range(count):
                    write_float(to + 4 * i, k.ZERO)
                continue
            if a[BY_COLUMN_IN] == 1:
                while i + 16 <= count:
                    values = load(from_ + 4 * (first + i), SIXTEEN)
                    if a[FACTORS] != 0:
                        values = multiply(values, load(a[FACTORS] + 4 * (first + i), SIXTEEN))
                    store(to + 4 * i, values)
                    i += 16
            while i < count:
                value = read_float(from_ + 4 * (first + i) * a[BY_COLUMN_IN])
                if a[FACTORS] != 0:
                    value *= read_float(a[FACTORS] + 4 * (first + i))
                write_float(to + 4 * i, value)
                i += 1


@njit(cache=True, nogil=True)
def _write(to, value, more):
    write_float(to, read_float(to) + value if more else value)


@njit(cache=True, nogil=True)
def _pick(code, by_code, count, table, to, apart, more):
    """Write the numbers of a table [256] that `count` codes name, `apart` bytes from one to the next; `more` adds them."""
    i = 0
    if by_code == 1:
        while i + 8 <= count:  # eight codes in one read
            eight = read_long(code + i)
            for j in range(8):
                _write(to + (i + j) * apart, read_float(table + 4 * ((eight >> 8 * j) & 255)), more)
            i += 8
    while i < count:
        _write(to + i * apart, read_float(table + 4 * read_byte(code + i * by_code)), more)
        i += 1


@njit(cache=True, nogil=True)
def _expand(a, low, columns, first, count, room, to):
    """Write columns `low` to `low + columns` and terms `first` to `first + count` of the product's matrix as [terms, OUTPUTS]."""
    shape = a[STAGES], a[BOOK_COUNT], a[BLOCKS], a[DIM], a[ROWS], a[HALF]
    dim = a[DIM]
    start, length = (first, count) if a[LOOKUP] else (low, columns)  # what is cut into sub-vectors
    across = low if a[LOOKUP] else first
    for b in range(start // dim, (start + length + dim - 1) // dim):
        begin = b * dim - start
        for s in range(a[STAGES]):
            book = k.fetch_codebook(a[BOOKS], shape, s, b, room)
            code = a[CODES] + s * a[BY_STAGE] + b * a[BY_BLOCK] + across * a[BY_ROW]
            for j in range(max(0, -begin), min(dim, length - begin)):
                table = book + 1024 * j
                if a[LOOKUP]:
                    row = to + 4 * OUTPUTS * (begin + j)
                    if s == 0:
                        _pick(code, a[BY_ROW], columns, table, row, 4, False)
                    else:
                        _pick(code, a[BY_ROW], columns, table, row, 4, True)
                elif s == 0:
                    _pick(code, a[BY_ROW], count, table, to + 4 * (begin + j), 4 * OUTPUTS, False)
                else:
                    _pick(code, a[BY_ROW], count, table, to + 4 * (begin + j), 4 * OUTPUTS, True)


@njit(cache=True, nogil=True)
def _store(a, sums, low, columns):
    """Write sums [groups, TOKENS, OUTPUTS] as columns `low` to `low + columns` of the result, scaled and shifted."""
    for number in range(a[TOTAL_TOKENS]):
        from_ = sums + 4 * OUTPUTS * number
        out = a[OUT] + 4 * (number // a[PER_IMAGE] * a[BY_IMAGE_OUT] + number % a[PER_IMAGE] * a[BY_TOKEN_OUT])
        i = 0
        if a[BY_COLUMN_OUT] == 1:
            while i + 16 <= columns:
                values = load(from_ + 4 * i, SIXTEEN)
                if a[SCALES] != 0:
                    values = multiply(values, load(a[SCALES] + 4 * (low + i), SIXTEEN))
                if a[BIAS] != 0:
                    values = add(values, load(a[BIAS] + 4 * (low + i), SIXTEEN))
                store(out + 4 * (low + i), values)
                i += 16
        while i < columns:
            value = read_float(from_ + 4 * i)
            if a[SCALES] != 0:
                value *= read_float(a[SCALES] + 4 * (low + i))
            if a[BIAS] != 0:
                value += read_float(a[BIAS] + 4 * (low + i))
            write_float(out + 4 * (low + i) * a[BY_COLUMN_OUT], value)
            i += 1


def load_tokens(data):
    """Bring groups of tokens into their new order."""
    a, base = carray(data, TOTAL), address_of(data)
    while True:
        group = fetch_add(base + 8 * NEXT)
        if group >= a[COUNT]:
            return
        _load_group(a, group)


def products(data):
    """Make OUTPUTS columns of the result for all tokens."""
    a, base = carray(data, TOTAL), address_of(data)
    weights = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]  # [TERMS, OUTPUTS]
    groups = (a[TOTAL_TOKENS] + TOKENS - 1) // TOKENS
    sums = weights + 4 * OUTPUTS * a[TERMS]
    room = sums + BYTES * groups
    while True:
        low = OUTPUTS * fetch_add(base + 8 * NEXT)
        if low >= OUTPUTS * a[COUNT]:
            return
        columns = min(OUTPUTS, a[WIDTH_OUT] - low)
        if columns < OUTPUTS:
            k.clear(weights, OUTPUTS * a[TERMS])
        k.clear(sums, BYTES // 4 * groups)
        for first in range(0, a[WIDTH_IN], a[TERMS]):
            count = min(a[TERMS], a[WIDTH_IN] - first)
            _expand(a, low, columns, first, count, room, weights)
            x = a[LOADED] + 4 * a[TERMS] * TOKENS * groups * (first // a[TERMS])
            for group in range(groups):
                at = x + 4 * a[TERMS] * TOKENS * group
                multiply_tile(at, weights, count, 4 * a[TERMS], sums + BYTES * group)
        _store(a, sums, low, columns)


_local = threading.local()


def _room(size: int) -> np.ndarray:
    """Return `size` floats of this thread that the next call overwrites; fresh pages cost as much as filling them."""
    held = getattr(_local, "room", None)
    if held is None or held.size < size:
        held = np.empty(size, np.float32)
        if 4 * size <= SLAB:
            _local.room = held
    return held


def multiply_all(
    lookup: bool, x: Tensor, codes: Tensor, books: Tensor, layout: Layout, half: bool, factors: int, scales: int, bias: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Write `x M^T` (`lookup`) or `x M` to out [images, tokens, rows], x [images, tokens, columns]; float32 of any strides.

    Args:
        books: codebooks [stages, books, dim, 256], float16 where `half`, else float32.
        factors, scales, bias: addresses of float32, or 0: what multiplies the columns of x and those of the result, and what is
            added to these.
    """
    width_in, width_out = (layout.length, layout.n) if lookup else (layout.n, layout.length)
    unit = layout.dim if lookup else 1
    terms = min(max(1, DEPTH // unit) * unit, -(-width_in // unit) * unit)
    depth = -(-width_in // terms) * terms
    most = TOKENS * max(LEAST, SLAB // (4 * depth)) // TOKENS
    images, tokens, _ = x.shape
    step = max(1, most // tokens)
    for image in range(0, images, step):
        for token in range(0, tokens, most):
            given, result = (
                x[image : image + step, token : token + most],
                out[image : image + step, token : token + most],
            )
            total = given.shape[0] * given.shape[1]
            groups = -(-total // TOKENS)
            loaded = _room(groups * TOKENS * depth)
            fields = (
                codes.data_ptr(), *codes.stride(), books.data_ptr(), *layout.shape, half,
                lookup, given.data_ptr(), *given.stride(), factors, total, given.shape[1], width_in, terms, loaded.ctypes.data,
                result.data_ptr(), *result.stride(), scales, bias, width_out,
            )  # fmt: skip
            run(load_tokens, fields, groups)
            run(products, fields, -(-width_out // OUTPUTS), OUTPUTS * terms + BYTES // 4 * groups + layout.room)
            del loaded  # until here: only its address was used
