"""Loops of the linear layer for one token in whole numbers: the lookups of `lookup` without lanes. `one_token_floats` has the others.

Tables hold integers of 24 bits, as three byte tables in vector registers, from which AVX-512 VBMI reads 64
entries at a time. The scale keeps every sum below 2^31, so integer sums are exact and the result is as good as one in float32.
One core of a Sapphire Rapids makes 10e9 lookups a second.

The codes of an embedding are stored entry by entry. They are transposed 1024 entries at a time in the cache first, which takes two
thirds of the time of their lookups; reading them in place takes ten times as long as both.

Arguments as in `lookup`. Not used: 8-bit tables (1 % error) and 16-bit ones (1.6 times as fast, 5e-5).
"""

from __future__ import annotations

import numpy as np

from rpq_convert.kernels.cpu.lookup import ZERO, clear, fetch_codebook
from rpq_convert.kernels.jit.byte_tables import (
    add_planes,
    load_bytes,
    load_first_bytes,
    position_of,
    table_lookup,
    transpose_bytes,
    write_planes,
)
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import AHEAD, prefetch, read_float, read_int, write_float
from rpq_convert.kernels.jit.vectors import load, multiply_add, spread

POSITIONS = np.array([position_of(i) for i in range(64)], np.int64)
ROWS_AT_ONCE = 1024  # entries whose codes are transposed at a time
ROW_STRIDE = (
    ROWS_AT_ONCE + 64
)  # bytes of a block's codes then: blocks a power of two apart would share their place in the cache
TABLE_BYTES = 768  # bytes of a table's three byte tables


