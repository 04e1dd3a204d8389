"""What one thread does of a linear layer: the tasks that `team` runs over the loops of `lookup`.

A task's array holds its arguments as whole numbers, in the order of `Fields`. Each task is written for one number of
lanes, as plain C functions take no type.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from rpq_convert.kernels.cpu import few_tokens as d
from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.cpu import one_token as t
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.threads import COUNT, FIRST, NEXT, SCRATCH, SCRATCH_BYTES, SLOT
from rpq_convert.kernels.jit.vectors import address_of, take_number, write_float

TOTAL = 40
ZERO = np.float32(0)
# where the codes lie and their shape; one order for all tasks
CODES, BY_STAGE, BY_BLOCK, BY_ROW, BOOKS, STAGES, BOOK_COUNT, BLOCKS, DIM, ROWS, HALF = range(FIRST, FIRST + 11)
# linear: whether tables are looked up, what comes in and goes out, and how the work is cut
(
    LOOKS, X, WIDE_IN, ENTERS, FACTORS, TOKENS, OUT, WIDE_OUT, LEAVES, SCALES, BIAS, PART_BLOCKS, ENTERED, SUMS, SUMS_BYTES,
    PARTS, DONE, BY_TOKEN_IN, BY_COLUMN_IN, BY_TOKEN_OUT, BY_COLUMN_OUT, LATER,
) = range(FIRST + 11, FIRST + 33)  # fmt: skip
# gradient: sides [groups, columns, lanes] that fill and meet the bins
FILL, MEET, GROUPS, AT_ONCE, GRAD, GRAD_BYTES, OTHER = range(FIRST + 11, FIRST + 18)


@njit(cache=True, nogil=True)
def _line(floats):
    return (floats + 15) // 16 * 16


@njit(cache=True, nogil=True)
def _shape(a):
    return a[STAGES], a[BOOK_COUNT], a[BLOCKS], a[DIM], a[ROWS], a[HALF]


@njit(cache=True, nogil=True)
def _kernel(tag, a, low, high, x, tables, y):
    room = tables + 1024 * k.TOGETHER * k.width(tag)
    codes, books, shape = a[CODES], a[BOOKS], _shape(a)
    if a[LOOKS]:
        k.lookup(tag, codes, a[BY_STAGE], a[BY_BLOCK], a[BY_ROW], books, shape, low, high, x, tables, room, y)
    else:
        k.bins(tag, codes, a[BY_STAGE], a[BY_BLOCK], a[BY_ROW], books, shape, low, high, x, tables, room, y)


@njit(cache=True, nogil=True)
def _enter(tag, a, group, to):
    lanes = k.width(tag)
    tokens = min(lanes, a[TOKENS] - group * lanes)
    x = a[X] + 4 * group * lanes * a[BY_TOKEN_IN]
    k.enter(tag, x, a[BY_TOKEN_IN], a[BY_COLUMN_IN], tokens, a[WIDE_IN], a[ENTERS], a[FACTORS], to)
    return tokens


@njit(cache=True, nogil=True)
def _leave(tag, a, group, y, parts, low, high):
    lanes = k.width(tag)
    tokens = min(lanes, a[TOKENS] - group * lanes)
    out = a[OUT] + 4 * group * lanes * a[BY_TOKEN_OUT]
    by_token, by_column = a[BY_TOKEN_OUT], a[BY_COLUMN_OUT]
    k.leave(tag, y, parts, a[SUMS_BYTES], low, high, a[SCALES], a[BIAS], out, by_token, by_column, tokens)


@njit(cache=True, nogil=True)
def _groups(tag, a, base):
    """Serve whole groups of tokens, start to end."""
    lanes = k.width(tag)
    x = a[SCRATCH] + take_number(base + 8 * SLOT) * a[SCRATCH_BYTES]
    y = x + 4 * _line(lanes * a[ENTERS])
    tables = y + 4 * _line(lanes * a[LEAVES])
    while True:
        group = take_number(base + 8 * NEXT)
        if group >= a[COUNT]:
            return
        _enter(tag, a, group, x)
        k.clear(y, lanes * a[LEAVES])
        _kernel(tag, a, 0, a[BLOCKS], x, tables, y)
        _leave(tag, a, group, y, 1, 0, a[WIDE_OUT])


@njit(cache=True, nogil=True)
def _parts(tag, a, base):
    """Serve ranges of blocks of one group: bins write rows of their own, lookups sums of their own.

    Whoever finishes last adds the sums up and writes the result, unless that is worth a task of its own (LATER).
    """
    lanes = k.width(tag)
    row, dim = 4 * lanes, a[DIM]
    x = a[SCRATCH] + take_number(base + 8 * SLOT) * a[SCRATCH_BYTES]
    tables = x + 4 * _line(lanes * a[ENTERS])
    if not a[LOOKS]:
        _enter(tag, a, 0, x)
    while True:
        part = take_number(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        high = min(low + a[PART_BLOCKS], a[BLOCKS])
        y = a[SUMS] + part * a[SUMS_BYTES]
        if a[LOOKS]:  # its own columns of x are all that a part needs
            first = low * dim
            factors = a[FACTORS] + 4 * first if a[FACTORS] != 0 else 0
            k.enter(
                tag, a[X] + 4 * first * a[BY_COLUMN_IN], a[BY_TOKEN_IN], a[BY_COLUMN_IN], min(lanes, a[TOKENS]),
                min(a[WIDE_IN], high * dim) - first, (high - low) * dim, factors, x + row * first,
            )  # fmt: skip
            k.clear(y, lanes * a[LEAVES])
            _kernel(tag, a, low, high, x, tables, y)
            if not a[LATER] and take_number(base + 8 * DONE) == a[COUNT] - 1:
                _leave(tag, a, 0, a[SUMS], a[PARTS], 0, a[WIDE_OUT])
        else:
            for i in range(low * dim, high * dim):
                k.store(y + row * i, k.spread(ZERO, tag))
            _kernel(tag, a, low, high, x, tables, y)
            _leave(tag, a, 0, y, 1, low * dim, min(high * dim, a[WIDE_OUT]))


CHUNK = 1024  # rows of a sum that leave at a time


@njit(cache=True, nogil=True)
def _leaves(tag, a, base):
    while True:
        low = CHUNK * take_number(base + 8 * NEXT)
        if low >= CHUNK * a[COUNT]:
            return
        _leave(tag, a, 0, a[SUMS], a[PARTS], low, min(low + CHUNK, a[WIDE_OUT]))


@njit(cache=True, nogil=True)
def _enters(tag, a, base):
    """Bring every group of one operand into lanes, for the gradient."""
    while True:
        group = take_number(base + 8 * NEXT)
        if group >= a[COUNT]:
            return
        _enter(tag, a, group, a[ENTERED] + 4 * k.width(tag) * a[ENTERS] * group)


@njit(cache=True, nogil=True)
def _gradient(tag, a, base):
    lanes = k.width(tag)
    bins = a[SCRATCH] + take_number(base + 8 * SLOT) * a[SCRATCH_BYTES]
    while True:
        part = take_number(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        k.book_gradient(
            tag, a[CODES], a[BY_STAGE], a[BY_BLOCK], a[BY_ROW], a[BOOKS], _shape(a), low,
            min(low + a[PART_BLOCKS], a[BLOCKS]), a[FILL], a[MEET], a[GROUPS], a[AT_ONCE], bins,
            bins + 1024 * lanes * a[AT_ONCE], a[GRAD] + part * a[GRAD_BYTES], a[OTHER],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _one(a, low, high, scale, tables, y):
    """Serve blocks `low` to `high` of a single token, with integer tables where the scale is a number."""
    room = tables + 1024 * k.TOGETHER
    codes, books, shape = a[CODES], a[BOOKS], _shape(a)
    if scale == scale:
        t.one_lookup_whole(codes, a[BY_STAGE], a[BY_BLOCK], books, shape, low, high, a[X], scale, tables, room, y)
    elif a[LOOKS]:
        t.one_lookup(codes, a[BY_STAGE], a[BY_BLOCK], a[BY_ROW], books, shape, low, high, a[X], tables, room, y)
    else:
        t.one_bins(codes, a[BY_STAGE], a[BY_BLOCK], a[BY_ROW], books, shape, low, high, a[X], tables, room, y)


def one(data):
    """Serve ranges of blocks of a single token; whoever finishes last adds their sums up and writes the result.

    FACTORS holds the norms where integer tables are possible. Lookups of a part have sums of their own, bins rows.
    """
    a, base = carray(data, TOTAL), address_of(data)
    tables = a[SCRATCH] + take_number(base + 8 * SLOT) * a[SCRATCH_BYTES]
    scale = t.integer_scale(a[X], a[FACTORS], _shape(a)) if a[FACTORS] != 0 else np.nan
    while True:
        part = take_number(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        high = min(low + a[PART_BLOCKS], a[BLOCKS])
        y = a[SUMS] + part * a[SUMS_BYTES]
        if a[LOOKS]:
            k.clear(y, d.padded(a[LEAVES]))
        else:
            for i in range(low * a[DIM], high * a[DIM]):
                write_float(y + 4 * i, ZERO)
        _one(a, low, high, scale, tables, y)
        if take_number(base + 8 * DONE) < a[COUNT] - 1:
            continue
        if scale == scale:
            t.one_leave_whole(a[SUMS], a[PARTS], a[SUMS_BYTES], a[ROWS], scale, 0, a[SCALES], a[BIAS], a[OUT])
        else:
            t.one_leave(a[SUMS], a[PARTS], a[SUMS_BYTES], a[WIDE_OUT], a[SCALES], a[BIAS], a[OUT])


def entries(data):
    """Serve a single token of an embedding whose codes lie entry by entry, `TURNED` entries at a time."""
    a, base = carray(data, TOTAL), address_of(data)
    tables = a[SCRATCH] + take_number(base + 8 * SLOT) * a[SCRATCH_BYTES]
    shape = _shape(a)
    turned = tables + t.PLANES * a[STAGES] * a[BLOCKS]
    y = turned + t.TURNED_LINE * d.padded(a[BLOCKS])
    scale = t.integer_scale(a[X], a[FACTORS], shape)
    t.all_tables(a[BOOKS], shape, a[X], scale, y, tables)
    while True:
        low = take_number(base + 8 * NEXT) * t.TURNED
        if low >= a[ROWS]:
            return
        high = min(low + t.TURNED, a[ROWS])
        t.entries(a[CODES], a[BY_STAGE], a[BY_ROW], shape, low, high, tables, turned, y)
        t.one_leave_whole(y, 1, 0, high - low, scale, low, a[SCALES], a[BIAS], a[OUT])


def turns(data):
    """Write codes that lie row by row to OUT [stages, blocks padded to 64, LEAVES bytes], `TURNED` rows at a time."""
    a, base = carray(data, TOTAL), address_of(data)
    by_stage = a[LEAVES] * d.padded(a[BLOCKS])
    while True:
        low = take_number(base + 8 * NEXT) * t.TURNED
        if low >= a[ROWS]:
            return
        high = min(low + t.TURNED, a[ROWS])
        for s in range(a[STAGES]):
            to = a[OUT] + s * by_stage + low
            t.turn_rows(a[CODES] + s * a[BY_STAGE], a[BY_ROW], a[BLOCKS], low, high, to, a[LEAVES])


def dots(data):
    """Serve ranges of blocks of a few tokens by digits: BOOKS and FACTORS hold those of codewords and their units."""
    a, base = carray(data, TOTAL), address_of(data)
    x = a[SCRATCH] + take_number(base + 8 * SLOT) * a[SCRATCH_BYTES]
    by = 3 * d.padded(a[ROWS]) + d.REST
    for token in range(a[TOKENS]):
        d.digits(a[X] + 4 * token * a[BY_TOKEN_IN], a[ROWS], x + by * token)
    if a[TOKENS] > 1:
        for token in range(a[TOKENS], (a[TOKENS] + d.TOGETHER - 1) // d.TOGETHER * d.TOGETHER):
            k.clear(x + by * token, by // 4)
    while True:
        part = take_number(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        d.blocks_dot(
            a[CODES], a[BY_STAGE], a[BY_BLOCK], a[BOOKS], a[FACTORS], _shape(a), low, min(low + a[PART_BLOCKS], a[BLOCKS]),
            x, a[TOKENS], a[WIDE_OUT], a[SCALES], a[BIAS], a[OUT],
        )  # fmt: skip


def groups8(data):
    _groups(np.int8(0), carray(data, TOTAL), address_of(data))


def groups16(data):
    _groups(np.int16(0), carray(data, TOTAL), address_of(data))


def parts8(data):
    _parts(np.int8(0), carray(data, TOTAL), address_of(data))


def parts16(data):
    _parts(np.int16(0), carray(data, TOTAL), address_of(data))


def leaves8(data):
    _leaves(np.int8(0), carray(data, TOTAL), address_of(data))


def leaves16(data):
    _leaves(np.int16(0), carray(data, TOTAL), address_of(data))


def enters8(data):
    _enters(np.int8(0), carray(data, TOTAL), address_of(data))


def enters16(data):
    _enters(np.int16(0), carray(data, TOTAL), address_of(data))


def gradient8(data):
    _gradient(np.int8(0), carray(data, TOTAL), address_of(data))


def gradient16(data):
    _gradient(np.int16(0), carray(data, TOTAL), address_of(data))


TASKS = {
    8: (groups8, parts8, leaves8, enters8, gradient8),
    16: (groups16, parts16, leaves16, enters16, gradient16),
}
