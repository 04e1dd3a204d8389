"""Loops that decode a whole matrix, or some of its rows, and the gradients of both.

Codes are addressed as in `lookup`. Tables are [stages, books, 256, dim] where a sub-vector is contiguous in the result (`axis` "in"), and
[stages, books, dim, 256] where it runs along a column of the result ("out"). No index of eight bytes per weight and no array beside the
result exists at any time. The arithmetic is that of `reference.decode`, in its order, so the bits are the same.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import (
    address_of,
    fetch_add,
    read_byte,
    read_float,
    read_long,
    read_short,
    write_float,
    write_short,
)
from rpq_convert.kernels.jit.threads import COUNT, FIRST, NEXT
from rpq_convert.kernels.jit.vectors import LANES, load, multiply, spread, store, width

TOTAL = 32
(
    CODES, BY_STAGE, BY_BLOCK, BY_ROW, TABLES, STAGES, BOOKS, BLOCKS, DIM, ROWS, LENGTH, OUT, OUT_STRIDE, SCALES, INDEX,
    STEP, GRAD, GRAD_BYTES,
) = range(FIRST, FIRST + 18)  # fmt: skip
TILE = 16  # rows decoded together, so that their codes share cache lines
SOME = 16  # blocks of a tile that are decoded together
TWO, FOUR, EIGHT, SIXTEEN = (LANES[lanes] for lanes in (2, 4, 8, 16))
ZERO, ONE = np.float32(0), np.float32(1)


@njit(cache=True, nogil=True)
def _book(a, stage, block):
    return a[TABLES] + 1024 * a[DIM] * (stage * a[BOOKS] + block * a[BOOKS] // a[BLOCKS])


@njit(cache=True, nogil=True)
def _row(a, position):
    """Return the row of M at a position of the result: the index's, or the position itself."""
    return read_long(a[INDEX] + 8 * position) if a[INDEX] != 0 else position


@njit(cache=True, nogil=True)
def _copy_words(tag, code, by_code, table, by_table, to, count, factor):
    """`_copy` for sub-vectors of one register."""
    row, times = 4 * width(tag), spread(factor, tag)
    for i in range(count):
        word = table + i * by_table + row * read_byte(code + i * by_code)
        store(to + row * i, multiply(load(word, tag), times))


@njit(cache=True, nogil=True)
def _copy(code, by_code, table, by_table, to, count, dim, factor):
    """Write `count` sub-vectors side by side, times a factor; the table moves on by `by_table` bytes per sub-vector."""
    if dim == 1:
        for i in range(count):
            write_float(to + 4 * i, read_float(table + i * by_table + 4 * read_byte(code + i * by_code)) * factor)
    elif dim == 2:
        _copy_words(TWO, code, by_code, table, by_table, to, count, factor)
    elif dim == 4:
        _copy_words(FOUR, code, by_code, table, by_table, to, count, factor)
    elif dim == 8:
        _copy_words(EIGHT, code, by_code, table, by_table, to, count, factor)
    elif dim % 16 == 0:
        times = spread(factor, SIXTEEN)
        for i in range(count):
            word = table + i * by_table + 4 * dim * read_byte(code + i * by_code)
            for j in range(0, 4 * dim, 64):
                store(to + 4 * dim * i + j, multiply(load(word + j, SIXTEEN), times))
    else:
        for i in range(count):
            word = table + i * by_table + 4 * dim * read_byte(code + i * by_code)
            for j in range(0, 4 * dim, 4):
                write_float(to + 4 * dim * i + j, read_float(word + j) * factor)


@njit(cache=True, nogil=True)
def _more(code, by_code, table, by_table, to, count, dim, factor):
    """Add one more stage to what `_copy` wrote, then multiply by the factor."""
    for i in range(count):
        word = table + i * by_table + 4 * dim * read_byte(code + i * by_code)
        at = to + 4 * dim * i
        for j in range(0, 4 * dim, 4):
            write_float(at + j, (read_float(at + j) + read_float(word + j)) * factor)


