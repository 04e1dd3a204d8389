"""What one thread does of a linear layer: the tasks that `threads` runs over the loops of `lookup`, `one_token` and `few_tokens`.

A task's array holds its arguments as integers, in the order of the field names below. Each task is written for one number of
lanes, as C functions cannot take a type.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from rpq_convert.kernels.cpu import few_tokens as d
from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.cpu import one_token as t
from rpq_convert.kernels.cpu import one_token_floats as f
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import address_of, fetch_add, read_float, write_float
from rpq_convert.kernels.jit.threads import COUNT, FIRST, NEXT, SCRATCH, SCRATCH_BYTES, SLOT

TOTAL = 40
ZERO = np.float32(0)
# the codes, the codebooks and their shape: one order for all tasks
CODES, BY_STAGE, BY_BLOCK, BY_ROW, BOOKS, STAGES, BOOK_COUNT, BLOCKS, DIM, ROWS, HALF = range(FIRST, FIRST + 11)
# linear: lookups or bins, input and output, and how the work is divided
(
    LOOKUP, X, WIDTH_IN, PADDED_IN, FACTORS, TOKENS, OUT, WIDTH_OUT, PADDED_OUT, SCALES, BIAS, PART_BLOCKS, LOADED, SUMS, SUMS_BYTES,
    PARTS, DONE, BY_TOKEN_IN, BY_COLUMN_IN, BY_TOKEN_OUT, BY_COLUMN_OUT, ADD_LATER, INPUT_SCALES,
) = range(FIRST + 11, FIRST + 34)  # fmt: skip
# gradient: operands [groups, columns, lanes] that fill the bins, and that multiply them
FILLING, MULTIPLYING, GROUPS, AT_ONCE, GRAD, GRAD_BYTES, INPUT_GRAD = range(FIRST + 11, FIRST + 18)


@njit(cache=True, nogil=True)
def _line(floats):
    return (floats + 15) // 16 * 16


@njit(cache=True, nogil=True)
def _coded(a):
    return a[CODES], a[BY_STAGE], a[BY_BLOCK], a[BY_ROW]


@njit(cache=True, nogil=True)
def _shape(a):
    return a[STAGES], a[BOOK_COUNT], a[BLOCKS], a[DIM], a[ROWS], a[HALF]


@njit(cache=True, nogil=True)
def _kernel(tag, a, low, high, x, tables, y):
    room = tables + 1024 * k.TOGETHER * k.width(tag)
    coded, books, shape = _coded(a), a[BOOKS], _shape(a)
    if a[LOOKUP]:
        k.lookup(tag, coded, books, shape, low, high, x, tables, room, y)
    else:
        k.bins(tag, coded, books, shape, low, high, x, tables, room, y)


@njit(cache=True, nogil=True)
def _load_tokens(tag, a, group, to):
    lanes = k.width(tag)
    tokens = min(lanes, a[TOKENS] - group * lanes)
    x = a[X] + 4 * group * lanes * a[BY_TOKEN_IN]
    k.load_tokens(tag, x, a[BY_TOKEN_IN], a[BY_COLUMN_IN], tokens, a[WIDTH_IN], a[PADDED_IN], a[FACTORS], to)
    return tokens


@njit(cache=True, nogil=True)
def _store_results(tag, a, group, y, parts, low, high):
    lanes = k.width(tag)
    tokens = min(lanes, a[TOKENS] - group * lanes)
    out = a[OUT] + 4 * group * lanes * a[BY_TOKEN_OUT]
    strides = a[BY_TOKEN_OUT], a[BY_COLUMN_OUT]
    k.store_results(tag, y, (parts, a[SUMS_BYTES]), (low, high), a[SCALES], a[BIAS], out, strides, tokens)


@njit(cache=True, nogil=True)
def _groups(tag, a, base):
    """Serve whole groups of tokens, start to end."""
    lanes = k.width(tag)
    x = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    y = x + 4 * _line(lanes * a[PADDED_IN])
    tables = y + 4 * _line(lanes * a[PADDED_OUT])
    while True:
        group = fetch_add(base + 8 * NEXT)
        if group >= a[COUNT]:
            return
        _load_tokens(tag, a, group, x)
        k.clear(y, lanes * a[PADDED_OUT])
        _kernel(tag, a, 0, a[BLOCKS], x, tables, y)
        _store_results(tag, a, group, y, 1, 0, a[WIDTH_OUT])


@njit(cache=True, nogil=True)
def _parts(tag, a, base):
    """Serve ranges of blocks of one group: bins write rows of their own, lookups sums of their own.

    Whoever finishes last adds the sums up and writes the result, unless that is worth a task of its own (ADD_LATER).
    """
    lanes = k.width(tag)
    row, dim = 4 * lanes, a[DIM]
    x = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    tables = x + 4 * _line(lanes * a[PADDED_IN])
    if not a[LOOKUP]:
        _load_tokens(tag, a, 0, x)
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        high = min(low + a[PART_BLOCKS], a[BLOCKS])
        y = a[SUMS] + part * a[SUMS_BYTES]
        if a[LOOKUP]:  # its own columns of x are all that a part needs
            first = low * dim
            factors = a[FACTORS] + 4 * first if a[FACTORS] != 0 else 0
            k.load_tokens(
                tag, a[X] + 4 * first * a[BY_COLUMN_IN], a[BY_TOKEN_IN], a[BY_COLUMN_IN], min(lanes, a[TOKENS]),
                min(a[WIDTH_IN], high * dim) - first, (high - low) * dim, factors, x + row * first,
            )  # fmt: skip
            k.clear(y, lanes * a[PADDED_OUT])
            _kernel(tag, a, low, high, x, tables, y)
            if not a[ADD_LATER] and fetch_add(base + 8 * DONE) == a[COUNT] - 1:
                _store_results(tag, a, 0, a[SUMS], a[PARTS], 0, a[WIDTH_OUT])
        else:
            for i in range(low * dim, high * dim):
                k.store(y + row * i, k.spread(ZERO, tag))
            _kernel(tag, a, low, high, x, tables, y)
            _store_results(tag, a, 0, y, 1, low * dim, min(high * dim, a[WIDTH_OUT]))


CHUNK = 1024  # rows of partial sums that are added at a time


@njit(cache=True, nogil=True)
def _add_parts(tag, a, base):
    while True:
        low = CHUNK * fetch_add(base + 8 * NEXT)
        if low >= CHUNK * a[COUNT]:
            return
        _store_results(tag, a, 0, a[SUMS], a[PARTS], low, min(low + CHUNK, a[WIDTH_OUT]))


@njit(cache=True, nogil=True)
def _load_groups(tag, a, base):
    """Write every group of tokens of one operand with tokens as lanes, for the gradient."""
    while True:
        group = fetch_add(base + 8 * NEXT)
        if group >= a[COUNT]:
            return
        _load_tokens(tag, a, group, a[LOADED] + 4 * k.width(tag) * a[PADDED_IN] * group)


@njit(cache=True, nogil=True)
def _gradient(tag, a, base):
    lanes = k.width(tag)
    bins = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        k.book_gradient(
            tag, _coded(a), a[BOOKS], _shape(a), (low, min(low + a[PART_BLOCKS], a[BLOCKS])), (a[FILLING], a[MULTIPLYING]),
            (a[GROUPS], a[AT_ONCE]), (bins, bins + 1024 * lanes * a[AT_ONCE]), a[GRAD] + part * a[GRAD_BYTES], a[INPUT_GRAD],
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _scaled(a, room):
    """Return the address of one token [enters], padded with zeros where it was multiplied, into `room`, by INPUT_SCALES."""
    if a[INPUT_SCALES] == 0:
        return a[X]
    for i in range(a[WIDTH_IN]):
        write_float(room + 4 * i, read_float(a[X] + 4 * i) * read_float(a[INPUT_SCALES] + 4 * i))
    for i in range(a[WIDTH_IN], a[PADDED_IN]):
        write_float(room + 4 * i, ZERO)
    return room


@njit(cache=True, nogil=True)
def _one_token(a, x, low, high, scale, tables, y):
    """Serve blocks `low` to `high` of a single token, with integer tables where the scale is a number."""
    room = tables + 1024 * f.EIGHT
    coded, books, shape = _coded(a), a[BOOKS], _shape(a)
    if scale == scale:
        t.one_lookup_integer(coded, books, shape, low, high, x, scale, tables, room, y)
    elif a[LOOKUP]:
        f.one_lookup(coded, books, shape, low, high, x, tables, room, y)
    elif a[LOADED] != 0:
        f.one_decoded(coded, a[LOADED], shape, low, high, x, y)
    else:
        f.one_bins(coded, books, shape, low, high, x, tables, room, y)


def one_token(data):
    """Serve ranges of blocks of a single token; whoever finishes last adds their sums up and writes the result.

    FACTORS holds the norms where integer tables are possible, LOADED whole codewords where they are read. Lookups of a part have
    sums of their own, bins rows.
    """
    a, base = carray(data, TOTAL), address_of(data)
    own = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    x, tables = _scaled(a, own), own + 4 * _line(a[PADDED_IN])
    scale = t.integer_scale(x, a[FACTORS], _shape(a)) if a[FACTORS] != 0 else np.nan
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        high = min(low + a[PART_BLOCKS], a[BLOCKS])
        y = a[SUMS] + part * a[SUMS_BYTES]
        if a[LOOKUP]:
            k.clear(y, d.padded(a[PADDED_OUT]))
        else:
            for i in range(low * a[DIM], high * a[DIM]):
                write_float(y + 4 * i, ZERO)
        _one_token(a, x, low, high, scale, tables, y)
        if fetch_add(base + 8 * DONE) < a[COUNT] - 1:
            continue
        if scale == scale:
            t.store_integers(a[SUMS], a[PARTS], a[SUMS_BYTES], a[ROWS], scale, 0, a[SCALES], a[BIAS], a[OUT])
        else:
            f.store_floats(a[SUMS], a[PARTS], a[SUMS_BYTES], a[WIDTH_OUT], a[SCALES], a[BIAS], a[OUT])


def one_token_rows(data):
    """Serve a single token of an embedding whose codes lie entry by entry, ROWS_AT_ONCE entries at a time."""
    a, base = carray(data, TOTAL), address_of(data)
    own = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    x, tables, shape = _scaled(a, own), own + 4 * _line(a[PADDED_IN]), _shape(a)
    transposed = tables + t.TABLE_BYTES * a[STAGES] * a[BLOCKS]
    y = transposed + t.ROW_STRIDE * d.padded(a[BLOCKS])
    scale = t.integer_scale(x, a[FACTORS], shape)
    t.all_tables(a[BOOKS], shape, x, scale, y, tables)
    while True:
        low = fetch_add(base + 8 * NEXT) * t.ROWS_AT_ONCE
        if low >= a[ROWS]:
            return
        high = min(low + t.ROWS_AT_ONCE, a[ROWS])
        t.lookup_rows(a[CODES], a[BY_STAGE], a[BY_ROW], shape, low, high, tables, transposed, y)
        t.store_integers(y, 1, 0, high - low, scale, low, a[SCALES], a[BIAS], a[OUT])


def transpose(data):
    """Write codes that lie row by row to OUT [stages, blocks padded to 64, PADDED_OUT bytes], ROWS_AT_ONCE rows at a time."""
    a, base = carray(data, TOTAL), address_of(data)
    by_stage = a[PADDED_OUT] * d.padded(a[BLOCKS])
    while True:
        low = fetch_add(base + 8 * NEXT) * t.ROWS_AT_ONCE
        if low >= a[ROWS]:
            return
        high = min(low + t.ROWS_AT_ONCE, a[ROWS])
        for s in range(a[STAGES]):
            to = a[OUT] + s * by_stage + low
            t.transpose_codes(a[CODES] + s * a[BY_STAGE], a[BY_ROW], a[BLOCKS], low, high, to, a[PADDED_OUT])


def few_tokens(data):
    """Serve ranges of blocks of a few tokens by digits: BOOKS and FACTORS hold those of codewords and their units."""
    a, base = carray(data, TOTAL), address_of(data)
    x = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    by = 3 * d.padded(a[ROWS]) + d.REST
    if a[INPUT_SCALES] != 0:  # of one token
        d.digits(_scaled(a, x + by), a[ROWS], x)
    else:
        for token in range(a[TOKENS]):
            d.digits(a[X] + 4 * token * a[BY_TOKEN_IN], a[ROWS], x + by * token)
    if a[TOKENS] > 1:
        for token in range(a[TOKENS], (a[TOKENS] + d.TOGETHER - 1) // d.TOGETHER * d.TOGETHER):
            k.clear(x + by * token, by // 4)
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            return
        low = part * a[PART_BLOCKS]
        d.blocks_dot(
            _coded(a), (a[BOOKS], a[FACTORS]), _shape(a), (low, min(low + a[PART_BLOCKS], a[BLOCKS])), x, a[TOKENS],
            a[WIDTH_OUT], a[SCALES], a[BIAS], a[OUT],
        )  # fmt: skip


def groups8(data):
    _groups(np.int8(0), carray(data, TOTAL), address_of(data))


def groups16(data):
    _groups(np.int16(0), carray(data, TOTAL), address_of(data))


def parts8(data):
    _parts(np.int8(0), carray(data, TOTAL), address_of(data))


def parts16(data):
    _parts(np.int16(0), carray(data, TOTAL), address_of(data))


def add8(data):
    _add_parts(np.int8(0), carray(data, TOTAL), address_of(data))


def add16(data):
    _add_parts(np.int16(0), carray(data, TOTAL), address_of(data))


def load8(data):
    _load_groups(np.int8(0), carray(data, TOTAL), address_of(data))


def load16(data):
    _load_groups(np.int16(0), carray(data, TOTAL), address_of(data))


def gradient8(data):
    _gradient(np.int8(0), carray(data, TOTAL), address_of(data))


def gradient16(data):
    _gradient(np.int16(0), carray(data, TOTAL), address_of(data))


TASKS = {
    8: (groups8, parts8, add8, load8, gradient8),
    16: (groups16, parts16, add16, load16, gradient16),
}
