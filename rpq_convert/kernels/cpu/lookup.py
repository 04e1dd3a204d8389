"""Loops of the linear layer that never expands its weight: lookups and bins, for 8 or 16 tokens at a time.

The rows of `M [n, L]` are cut into sub-vectors ("blocks"). A product with M or its transpose needs two primitives. Tokens stand side
by side in a vector register, one per lane:

* lookup: `y[row] = sum_b T_b[code[b, row]]`, where `T_b[k] = <x_b, codeword k>` is a table of 256 rows made once per block;
* bins: `B_b[code[b, row]] += x[row]`, then `y_b = codebook_b^T B_b`, its transpose.

Sub-vectors along the inputs make a lookup forward and bins backward; along the outputs it is the reverse. Both replace `n L`
multiply-adds per token by `256 L`, and `n L / dim` additions of rows. `one_token` and `few_tokens` serve fewer tokens.

Arguments that loops share, all addresses plain integers:
    coded: the address of codes, and the bytes from stage to stage, from block to block, and from row to row.
    books: the address of codebooks, float32 or float16 [stages, books, dim, 256], codewords side by side.
    shape: (stages, books, blocks, dim, n, whether codebooks are float16).
    tag: says by its type how many lanes a register has (`vectors.LANES`).
Everything else is float32.
"""

from __future__ import annotations

import numpy as np

from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import prefetch, read_byte, read_float, write_float
from rpq_convert.kernels.jit.vectors import (
    add,
    add_pairs,
    load,
    load_float16,
    multiply,
    multiply_add,
    spread,
    store,
    transpose_floats,
    width,
)

TOGETHER = 4  # blocks whose tables stand in the cache at once
ZERO = np.float32(0)


@njit(cache=True, nogil=True)
def rounded_up(number, step):
    return (number + step - 1) // step * step


@njit(cache=True, nogil=True)
def clear(address, floats):
    """Zero a stretch of floats, 16 at a time; `floats` is rounded up."""
    zero = spread(ZERO, np.int16(0))
    for i in range(0, floats, 16):
        store(address + 4 * i, zero)


@njit(cache=True, nogil=True)
def fetch_codebook(books, shape, stage, block, room):
    """Return the address of a block's codebook as float32 [dim, 256]; float16 ones are widened into `room`.

    It is read, or prefetched, from front to back here, as later loops read it with a stride.
    """
    _stages, count, blocks, dim, _n, half = shape
    at = stage * count + block * count // blocks
    if half:
        start = books + 512 * dim * at
        for i in range(0, 256 * dim, 16):
            store(room + 4 * i, load_float16(start + 2 * i))
        return room
    start = books + 1024 * dim * at
    if count > 1:
        for line in range(0, 1024 * dim, 64):
            prefetch(start + line)
    return start


@njit(cache=True, nogil=True)
def load_tokens(tag, x, by_token, by_column, tokens, length, padded, factors, to):
    """Write x [tokens, length] of any strides, times `factors [length]` if given, as [padded, lanes], the rest zeros.

    Sixteen columns at a time, a cache line of every token: rows a power of two apart share their place in the cache.
    """
    row = 4 * width(tag)
    full = tokens == width(tag) and factors == 0
    if full and by_token == 1:  # pixels of an image: tokens lie side by side already
        for i in range(length):
            store(to + row * i, load(x + 4 * i * by_column, tag))
        for i in range(length, padded):  # not by `clear`, which rounds up: the next row need not be ours
            store(to + row * i, spread(ZERO, tag))
        return
    for first in range(0, padded, 16):
        last = min(first + 16, padded)
        if full and width(tag) == 16 and by_column == 1 and first + 16 <= length:
            transpose_floats(x + 4 * first, 4 * by_token, to + row * first, row)
            continue
        for t in range(width(tag)):
            for i in range(first, last):
                value = ZERO
                if i < length and t < tokens:
                    value = read_float(x + 4 * (t * by_token + i * by_column))
                    if factors != 0:
                        value *= read_float(factors + 4 * i)
                write_float(to + row * i + 4 * t, value)


