"""Loops of the linear layer for one token in float32: the two primitives of `lookup` without lanes, for every processor.

No instruction below AVX-512 VBMI picks from a table of 256, so codes are taken one by one, and loads are what limits. Bins are single
floats. Codewords are read whole, and none is put into a table, where that takes fewer loads. Arguments as in `lookup`.
"""

from __future__ import annotations

import numpy as np

from rpq_convert.kernels.cpu.lookup import TOGETHER, ZERO, clear, fetch_codebook
from rpq_convert.kernels.cpu.one_token import ROWS_AT_ONCE, products
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import prefetch, read_byte, read_float, read_long, write_float
from rpq_convert.kernels.jit.vectors import add, load, multiply_add, multiply_add_one, spread, store, total, width

ROWS_AHEAD = 12  # rows before they are needed that the codes of one are asked for
EIGHT = 8  # blocks whose codes are read at once where they lie side by side


@njit(cache=True, nogil=True)
def float_table(book, dim, x, to):
    """to [256] = codewords x."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = products(book, dim, x, np.float32(1))
    store(to + 0, a0)
    store(to + 64, a1)
    store(to + 128, a2)
    store(to + 192, a3)
    store(to + 256, a4)
    store(to + 320, a5)
    store(to + 384, a6)
    store(to + 448, a7)
    store(to + 512, a8)
    store(to + 576, a9)
    store(to + 640, a10)
    store(to + 704, a11)
    store(to + 768, a12)
    store(to + 832, a13)
    store(to + 896, a14)
    store(to + 960, a15)


@njit(cache=True, nogil=True)
def add_side_by_side(codes, by_block, n, tables, y):
    """Add four tables' entries to y [n], for codes that lie side by side along the rows: eight are read at once.

    A code that is shifted out of eight takes an instruction where one that is read takes a place among the loads, which limit:
    twice as fast on AMD's Zen.
    """
    whole = n // 8 * 8
    for r in range(0, whole, 8):
        k0, k1 = read_long(codes + r), read_long(codes + by_block + r)
        k2, k3 = read_long(codes + 2 * by_block + r), read_long(codes + 3 * by_block + r)
        for e in range(8):
            at, bits = y + 4 * (r + e), 8 * e
            value = read_float(at) + read_float(tables + 4 * (k0 >> bits & 255))
            value += read_float(tables + 4 * (256 + (k1 >> bits & 255)))
            value += read_float(tables + 4 * (512 + (k2 >> bits & 255)))
            write_float(at, value + read_float(tables + 4 * (768 + (k3 >> bits & 255))))
    add_anywhere(codes + whole, by_block, 1, TOGETHER, n - whole, tables, y + 4 * whole)


@njit(cache=True, nogil=True)
def weigh_side_by_side(codes, by_block, n, book, x, y):
    """Add four inputs' codewords of one number, times x [4], to y [n]: no table is made where the codebook is one."""
    x0, x1, x2, x3 = read_float(x), read_float(x + 4), read_float(x + 8), read_float(x + 12)
    whole = n // 8 * 8
    for r in range(0, whole, 8):
        k0, k1 = read_long(codes + r), read_long(codes + by_block + r)
        k2, k3 = read_long(codes + 2 * by_block + r), read_long(codes + 3 * by_block + r)
        for e in range(8):
            at, bits = y + 4 * (r + e), 8 * e
            value = multiply_add_one(x0, read_float(book + 4 * (k0 >> bits & 255)), read_float(at))
            value = multiply_add_one(x1, read_float(book + 4 * (k1 >> bits & 255)), value)
            value = multiply_add_one(x2, read_float(book + 4 * (k2 >> bits & 255)), value)
            write_float(at, multiply_add_one(x3, read_float(book + 4 * (k3 >> bits & 255)), value))
    for r in range(whole, n):
        value = read_float(y + 4 * r)
        for q in range(4):
            code = read_byte(codes + q * by_block + r)
            value = multiply_add_one(read_float(x + 4 * q), read_float(book + 4 * code), value)
        write_float(y + 4 * r, value)


