"""A few tokens times a weight whose sub-vectors run along its outputs: codes are decoded in registers, in integers.

Bins take one code at a time: 2.3e9 a second of a core (Sapphire Rapids). But the codes of a block all have one codebook, and a
coordinate of a codebook is itself a table of 256 numbers. It is kept as a byte table for each of three digits. AVX-512 VBMI reads 64
entries at a time, and VNNI multiplies them by the digits of x. That takes 5 nanoseconds for 64 codes and a coordinate, so bins are
faster from dim 6 on.

Digits go from -128 to 127 with base 256. x and codewords have 24 bits, integer sums are exact, and the product of the lowest
digits, which is left out, is 2^-32 of the highest: the result is as good as one in float32.
"""

from __future__ import annotations

import numpy as np

from rpq_convert.kernels.cpu.lookup import ZERO
from rpq_convert.kernels.cpu.one_token import load_table
from rpq_convert.kernels.jit.byte_tables import (
    add_ints,
    bytes_of_128,
    dot_bytes,
    ints_to_floats,
    load_bytes,
    load_first_bytes,
    load_ints,
    subtract_ints,
    table_lookup,
    write_digits,
    zero_ints,
)
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import AHEAD, prefetch, read_float, write_float
from rpq_convert.kernels.jit.vectors import absolute, greater, load, multiply, multiply_add, spread, store, total

LONGEST = 1 << 18  # codes of a row for which sums of products of digits stay below 2^31
TOP = 8_355_000.0  # of what three digits hold: 127 (1 + 256 + 65536)
REST = 320  # bytes after the digits: what the sums of a row start from (64 floats of scratch before), a unit's size
TOGETHER = 4  # tokens that share what was picked


@njit(cache=True, nogil=True)
def padded(count):
    return (count + 63) // 64 * 64


@njit(cache=True, nogil=True)
def digits(x, count, to):
    """Write x [count] as digits [3, padded], the lowest first, what sums start from, and what a unit of them is.

    The unit is NaN where x is not finite. Codewords' digits come as bytes without a sign, 128 too large, so sums start from -128 times
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
    unit = np.float64(high) / TOP + bad if high > 0 else 1.0 + bad
    factor = spread(np.float32(1 / unit), tag)
    x0 = x1 = x2 = zero_ints()
    half = bytes_of_128()
    for i in range(0, length, 64):
        v = x + 4 * i if i < whole else rest
        write_digits(
            to + i, length, multiply(load(v, tag), factor), multiply(load(v + 64, tag), factor),
            multiply(load(v + 128, tag), factor), multiply(load(v + 192, tag), factor),
        )  # fmt: skip
        x0 = dot_bytes(x0, half, load_bytes(to + i))
        x1 = dot_bytes(x1, half, load_bytes(to + length + i))
        x2 = dot_bytes(x2, half, load_bytes(to + 2 * length + i))
    top = subtract_ints(zero_ints(), x2)
    following = subtract_ints(top, x1)
    store(rest, top)
    store(rest + 64, following)
    store(rest + 128, subtract_ints(following, x0))
    store(rest + 192, subtract_ints(subtract_ints(zero_ints(), x1), x0))
    write_float(rest + 256, np.float32(unit))


@njit(cache=True, nogil=True)
def start_sums(x, length):
    """Return what the sums of a token's row start from: products of digits by their weight, the highest first."""
    rest = x + 3 * length
    return load_ints(rest), load_ints(rest + 64), load_ints(rest + 128), load_ints(rest + 192)


@njit(cache=True, nogil=True)
def add_products(low, middle, high, x, length, top, following, third, last):
    """Add the products of 64 codewords' digits and those of x to the sums; the lowest of all is left out."""
    x0, x1, x2 = load_bytes(x), load_bytes(x + length), load_bytes(x + 2 * length)
    top = dot_bytes(top, high, x2)
    following = dot_bytes(dot_bytes(following, high, x1), middle, x2)
    third = dot_bytes(dot_bytes(dot_bytes(third, high, x0), middle, x1), low, x2)
    return top, following, third, dot_bytes(dot_bytes(last, middle, x0), low, x1)


@njit(cache=True, nogil=True)
def join_sums(sums):
    """Return the value of a row's sums, over 2^16, as 16 parts."""
    tag = np.int16(0)
    top, following, third, last = sums
    value = multiply_add(ints_to_floats(last), spread(np.float32(1 / 256), tag), ints_to_floats(third))
    value = multiply_add(ints_to_floats(following), spread(np.float32(256), tag), value)
    return multiply_add(ints_to_floats(top), spread(np.float32(65536), tag), value)


@njit(cache=True, nogil=True)
def codes_at(row, i, count):
    """Return 64 of a row's codes, zeros after the last, and ask for later ones."""
    prefetch(row + i + AHEAD)
    return load_bytes(row + i) if i + 64 <= count else load_first_bytes(row + i, count - i)