@njit(cache=True, nogil=True)
def build_table(tag, book, dim, x, out):
    """out [256, lanes] = codewords [dim, 256] x [dim, lanes]."""
    row = 4 * width(tag)
    for k in range(0, 256, 4):
        a0 = spread(ZERO, tag)
        a1 = a0
        a2 = a0
        a3 = a0
        for j in range(dim):
            v = load(x + row * j, tag)
            c = book + 4 * (256 * j + k)
            a0 = multiply_add(spread(read_float(c), tag), v, a0)
            a1 = multiply_add(spread(read_float(c + 4), tag), v, a1)
            a2 = multiply_add(spread(read_float(c + 8), tag), v, a2)
            a3 = multiply_add(spread(read_float(c + 12), tag), v, a3)
        store(out + row * k, a0)
        store(out + row * (k + 1), a1)
        store(out + row * (k + 2), a2)
        store(out + row * (k + 3), a3)


@njit(cache=True, nogil=True)
def sum_four(tag, codes, by_block, by_row, low, high, tables, y):
    row = 4 * width(tag)
    for r in range(low, high):
        c = codes + r * by_row
        a = load(y + row * r, tag)
        a = add(a, load(tables + row * read_byte(c), tag))
        a = add(a, load(tables + row * (256 + read_byte(c + by_block)), tag))
        a = add(a, load(tables + row * (512 + read_byte(c + 2 * by_block)), tag))
        a = add(a, load(tables + row * (768 + read_byte(c + 3 * by_block)), tag))
        store(y + row * r, a)


@njit(cache=True, nogil=True)
def sum_one(tag, codes, by_row, low, high, tables, y):
    row = 4 * width(tag)
    for r in range(low, high):
        store(y + row * r, add(load(y + row * r, tag), load(tables + row * read_byte(codes + r * by_row), tag)))


@njit(cache=True, nogil=True)
def lookup(tag, coded, books, shape, low, high, x, tables, room, y):
    """Add blocks `low` to `high` of the lookup to y [n, lanes]; x [blocks dim, lanes], tables and room are scratch."""
    row = 4 * width(tag)
    codes, by_stage, by_block, by_row = coded
    stages, _count, _blocks, dim, n, _half = shape
    for s in range(stages):
        b = low
        while b < high:
            some = min(TOGETHER, high - b)
            for q in range(some):
                book = fetch_codebook(books, shape, s, b + q, room)
                build_table(tag, book, dim, x + row * dim * (b + q), tables + row * 256 * q)
            at = codes + s * by_stage + b * by_block
            if some == TOGETHER:
                sum_four(tag, at, by_block, by_row, 0, n, tables, y)
            else:
                for q in range(some):
                    sum_one(tag, at + q * by_block, by_row, 0, n, tables + row * 256 * q, y)
            b += some


@njit(cache=True, nogil=True)
def multiply_bins(tag, book, dim, bins_, y):
    """y [dim, lanes] += codewords [dim, 256] bins [256, lanes]."""
    row = 4 * width(tag)
    j = 0
    while j + 4 <= dim:
        a0, a1, a2, a3 = (
            load(y + row * j, tag),
            load(y + row * (j + 1), tag),
            load(y + row * (j + 2), tag),
            load(y + row * (j + 3), tag),
        )
        c = book + 1024 * j
        for k in range(256):
            v = load(bins_ + row * k, tag)
            a0 = multiply_add(spread(read_float(c + 4 * k), tag), v, a0)
            a1 = multiply_add(spread(read_float(c + 4 * (256 + k)), tag), v, a1)
            a2 = multiply_add(spread(read_float(c + 4 * (512 + k)), tag), v, a2)
            a3 = multiply_add(spread(read_float(c + 4 * (768 + k)), tag), v, a3)
        store(y + row * j, a0)
        store(y + row * (j + 1), a1)
        store(y + row * (j + 2), a2)
        store(y + row * (j + 3), a3)
        j += 4
    while j < dim:
        a0 = load(y + row * j, tag)
        a1 = spread(ZERO, tag)
        c = book + 1024 * j
        for k in range(0, 256, 2):
            a0 = multiply_add(spread(read_float(c + 4 * k), tag), load(bins_ + row * k, tag), a0)
            a1 = multiply_add(spread(read_float(c + 4 * k + 4), tag), load(bins_ + row * (k + 1), tag), a1)
        store(y + row * j, add(a0, a1))
        j += 1