@njit(cache=True, nogil=True)
def _rows(a, low, high, begin, end):
    """out [positions, length] = rows of M, for positions `low` to `high` and blocks `begin` to `end`."""
    dim, blocks, stages = a[DIM], a[BLOCKS], a[STAGES]
    whole = a[LENGTH] // dim if a[BOOKS] == 1 or a[BOOKS] == blocks else 0
    by_table = 1024 * dim if a[BOOKS] > 1 else 0
    # codes of a row side by side are read in one go; else the rows of a tile share cache lines, some blocks at a time
    step = max(1, whole) if a[BY_BLOCK] == 1 else SOME
    for first in range(begin, min(whole, end), step):
        count = min(step, min(whole, end) - first)
        for p in range(low, high):
            r = _row(a, p)
            scale = read_float(a[SCALES] + 4 * r) if a[SCALES] != 0 else ONE
            to = a[OUT] + 4 * (p * a[OUT_STRIDE] + first * dim)
            for s in range(stages):
                code = a[CODES] + s * a[BY_STAGE] + first * a[BY_BLOCK] + r * a[BY_ROW]
                factor = scale if s == stages - 1 else ONE
                if s == 0:
                    _copy(code, a[BY_BLOCK], _book(a, s, first), by_table, to, count, dim, factor)
                else:
                    _more(code, a[BY_BLOCK], _book(a, s, first), by_table, to, count, dim, factor)
    for b in range(max(whole, begin), end):  # a padded last sub-vector, or codebooks shared by some blocks
        for p in range(low, high):
            r = _row(a, p)
            scale = read_float(a[SCALES] + 4 * r) if a[SCALES] != 0 else ONE
            to = a[OUT] + 4 * (p * a[OUT_STRIDE] + b * dim)
            for j in range(min(dim, a[LENGTH] - b * dim)):
                value = ZERO
                for s in range(stages):
                    code = read_byte(a[CODES] + s * a[BY_STAGE] + b * a[BY_BLOCK] + r * a[BY_ROW])
                    part = read_float(_book(a, s, b) + 4 * (dim * code + j))
                    value = part if s == 0 else value + part
                write_float(to + 4 * j, value * scale)


@njit(cache=True, nogil=True)
def outside(index, count, entries):
    """Return the first of `count` int64 that is no entry's number, or -1 where all are; -2 for a negative one."""
    for i in range(count):
        value = read_long(index + 8 * i)
        if value < 0:
            return -2
        if value >= entries:
            return value
    return -1


@njit(cache=True, nogil=True)
def _pick(code, by_row, table, to, n, factor):
    for r in range(n):
        write_float(to + 4 * r, read_float(table + 4 * read_byte(code + r * by_row)) * factor)


@njit(cache=True, nogil=True)
def _pick_more(code, by_row, table, to, n, factor):
    for r in range(n):
        at = to + 4 * r
        write_float(at, (read_float(at) + read_float(table + 4 * read_byte(code + r * by_row))) * factor)


@njit(cache=True, nogil=True)
def _columns(a, b):
    """out [length, n] = M transposed, rows of block `b`."""
    dim, stages = a[DIM], a[STAGES]
    for j in range(min(dim, a[LENGTH] - b * dim)):
        to = a[OUT] + 4 * (b * dim + j) * a[OUT_STRIDE]
        scale = read_float(a[SCALES] + 4 * (b * dim + j)) if a[SCALES] != 0 else ONE
        for s in range(stages):
            code = a[CODES] + s * a[BY_STAGE] + b * a[BY_BLOCK]
            factor = scale if s == stages - 1 else ONE
            if s == 0:
                _pick(code, a[BY_ROW], _book(a, s, b) + 1024 * j, to, a[ROWS], factor)
            else:
                _pick_more(code, a[BY_ROW], _book(a, s, b) + 1024 * j, to, a[ROWS], factor)


