"""One token times the weight of a layer cut along its outputs, decoded in registers, in whole numbers.

Bins are plain numbers, one code at a time: 2.3e9 a second of a core (Sapphire Rapids). But the codes of a block all have one
codebook, and a codebook's coordinate is itself a table of 256: a byte table for each of three digits, from which AVX-512
VBMI picks 64 at a time, and VNNI multiplies them by the digits of x. That takes 5 nanoseconds for 64 codes and coordinate,
so bins are faster from dim 8 on.

Digits go from -128 to 127 with base 256. x and codewords have 24 bits, sums of whole numbers are exact, and the product of
the lowest digits, which is left out, is 2^-32 of the highest: the result is as good as one in float32.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rpq_convert.kernels.lookup import ZERO
from rpq_convert.kernels.single import load_table
from rpq_convert.kernels.vectors import (
    AHEAD,
    absolute,
    add_ints,
    dot_bytes,
    greater,
    halves,
    load,
    load_bytes,
    load_first_bytes,
    load_ints,
    multiply,
    multiply_add,
    no_ints,
    pick,
    prefetch,
    read_float,
    spread,
    store,
    subtract_ints,
    to_floats,
    total,
    write_digits,
    write_float,
)

LONGEST = 1 << 18  # codes of a row for which sums of products of digits stay below 2^31
TOP = 8_355_000.0  # of what three digits hold: 127 (1 + 256 + 65536)
REST = 256  # bytes after the digits: 64 floats of scratch, then what the sums of a row start from


@njit(cache=True, nogil=True)
def padded(count):
    return (count + 63) // 64 * 64


@njit(cache=True, nogil=True)
def digits(x, count, to):
    """Write x [count] as digits [3, padded], the lowest first, and what sums start from; return what a unit of them is.

    NaN where x is not finite. Codewords' digits come as bytes without a sign, 128 too large, so sums start from -128 times
    those of x's digits.
    """
    tag = np.int16(0)
    length = padded(count)
    rest = to + 3 * length
    whole = count // 64 * 64
    for i in range(64):
        write_float(rest + 4 * i, read_float(x + 4 * (whole + i)) if whole + i < count else ZERO)
    most = nothing = spread(ZERO, tag)
    for i in range(0, whole + 64, 16):
        v = load(x + 4 * i if i < whole else rest + 4 * (i - whole), tag)
        most = greater(most, absolute(v))
        nothing = multiply_add(v, spread(ZERO, tag), nothing)
    bad = total(nothing)
    last = load(rest, tag)
    store(rest, most)
    high = ZERO
    for i in range(16):
        high = max(high, read_float(rest + 4 * i))
    store(rest, last)
    step = np.float64(high) / TOP + bad if high > 0 else 1.0 + bad
    factor = spread(np.float32(1 / step), tag)
    x0 = x1 = x2 = no_ints()
    half = halves()
    for i in range(0, length, 64):
        v = x + 4 * i if i < whole else rest
        write_digits(
            to + i, length, multiply(load(v, tag), factor), multiply(load(v + 64, tag), factor),
            multiply(load(v + 128, tag), factor), multiply(load(v + 192, tag), factor),
        )  # fmt: skip
        x0 = dot_bytes(x0, half, load_bytes(to + i))
        x1 = dot_bytes(x1, half, load_bytes(to + length + i))
        x2 = dot_bytes(x2, half, load_bytes(to + 2 * length + i))
    top = subtract_ints(no_ints(), x2)
    following = subtract_ints(top, x1)
    store(rest, top)
    store(rest + 64, following)
    store(rest + 128, subtract_ints(following, x0))
    store(rest + 192, subtract_ints(subtract_ints(no_ints(), x1), x0))
    return step


@njit(cache=True, nogil=True)
def row_dot(row, count, book, x):
    """Return the sum over a row's codes of numbers picked from book [3, 256] times those of x, over 2^16, as 16 parts."""
    tag = np.int16(0)
    length = padded(count)
    l0, l1, l2, l3 = load_table(book)
    m0, m1, m2, m3 = load_table(book + 256)
    h0, h1, h2, h3 = load_table(book + 512)
    starts = x + 3 * length
    top, next_a, last_a = load_ints(starts), load_ints(starts + 64), load_ints(starts + 128)
    next_b = last_b = last_c = no_ints()
    rest = load_ints(starts + 192)
    for i in range(0, count, 64):
        prefetch(row + i + AHEAD)
        k = load_bytes(row + i) if i + 64 <= count else load_first_bytes(row + i, count - i)
        low, middle, high = pick(k, l0, l1, l2, l3), pick(k, m0, m1, m2, m3), pick(k, h0, h1, h2, h3)
        x0, x1, x2 = load_bytes(x + i), load_bytes(x + length + i), load_bytes(x + 2 * length + i)
        top = dot_bytes(top, high, x2)
        next_a = dot_bytes(next_a, high, x1)
        next_b = dot_bytes(next_b, middle, x2)
        last_a = dot_bytes(last_a, high, x0)
        last_b = dot_bytes(last_b, middle, x1)
        last_c = dot_bytes(last_c, low, x2)
        rest = dot_bytes(dot_bytes(rest, low, x1), middle, x0)
    last = to_floats(add_ints(last_a, add_ints(last_b, last_c)))
    last = multiply_add(to_floats(rest), spread(np.float32(1 / 256), tag), last)
    upper = multiply_add(to_floats(add_ints(next_a, next_b)), spread(np.float32(256), tag), last)
    return multiply_add(to_floats(top), spread(np.float32(65536), tag), upper)


@njit(cache=True, nogil=True)
def blocks_dot(codes, by_stage, by_block, books, steps, shape, low, high, x, step, wide_out, scales, bias, out):
    """Write the outputs of blocks `low` to `high`, those below `wide_out`, scaled and shifted.

    books [stages, books, dim, 3, 256] are the codewords' digits, steps [stages, books] 2^16 units of them; x the digits of
    the token, `step` a unit of those.
    """
    stages, count, blocks, dim, n, _half = shape
    tag = np.int16(0)
    for b in range(low, high):
        for j in range(dim):
            to = b * dim + j
            if to >= wide_out:
                return
            sums = spread(ZERO, tag)
            for s in range(stages):
                at = s * count + b * count // blocks
                found = row_dot(codes + s * by_stage + b * by_block, n, books + 768 * (at * dim + j), x)
                sums = multiply_add(found, spread(read_float(steps + 4 * at), tag), sums)
            value = total(sums) * np.float32(step)
            if scales != 0:
                value *= read_float(scales + 4 * to)
            if bias != 0:
                value += read_float(bias + 4 * to)
            write_float(out + 4 * to, value)