@njit(cache=True, nogil=True)
def fill_bins(tag, codes, by_block, by_row, some, n, x, bins_):
    row = 4 * width(tag)
    clear(bins_, 256 * width(tag) * some)
    for r in range(n):
        v = load(x + row * r, tag)
        for q in range(some):
            at = bins_ + row * (256 * q + read_byte(codes + q * by_block + r * by_row))
            store(at, add(load(at, tag), v))


@njit(cache=True, nogil=True)
def bins(tag, coded, books, shape, low, high, x, bins_, room, y):
    """Add to y [blocks dim, lanes] what blocks `low` to `high` make of x [n, lanes]; bins_ and room are scratch."""
    row = 4 * width(tag)
    codes, by_stage, by_block, by_row = coded
    stages, _count, _blocks, dim, n, _half = shape
    for s in range(stages):
        b = low
        while b < high:
            some = min(2, high - b)
            fill_bins(tag, codes + s * by_stage + b * by_block, by_block, by_row, some, n, x, bins_)
            for q in range(some):
                book = fetch_codebook(books, shape, s, b + q, room)
                multiply_bins(tag, book, dim, bins_ + row * 256 * q, y + row * dim * (b + q))
            b += some


@njit(cache=True, nogil=True)
def store_results(tag, y, parts, rows, scales, bias, out, strides, tokens):
    """Write rows of y [length, lanes], summed over its parts, as columns of out [tokens, length].

    parts: (how many, the bytes from one to the next); rows: (first, last + 1); strides: floats of `out` from token to token and
    from column to column. Results are multiplied by `scales` and added to `bias` [length] where given.
    """
    row = 4 * width(tag)
    count, part_bytes = parts
    low, high = rows
    by_token, by_column = strides
    for first in range(low, high, 16):
        last = min(first + 16, high)
        for i in range(first, last):
            if count > 1 or scales != 0 or bias != 0:
                a = load(y + row * i, tag)
                for p in range(1, count):
                    a = add(a, load(y + p * part_bytes + row * i, tag))
                if scales != 0:
                    a = multiply(a, spread(read_float(scales + 4 * i), tag))
                if bias != 0:
                    a = add(a, spread(read_float(bias + 4 * i), tag))
                store(y + row * i, a)
        if tokens == 16 and by_token == 1:
            for i in range(first, last):
                store(out + 4 * i * by_column, load(y + row * i, tag))
        elif tokens == 16 and by_column == 1 and last == first + 16:
            transpose_floats(y + row * first, row, out + 4 * first, 4 * by_token)
        else:
            for t in range(tokens):
                for i in range(first, last):
                    write_float(out + 4 * (t * by_token + i * by_column), read_float(y + row * i + 4 * t))