@njit(cache=True, nogil=True)
def _rows_short(a, low, high):
    """As `_rows`, for one stage of 16-bit numbers without scales, which are copied whatever they mean."""
    dim, blocks = a[DIM], a[BLOCKS]
    for b in range(blocks):
        begin = b * dim
        book = a[TABLES] + 512 * dim * (b * a[BOOKS] // blocks)
        for p in range(low, high):
            r = _row(a, p)
            to = a[OUT] + 2 * (p * a[OUT_STRIDE] + begin)
            word = book + 2 * dim * read_byte(a[CODES] + b * a[BY_BLOCK] + r * a[BY_ROW])
            for j in range(min(dim, a[LENGTH] - begin)):
                write_short(to + 2 * j, read_short(word + 2 * j))


@njit(cache=True, nogil=True)
def _columns_short(a, b):
    dim = a[DIM]
    for j in range(min(dim, a[LENGTH] - b * dim)):
        to = a[OUT] + 2 * (b * dim + j) * a[OUT_STRIDE]
        word = a[TABLES] + 512 * (dim * (b * a[BOOKS] // a[BLOCKS]) + j)
        for r in range(a[ROWS]):
            write_short(to + 2 * r, read_short(word + 2 * read_byte(a[CODES] + b * a[BY_BLOCK] + r * a[BY_ROW])))


@njit(cache=True, nogil=True)
def _gradient_rows(a, low, high, grad):
    """grad [stages, books, 256, dim] += OUT [positions, length] times scales, by code."""
    dim = a[DIM]
    for s in range(a[STAGES]):
        for b in range(a[BLOCKS]):
            begin = b * dim
            book = 256 * (s * a[BOOKS] + b * a[BOOKS] // a[BLOCKS])
            for p in range(low, high):
                r = _row(a, p)
                factor = read_float(a[SCALES] + 4 * r) if a[SCALES] != 0 else ONE
                code = read_byte(a[CODES] + s * a[BY_STAGE] + b * a[BY_BLOCK] + r * a[BY_ROW])
                to, value = grad + 4 * dim * (book + code), a[OUT] + 4 * (p * a[OUT_STRIDE] + begin)
                for j in range(min(dim, a[LENGTH] - begin)):
                    write_float(to + 4 * j, read_float(to + 4 * j) + read_float(value + 4 * j) * factor)


@njit(cache=True, nogil=True)
def _gradient_columns(a, low, high, grad):
    """The same for OUT [length, n] and blocks `low` to `high`."""
    dim = a[DIM]
    for s in range(a[STAGES]):
        for b in range(low, high):
            book = 256 * (s * a[BOOKS] + b * a[BOOKS] // a[BLOCKS])
            code = a[CODES] + s * a[BY_STAGE] + b * a[BY_BLOCK]
            for j in range(min(dim, a[LENGTH] - b * dim)):
                value = a[OUT] + 4 * (b * dim + j) * a[OUT_STRIDE]
                factor = read_float(a[SCALES] + 4 * (b * dim + j)) if a[SCALES] != 0 else ONE
                for r in range(a[ROWS]):
                    to = grad + 4 * (dim * (book + read_byte(code + r * a[BY_ROW])) + j)
                    write_float(to, read_float(to) + read_float(value + 4 * r) * factor)


# ---- tasks: numbers count steps of STEP positions, or blocks -----------------------------------------------------------


def rows(data):
    a, base = carray(data, TOTAL), address_of(data)
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        high = min((part + 1) * a[STEP], a[ROWS])
        for low in range(part * a[STEP], high, TILE):
            _rows(a, low, min(low + TILE, high), 0, a[BLOCKS])


def columns(data):
    a, base = carray(data, TOTAL), address_of(data)
    while True:
        block = fetch_add(base + 8 * NEXT)
        if block >= a[COUNT]:
            return
        _columns(a, block)


def rows_short(data):
    a, base = carray(data, TOTAL), address_of(data)
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        high = min((part + 1) * a[STEP], a[ROWS])
        for low in range(part * a[STEP], high, TILE):
            _rows_short(a, low, min(low + TILE, high))


def columns_short(data):
    a, base = carray(data, TOTAL), address_of(data)
    while True:
        block = fetch_add(base + 8 * NEXT)
        if block >= a[COUNT]:
            return
        _columns_short(a, block)


def gradient_rows(data):
    a, base = carray(data, TOTAL), address_of(data)
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        _gradient_rows(a, part * a[STEP], min((part + 1) * a[STEP], a[ROWS]), a[GRAD] + part * a[GRAD_BYTES])


def gradient_columns(data):
    a, base = carray(data, TOTAL), address_of(data)
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        _gradient_columns(a, part * a[STEP], min((part + 1) * a[STEP], a[BLOCKS]), a[GRAD] + part * a[GRAD_BYTES])