@njit(cache=True, nogil=True)
def row_dot(row, count, book, x):
    """Return the sum over a row's codes of numbers picked from book [3, 256] times those of x."""
    length = padded(count)
    l0, l1, l2, l3 = load_table(book)
    m0, m1, m2, m3 = load_table(book + 256)
    h0, h1, h2, h3 = load_table(book + 512)
    top, following_a, third_a, last_a = start_sums(x, length)
    following_b = third_b = third_c = last_b = (
        zero_ints()
    )  # each product adds to its own: one after another they would wait
    for i in range(0, count, 64):
        k = codes_at(row, i, count)
        low, middle, high = (
            table_lookup(k, l0, l1, l2, l3),
            table_lookup(k, m0, m1, m2, m3),
            table_lookup(k, h0, h1, h2, h3),
        )
        x0, x1, x2 = load_bytes(x + i), load_bytes(x + length + i), load_bytes(x + 2 * length + i)
        top = dot_bytes(top, high, x2)
        following_a, following_b = dot_bytes(following_a, high, x1), dot_bytes(following_b, middle, x2)
        third_a, third_b = dot_bytes(third_a, high, x0), dot_bytes(third_b, middle, x1)
        third_c, last_a, last_b = dot_bytes(third_c, low, x2), dot_bytes(last_a, middle, x0), dot_bytes(last_b, low, x1)
    third = add_ints(add_ints(third_a, third_b), third_c)
    return join_sums((top, add_ints(following_a, following_b), third, add_ints(last_a, last_b)))


@njit(cache=True, nogil=True)
def row_dots(row, count, book, x, by):
    """The same for four tokens, whose digits lie `by` bytes apart."""
    length = padded(count)
    l0, l1, l2, l3 = load_table(book)
    m0, m1, m2, m3 = load_table(book + 256)
    h0, h1, h2, h3 = load_table(book + 512)
    a, b, c, d = (
        start_sums(x, length),
        start_sums(x + by, length),
        start_sums(x + 2 * by, length),
        start_sums(x + 3 * by, length),
    )
    for i in range(0, count, 64):
        k = codes_at(row, i, count)
        low, middle, high = (
            table_lookup(k, l0, l1, l2, l3),
            table_lookup(k, m0, m1, m2, m3),
            table_lookup(k, h0, h1, h2, h3),
        )
        a = add_products(low, middle, high, x + i, length, *a)
        b = add_products(low, middle, high, x + by + i, length, *b)
        c = add_products(low, middle, high, x + 2 * by + i, length, *c)
        d = add_products(low, middle, high, x + 3 * by + i, length, *d)
    return join_sums(a), join_sums(b), join_sums(c), join_sums(d)


@njit(cache=True, nogil=True)
def store_result(sums, unit, to, scales, bias, out):
    value = total(sums) * unit
    if scales != 0:
        value *= read_float(scales + 4 * to)
    if bias != 0:
        value += read_float(bias + 4 * to)
    write_float(out + 4 * to, value)


@njit(cache=True, nogil=True)
def blocks_dot(coded, digits_of, shape, some_blocks, x, tokens, width_out, scales, bias, out):
    """Write outputs [tokens, width_out] of some sub-vectors, (first, last + 1), scaled and shifted.

    digits_of: the codewords' digits [stages, books, dim, 3, 256], and 2^16 units of them [stages, books]; x: the digits of the
    tokens, with zeros up to a multiple of `TOGETHER` from two tokens on.
    """
    codes, by_stage, by_block, _by_row = coded
    books, steps = digits_of
    low, high = some_blocks
    stages, count, blocks, dim, n, _half = shape
    tag = np.int16(0)
    by = 3 * padded(n) + REST
    units = x + 3 * padded(n) + 256
    for b in range(low, high):
        for j in range(dim):
            to = b * dim + j
            if to >= width_out:
                return
            for t in range(0, tokens, TOGETHER):
                s0 = s1 = s2 = s3 = spread(ZERO, tag)
                for s in range(stages):
                    at = s * count + b * count // blocks
                    row, book = codes + s * by_stage + b * by_block, books + 768 * (at * dim + j)
                    unit = spread(read_float(steps + 4 * at), tag)
                    if tokens == 1:
                        s0 = multiply_add(row_dot(row, n, book, x), unit, s0)
                    else:
                        v0, v1, v2, v3 = row_dots(row, n, book, x + by * t, by)
                        s0, s1 = multiply_add(v0, unit, s0), multiply_add(v1, unit, s1)
                        s2, s3 = multiply_add(v2, unit, s2), multiply_add(v3, unit, s3)
                store_result(s0, read_float(units + by * t), to, scales, bias, out + 4 * width_out * t)
                if t + 1 < tokens:
                    store_result(s1, read_float(units + by * (t + 1)), to, scales, bias, out + 4 * width_out * (t + 1))
                if t + 2 < tokens:
                    store_result(s2, read_float(units + by * (t + 2)), to, scales, bias, out + 4 * width_out * (t + 2))
                if t + 3 < tokens:
                    store_result(s3, read_float(units + by * (t + 3)), to, scales, bias, out + 4 * width_out * (t + 3))