@njit(cache=True, nogil=True)
def integer_scale(x, norms, shape):
    """Return the factor that keeps every table value below 2^23 and every sum of them below 2^31; NaN for a NaN in x.

    norms [stages, books] are those of the longest codewords, so that |x_b| times the norm bounds a block's table.
    """
    stages, count, blocks, dim, _, _ = shape
    most = 0.0
    everything = 0.0
    for b in range(blocks):
        square = 0.0
        for j in range(dim):
            square += np.float64(read_float(x + 4 * (b * dim + j))) ** 2
        for s in range(stages):
            bound = np.sqrt(square) * read_float(norms + 4 * (s * count + b * count // blocks))
            most = max(most, bound)
            everything += bound
    if not np.isfinite(everything):
        return np.nan
    return min(8388000.0 / most, 2147000000.0 / everything) if most > 0 else 1.0


@njit(cache=True, nogil=True)
def products(book, dim, x, factor):
    """Return codewords [dim, 256] x [dim] times a factor: sixteen registers, the codebook read front to back."""
    tag = np.int16(0)
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = a8 = a9 = a10 = a11 = a12 = a13 = a14 = a15 = spread(ZERO, tag)
    for j in range(dim):
        v = spread(read_float(x + 4 * j) * factor, tag)
        c = book + 1024 * j
        a0 = multiply_add(v, load(c + 0, tag), a0)
        a1 = multiply_add(v, load(c + 64, tag), a1)
        a2 = multiply_add(v, load(c + 128, tag), a2)
        a3 = multiply_add(v, load(c + 192, tag), a3)
        a4 = multiply_add(v, load(c + 256, tag), a4)
        a5 = multiply_add(v, load(c + 320, tag), a5)
        a6 = multiply_add(v, load(c + 384, tag), a6)
        a7 = multiply_add(v, load(c + 448, tag), a7)
        a8 = multiply_add(v, load(c + 512, tag), a8)
        a9 = multiply_add(v, load(c + 576, tag), a9)
        a10 = multiply_add(v, load(c + 640, tag), a10)
        a11 = multiply_add(v, load(c + 704, tag), a11)
        a12 = multiply_add(v, load(c + 768, tag), a12)
        a13 = multiply_add(v, load(c + 832, tag), a13)
        a14 = multiply_add(v, load(c + 896, tag), a14)
        a15 = multiply_add(v, load(c + 960, tag), a15)
    return a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15


@njit(cache=True, nogil=True)
def byte_table(book, dim, x, scale, to):
    """to [3, 256] = the bytes of codewords x times the scale, rounded."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = products(book, dim, x, np.float32(scale))
    write_planes(to, 256, a0, a1, a2, a3)
    write_planes(to + 64, 256, a4, a5, a6, a7)
    write_planes(to + 128, 256, a8, a9, a10, a11)
    write_planes(to + 192, 256, a12, a13, a14, a15)


@njit(cache=True, nogil=True)
def load_table(planes):
    return load_bytes(planes), load_bytes(planes + 64), load_bytes(planes + 128), load_bytes(planes + 192)


@njit(cache=True, nogil=True)
def look_up(row, n, planes, y):
    """Add table[code] to y [n, padded to 64] int32, in the order of `natural`, for codes side by side."""
    a0, a1, a2, a3 = load_table(planes)
    b0, b1, b2, b3 = load_table(planes + 256)
    c0, c1, c2, c3 = load_table(planes + 512)
    for r in range(0, n, 64):
        prefetch(row + r + AHEAD)
        k = load_bytes(row + r) if r + 64 <= n else load_first_bytes(row + r, n - r)
        add_planes(
            y + 4 * r, table_lookup(k, a0, a1, a2, a3), table_lookup(k, b0, b1, b2, b3), table_lookup(k, c0, c1, c2, c3)
        )


@njit(cache=True, nogil=True)
def one_lookup_integer(coded, books, shape, low, high, x, scale, planes, room, y):
    """Add blocks `low` to `high` of one token's lookup to y, as `look_up` has it; rows lie side by side."""
    codes, by_stage, by_block, _by_row = coded
    stages, _count, _blocks, dim, n, _half = shape
    for s in range(stages):
        for b in range(low, high):
            byte_table(fetch_codebook(books, shape, s, b, room), dim, x + 4 * dim * b, scale, planes)
            look_up(codes + s * by_stage + b * by_block, n, planes, y)


@njit(cache=True, nogil=True)
def all_tables(books, shape, x, scale, room, to):
    """to [stages, blocks, 3, 256]: the byte tables of every block."""
    stages, _count, blocks, dim, _n, _half = shape
    for s in range(stages):
        for b in range(blocks):
            byte_table(
                fetch_codebook(books, shape, s, b, room),
                dim,
                x + 4 * dim * b,
                scale,
                to + TABLE_BYTES * (s * blocks + b),
            )


@njit(cache=True, nogil=True)
def transpose_codes(codes, by_row, blocks, low, high, to, by_block):
    """Write rows `low` to `high` of codes that lie row by row as [blocks padded to 64, rows padded to 16]."""
    for r in range(low, high, 16):
        for b in range(0, blocks, 64):
            tile = codes + r * by_row + b
            transpose_bytes(tile, by_row, min(16, high - r), min(64, blocks - b), to + by_block * b + r - low, by_block)


@njit(cache=True, nogil=True)
def lookup_rows(codes, by_stage, by_row, shape, low, high, tables, transposed, y):
    """Write the lookups of rows `low` to `high`, at most ROWS_AT_ONCE, whose codes lie row by row, to y, as `look_up` has it.

    turned [blocks, padded to 64, ROW_STRIDE] bytes is scratch.
    """
    stages, _count, blocks, _dim, _n, _half = shape
    clear(y, ROWS_AT_ONCE)
    for s in range(stages):
        transpose_codes(codes + s * by_stage, by_row, blocks, low, high, transposed, ROW_STRIDE)
        for b in range(blocks):
            look_up(transposed + ROW_STRIDE * b, high - low, tables + TABLE_BYTES * (s * blocks + b), y)


@njit(cache=True, nogil=True)
def store_integers(y, parts, part_stride, n, scale, first, scales, bias, out):
    """Write the sums as rows `first` to `first + n` of out, float32, scaled and shifted; NaN where the scale is."""
    step = 1 / scale
    for r in range(n):
        at = y + 4 * (r // 64 * 64 + POSITIONS[r % 64])
        value = np.int64(read_int(at))
        for p in range(1, parts):
            value += read_int(at + p * part_stride)
        result = np.float32(value * step)
        if scales != 0:
            result *= read_float(scales + 4 * (first + r))
        if bias != 0:
            result += read_float(bias + 4 * (first + r))
        write_float(out + 4 * (first + r), result)