@njit(cache=True, nogil=True)
def add_outer_products(tag, bins_, some, g, by_group, dim, grad, room):
    """grad [dim, 256] += g [some, dim, lanes] bins [some, 256, lanes]^T, summed over lanes; groups of g lie `by_group` bytes apart.

    Eight bins and two columns at a time are summed in sixteen registers over all groups.
    """
    row = 4 * width(tag)
    half = np.int8(0)  # eight floats
    for j in range(0, dim, 2):
        second = row * (min(j + 1, dim - 1) - j)
        for k in range(0, 256, 8):
            a0 = spread(ZERO, tag)
            a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
            c0, c1, c2, c3, c4, c5, c6, c7 = a0, a0, a0, a0, a0, a0, a0, a0
            for q in range(some):
                u = load(g + by_group * q + row * j, tag)
                w = load(g + by_group * q + row * j + second, tag)
                at = bins_ + row * (256 * q + k)
                v = load(at, tag)
                a0, c0 = multiply_add(v, u, a0), multiply_add(v, w, c0)
                v = load(at + row, tag)
                a1, c1 = multiply_add(v, u, a1), multiply_add(v, w, c1)
                v = load(at + 2 * row, tag)
                a2, c2 = multiply_add(v, u, a2), multiply_add(v, w, c2)
                v = load(at + 3 * row, tag)
                a3, c3 = multiply_add(v, u, a3), multiply_add(v, w, c3)
                v = load(at + 4 * row, tag)
                a4, c4 = multiply_add(v, u, a4), multiply_add(v, w, c4)
                v = load(at + 5 * row, tag)
                a5, c5 = multiply_add(v, u, a5), multiply_add(v, w, c5)
                v = load(at + 6 * row, tag)
                a6, c6 = multiply_add(v, u, a6), multiply_add(v, w, c6)
                v = load(at + 7 * row, tag)
                a7, c7 = multiply_add(v, u, a7), multiply_add(v, w, c7)
            low = add_pairs(
                add_pairs(add_pairs(a0, a1), add_pairs(a2, a3)), add_pairs(add_pairs(a4, a5), add_pairs(a6, a7))
            )
            high = add_pairs(
                add_pairs(add_pairs(c0, c1), add_pairs(c2, c3)), add_pairs(add_pairs(c4, c5), add_pairs(c6, c7))
            )
            if width(tag) == 16:
                store(room, add_pairs(low, high))
            else:
                store(room, low)
                store(room + 32, high)
            here = grad + 4 * (256 * j + k)
            store(here, add(load(here, half), load(room, half)))
            if j + 1 < dim:
                store(here + 1024, add(load(here + 1024, half), load(room + 32, half)))


@njit(cache=True, nogil=True)
def book_gradient(tag, coded, books, shape, some_blocks, sides, groups, scratch, grad, dx):
    """Accumulate the gradient of the codebooks of some sub-vectors, (first, last + 1), and what the same bins give for x.

    sides: x [groups, n, lanes], which fills the bins, and g [groups, blocks dim, lanes], by which they are multiplied: grad
    [stages, books, dim, 256] gains g bins^T. With `dx` [groups, blocks dim, lanes] (or 0), codewords^T bins is added to it.
    groups: (how many, how many at once); all sub-vectors take so many before the next ones, as their rows of x stay in the
    cache. scratch: bins [at once, 256, lanes], and room for a codebook.
    """
    row = 4 * width(tag)
    codes, by_stage, by_block, by_row = coded
    low, high = some_blocks
    x, g = sides
    groups, at_once = groups
    bins_, room = scratch
    stages, count, blocks, dim, n, _half = shape
    by_group = row * dim * blocks
    for group in range(0, groups, at_once):
        some = min(at_once, groups - group)
        for s in range(stages):
            for b in range(low, high):
                for q in range(some):
                    filled, from_ = bins_ + row * 256 * q, x + row * n * (group + q)
                    fill_bins(tag, codes + s * by_stage + b * by_block, by_block, by_row, 1, n, from_, filled)
                other = by_group * group + row * dim * b
                at = s * count + b * count // blocks
                add_outer_products(tag, bins_, some, g + other, by_group, dim, grad + 1024 * dim * at, room)
                if dx != 0:
                    book = fetch_codebook(books, shape, s, b, room)
                    for q in range(some):
                        multiply_bins(tag, book, dim, bins_ + row * 256 * q, dx + other + by_group * q)