@njit(cache=True, nogil=True)
def add_row_by_row(codes, by_row, n, tables, y):
    """Add `EIGHT` tables' entries, for codes that lie row by row: those of eight blocks are read at once."""
    for r in range(n):
        prefetch(codes + (r + ROWS_AHEAD) * by_row)
        at, k = y + 4 * r, read_long(codes + r * by_row)
        a = read_float(at) + read_float(tables + 4 * (k & 255))
        b = read_float(tables + 4 * (256 + (k >> 8 & 255))) + read_float(tables + 4 * (512 + (k >> 16 & 255)))
        c = read_float(tables + 4 * (768 + (k >> 24 & 255))) + read_float(tables + 4 * (1024 + (k >> 32 & 255)))
        d = read_float(tables + 4 * (1280 + (k >> 40 & 255))) + read_float(tables + 4 * (1536 + (k >> 48 & 255)))
        write_float(at, (a + b) + (c + d) + read_float(tables + 4 * (1792 + (k >> 56 & 255))))


@njit(cache=True, nogil=True)
def add_anywhere(codes, by_block, by_row, some, n, tables, y):
    """The same for `some` tables and codes of any strides."""
    for r in range(n):
        value = read_float(y + 4 * r)
        for q in range(some):
            value += read_float(tables + 4 * (256 * q + read_byte(codes + q * by_block + r * by_row)))
        write_float(y + 4 * r, value)


@njit(cache=True, nogil=True)
def one_lookup(coded, books, shape, low, high, x, tables, room, y):
    """Add blocks `low` to `high` of one token's lookup to y [n] float32."""
    codes, by_stage, by_block, by_row = coded
    stages, count, _blocks, dim, n, _half = shape
    at_once = ROWS_AT_ONCE if by_block == 1 else n  # what is read of a row is still in the cache for the next blocks
    for s in range(stages):
        for first in range(0, n, at_once):
            rows, to = min(at_once, n - first), y + 4 * first
            b = low
            while b < high:
                if dim == 1 and by_row == 1 and b + TOGETHER <= high and count == 1:
                    book = fetch_codebook(books, shape, s, b, room)
                    weigh_side_by_side(codes + s * by_stage + b * by_block, by_block, n, book, x + 4 * b, y)
                    b += TOGETHER
                    continue
                some = min(EIGHT if by_block == 1 else TOGETHER, high - b)
                for q in range(some):
                    book = fetch_codebook(books, shape, s, b + q, room)
                    float_table(book, dim, x + 4 * dim * (b + q), tables + 1024 * q)
                c = codes + s * by_stage + b * by_block + first * by_row
                if some == TOGETHER and by_row == 1:
                    add_side_by_side(c, by_block, rows, tables, to)
                elif some == EIGHT:
                    add_row_by_row(c, by_row, rows, tables, to)
                else:
                    add_anywhere(c, by_block, by_row, some, rows, tables, to)
                b += some


@njit(cache=True, nogil=True)
def sum_codewords(tag, codes, by_block, n, book, x, to):
    """Add four blocks' sums over x [n] times codewords [256, lanes] to `to` [4, lanes], for codes side by side.

    Eight are summed apart, so that a sum of many rounds as seldom as one of a vector's lanes.
    """
    size = 4 * width(tag)
    a0 = a1 = a2 = a3 = spread(ZERO, tag)
    for r in range(0, n, 8):
        k0, k1 = read_long(codes + r), read_long(codes + by_block + r)
        k2, k3 = read_long(codes + 2 * by_block + r), read_long(codes + 3 * by_block + r)
        s0 = s1 = s2 = s3 = spread(ZERO, tag)
        for e in range(8):
            v, bits = spread(read_float(x + 4 * (r + e)), tag), 8 * e
            s0 = multiply_add(v, load(book + size * (k0 >> bits & 255), tag), s0)
            s1 = multiply_add(v, load(book + size * (k1 >> bits & 255), tag), s1)
            s2 = multiply_add(v, load(book + size * (k2 >> bits & 255), tag), s2)
            s3 = multiply_add(v, load(book + size * (k3 >> bits & 255), tag), s3)
        a0, a1, a2, a3 = add(a0, s0), add(a1, s1), add(a2, s2), add(a3, s3)
    store(to, add(load(to, tag), a0))
    store(to + size, add(load(to + size, tag), a1))
    store(to + 2 * size, add(load(to + 2 * size, tag), a2))
    store(to + 3 * size, add(load(to + 3 * size, tag), a3))


@njit(cache=True, nogil=True)
def dot_codewords(codes, n, book, x):
    """Return the sum over x [n] times codewords of one number, for codes side by side."""
    a0 = a1 = a2 = a3 = ZERO
    whole = n // 8 * 8
    for r in range(0, whole, 8):
        k, at = read_long(codes + r), x + 4 * r
        a0 = multiply_add_one(read_float(at), read_float(book + 4 * (k & 255)), a0)
        a1 = multiply_add_one(read_float(at + 4), read_float(book + 4 * (k >> 8 & 255)), a1)
        a2 = multiply_add_one(read_float(at + 8), read_float(book + 4 * (k >> 16 & 255)), a2)
        a3 = multiply_add_one(read_float(at + 12), read_float(book + 4 * (k >> 24 & 255)), a3)
        a0 = multiply_add_one(read_float(at + 16), read_float(book + 4 * (k >> 32 & 255)), a0)
        a1 = multiply_add_one(read_float(at + 20), read_float(book + 4 * (k >> 40 & 255)), a1)
        a2 = multiply_add_one(read_float(at + 24), read_float(book + 4 * (k >> 48 & 255)), a2)
        a3 = multiply_add_one(read_float(at + 28), read_float(book + 4 * (k >> 56 & 255)), a3)
    for r in range(whole, n):
        a0 = multiply_add_one(read_float(x + 4 * r), read_float(book + 4 * read_byte(codes + r)), a0)
    return (a0 + a1) + (a2 + a3)


@njit(cache=True, nogil=True)
def one_decoded(coded, codewords, shape, low, high, x, y):
    """Add to y [blocks dim] what blocks `low` to `high` make of one token x [n]: `decodes` says of which codes.

    codewords: float32 [stages, books, 256, dim].
    """
    codes, by_stage, by_block, _by_row = coded
    stages, count, _blocks, dim, n, _half = shape
    for s in range(stages):
        for b in range(low, high, 1 if dim == 1 else TOGETHER):
            c = codes + s * by_stage + b * by_block
            book, to = codewords + 1024 * dim * s * count, y + 4 * dim * b
            if dim == 1:
                write_float(to, read_float(to) + dot_codewords(c, n, book, x))
            elif dim == 2:
                sum_codewords(np.uint16(0), c, by_block, n, book, x, to)
            elif dim == 4:
                sum_codewords(np.uint32(0), c, by_block, n, book, x, to)
            else:
                sum_codewords(np.int8(0), c, by_block, n, book, x, to)


@njit(cache=True, nogil=True)
def one_bins(coded, books, shape, low, high, x, bins_, room, y):
    """Add to y [blocks dim] what blocks `low` to `high` make of one token x [n]."""
    codes, by_stage, by_block, by_row = coded
    stages, _count, _blocks, dim, n, _half = shape
    tag = np.int16(0)
    for s in range(stages):
        b = low
        while b < high:
            some = min(TOGETHER, high - b)
            clear(bins_, 256 * TOGETHER)
            c = codes + s * by_stage + b * by_block
            for r in range(n):
                value = read_float(x + 4 * r)
                for q in range(some):
                    at = bins_ + 4 * (256 * q + read_byte(c + q * by_block + r * by_row))
                    write_float(at, read_float(at) + value)
            for q in range(some):
                book = fetch_codebook(books, shape, s, b + q, room)
                for j in range(dim):
                    a = spread(ZERO, tag)
                    for k in range(0, 256, 16):
                        a = multiply_add(load(book + 4 * (256 * j + k), tag), load(bins_ + 4 * (256 * q + k), tag), a)
                    at = y + 4 * (dim * (b + q) + j)
                    write_float(at, read_float(at) + total(a))
            b += some


@njit(cache=True, nogil=True)
def store_floats(y, parts, part_stride, n, scales, bias, out):
    """Write y [n], summed over its parts, scaled and shifted, as out [n]."""
    for r in range(n):
        value = read_float(y + 4 * r)
        for p in range(1, parts):
            value += read_float(y + p * part_stride + 4 * r)
        if scales != 0:
            value *= read_float(scales + 4 * r)
        if bias != 0:
            value += read_float(bias + 4 * r)
        write_float(out + 4 * r, value)
