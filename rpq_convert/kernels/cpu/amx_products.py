"""Products of many tokens with a coded matrix in Intel's AMX tiles, faster than a dense product in float32.

AMX multiplies bfloat16 alone, sixteen times as fast as vector units multiply float32. A float32 is the sum of three numbers of
bfloat16, a float16 of two. A product is then a sum of products of parts. Those below 2^-24 of the whole are left out: six are made of
float32 by float32, five for codebooks of float16. `torch.set_float32_matmul_precision("high")` leaves out what is below 2^-16, "medium"
all but the first, as it may in torch's own products. What is bfloat16 already is multiplied once, as in torch.

With lookups (`lookup`) each row of the result is a row of M, and codewords run along the sum; with bins each row of the result is a
column of M, and codewords run across the sum. In both cases a piece of 256 rows and 64 terms is expanded, split, and multiplied by all
tokens while it is in the cache; no more of the matrix is ever expanded. A tile holds 16 rows of 32 terms, or 16 pairs of terms of 16
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import expand as e
from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.jit.amx import (
    TILE,
    amx_allowed,
    load_tile,
    load_tile_config,
    multiply_tiles,
    save_tile_config,
    split_in_three,
    store_tile,
    tile_config,
    write_pair,
    write_upper,
)
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import address_of, fetch_add, prefetch
from rpq_convert.kernels.jit.threads import COUNT, NEXT, SCRATCH, SCRATCH_BYTES, SLOT, held_room, run
from rpq_convert.kernels.jit.vectors import load

TOTAL = 48
(
    LOOKUP, X, BY_IMAGE_IN, BY_TOKEN_IN, BY_COLUMN_IN, FACTORS, IMAGES, TOKENS, PER_IMAGE, GROUPS, X_PARTS, WIDTH_IN, TERMS,
    LOADED, PARTS, CONFIG, RESULT, BY_IMAGE_OUT, BY_TOKEN_OUT, BY_COLUMN_OUT, ROW_SCALES, BIAS, WIDTH_OUT, PIECE,
) = range(e.GRAD_BYTES + 1, e.GRAD_BYTES + 25)  # fmt: skip
ROWS, DEPTH = 256, 64  # of a piece
WIDEST = 128  # longest sub-vector
STRIP = 16  # rows expanded at a time
LEAST, SLAB = 256, 1024  # tokens whose parts and sums are held at a time
HELD = 1 << 25  # bytes of parts of tokens, from LEAST tokens on
SIXTEEN = np.int16(0)
_TILE_CONFIG = tile_config()


@njit(cache=True, nogil=True)
def _load_tokens(a, group, room):
    """Write the parts of 16 tokens as tiles: [pieces of terms, groups, steps of 32 terms, parts]."""
    image, start = group // a[PER_IMAGE], 16 * (group % a[PER_IMAGE])
    tokens = min(16, a[TOKENS] - start) if image < a[IMAGES] else 0
    x = a[X] + 4 * (image * a[BY_IMAGE_IN] + start * a[BY_TOKEN_IN])
    steps, parts = k.rounded_up(a[TERMS], 32) // 32, a[X_PARTS]
    for first in range(0, a[WIDTH_IN], a[TERMS]):
        length = min(a[TERMS], a[WIDTH_IN] - first)
        factors = a[FACTORS] + 4 * first if a[FACTORS] != 0 else 0
        from_ = x + 4 * first * a[BY_COLUMN_IN]
        k.load_tokens(SIXTEEN, from_, a[BY_TOKEN_IN], a[BY_COLUMN_IN], tokens, length, 32 * steps, factors, room)
        at = a[LOADED] + TILE * parts * steps * (first // a[TERMS] * a[GROUPS] + group)
        for pair in range(16 * steps):
            to = at + TILE * parts * (pair // 16) + 64 * (pair % 16)
            large, middle, small = split_in_three(load(room + 128 * pair, SIXTEEN))
            large2, middle2, small2 = split_in_three(load(room + 128 * pair + 64, SIXTEEN))
            write_pair(to, large, large2)
            if parts > 1:
                write_pair(to + TILE, middle, middle2)
            if parts > 2:
                write_pair(to + 2 * TILE, small, small2)


@njit(cache=True, nogil=True)
def _split(row, number, steps, parts, to):
    """Write a row of float32 as row `number` of tiles [rows / 16, steps, parts]."""
    for step in range(steps):
        at = to + TILE * parts * (number // 16 * steps + step) + 64 * (number % 16)
        for half in (0, 1):
            large, middle, small = split_in_three(load(row + 128 * step + 64 * half, SIXTEEN))
            write_upper(at + 32 * half, large)
            if parts > 1:
                write_upper(at + TILE + 32 * half, middle)
            if parts > 2:
                write_upper(at + 2 * TILE + 32 * half, small)


@njit(cache=True, nogil=True)
def _expand(a, mine, low, high, first, length, steps, room, to):
    """Expand rows `low` to `high` and terms `first` to `first + length` of the matrix, and write their parts as tiles."""
    dim, stride = a[e.DIM], 32 * steps
    strip = STRIP if a[LOOKUP] else max(dim, STRIP // dim * dim)
    if not a[LOOKUP]:
        mine[e.CODES] = a[e.CODES] + first * a[e.BY_ROW]
        mine[e.ROWS] = length
    k.clear(room, strip * stride)
    for start in range(low, high, strip):
        stop = min(start + strip, high)
        if a[LOOKUP]:
            mine[e.OUT] = room - 4 * (start * stride + first)
            e._rows(mine, start, stop, first // dim, (first + length + dim - 1) // dim)
        else:
            mine[e.OUT] = room - 4 * start * stride
            for b in range(start // dim, (stop + dim - 1) // dim):
                e._columns(mine, b)
        for r in range(start, stop):
            _split(room + 4 * (r - start) * stride, r - low, steps, a[PARTS], to)


@njit(inline="always")
def _four_products():
    """Add the products of the row tiles 4 and 5 and the token tiles 6 and 7 to the sums 0 to 3."""
    multiply_tiles(0, 4, 6)
    multiply_tiles(1, 4, 7)
    multiply_tiles(2, 5, 6)
    multiply_tiles(3, 5, 7)


@njit(cache=True, nogil=True)
def _multiply(w, x, steps, w_parts, x_parts, y, y2):
    """Add 32 rows by 32 tokens: y and y2 [32, 16] += the products of tiles w and x, `steps` of 32 terms.

    Registers 0 to 3 are sums, 4 and 5 rows, 6 and 7 tokens; the least products come first.
    """
    w2, x2 = w + TILE * w_parts * steps, x + TILE * x_parts * steps
    load_tile(0, y)
    load_tile(1, y2)
    load_tile(2, y + TILE)
    load_tile(3, y2 + TILE)
    for _ in range(steps):
        if w_parts == 3:
            load_tile(4, w + 2 * TILE)
            load_tile(6, x)
            multiply_tiles(0, 4, 6)
            load_tile(7, x2)
            multiply_tiles(1, 4, 7)
            load_tile(5, w2 + 2 * TILE)
            multiply_tiles(2, 5, 6)
            multiply_tiles(3, 5, 7)
        load_tile(4, w)
        load_tile(5, w2)
        if x_parts == 3:
            load_tile(6, x + 2 * TILE)
            multiply_tiles(0, 4, 6)
            load_tile(7, x2 + 2 * TILE)
            multiply_tiles(1, 4, 7)
            multiply_tiles(2, 5, 6)
            multiply_tiles(3, 5, 7)
        if x_parts > 1:
            load_tile(6, x + TILE)
            multiply_tiles(0, 4, 6)
            load_tile(7, x2 + TILE)
            multiply_tiles(1, 4, 7)
            multiply_tiles(2, 5, 6)
            multiply_tiles(3, 5, 7)
        if w_parts > 1:
            load_tile(4, w + TILE)
            load_tile(5, w2 + TILE)
            if x_parts == 3:
                _four_products()
            load_tile(6, x)
            multiply_tiles(0, 4, 6)
            load_tile(7, x2)
            multiply_tiles(1, 4, 7)
            multiply_tiles(2, 5, 6)
            multiply_tiles(3, 5, 7)
            load_tile(4, w)
            load_tile(5, w2)
        else:
            load_tile(6, x)
            load_tile(7, x2)
        _four_products()
        w += TILE * w_parts
        w2 += TILE * w_parts
        x += TILE * x_parts
        x2 += TILE * x_parts
    store_tile(0, y)
    store_tile(1, y2)
    store_tile(2, y + TILE)
    store_tile(3, y2 + TILE)


@njit(cache=True, nogil=True)
def _serve(a, mine, low, high, scratch):
    """Make rows `low` to `high` of the result for all tokens."""
    steps = k.rounded_up(a[TERMS], 32) // 32
    rows, groups = k.rounded_up(high - low, 32), a[GROUPS]  # both whole pairs of tiles
    w = scratch
    y = w + TILE * a[PARTS] * steps * (rows // 16)  # [groups, rows, 16]
    room = y + 64 * rows * groups
    k.clear(w, 256 * a[PARTS] * steps * (rows // 16))  # rows beyond the last stay zeros
    k.clear(y, 16 * rows * groups)
    by_group = TILE * a[X_PARTS] * steps
    ask = 2 * by_group // (rows // 16)
    for first in range(0, a[WIDTH_IN], a[TERMS]):
        length = min(a[TERMS], a[WIDTH_IN] - first)
        _expand(a, mine, low, high, first, length, steps, room, w)
        x = a[LOADED] + by_group * groups * (first // a[TERMS])
        for group in range(0, groups, 2):
            for tile in range(0, rows // 16, 2):
                for line in range(
                    tile * ask, (tile + 2) * ask, 64
                ):  # the next tokens, by the time that they are needed
                    prefetch(x + by_group * (group + 2) + line)
                at = y + 64 * rows * group + TILE * tile
                _multiply(
                    w + TILE * a[PARTS] * steps * tile,
                    x + by_group * group,
                    steps,
                    a[PARTS],
                    a[X_PARTS],
                    at,
                    at + 64 * rows,
                )
    scales = a[ROW_SCALES] + 4 * low if a[ROW_SCALES] != 0 else 0
    bias = a[BIAS] + 4 * low if a[BIAS] != 0 else 0
    for group in range(a[IMAGES] * a[PER_IMAGE]):
        image, start = group // a[PER_IMAGE], 16 * (group % a[PER_IMAGE])
        out = a[RESULT] + 4 * (image * a[BY_IMAGE_OUT] + start * a[BY_TOKEN_OUT] + low * a[BY_COLUMN_OUT])
        tokens = min(16, a[TOKENS] - start)
        strides = a[BY_TOKEN_OUT], a[BY_COLUMN_OUT]
        k.store_results(SIXTEEN, y + 64 * rows * group, (1, 0), (0, high - low), scales, bias, out, strides, tokens)


def load_tokens(data):
    """Write groups of tokens as tiles."""
    a, base = carray(data, TOTAL), address_of(data)
    room = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    while True:
        group = fetch_add(base + 8 * NEXT)
        if group >= a[COUNT]:
            return
        _load_tokens(a, group, room)


def products(data):
    """Make pieces of the result's rows."""
    a, base = carray(data, TOTAL), address_of(data)
    scratch = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    mine = np.empty(TOTAL, np.int64)
    mine[:] = a
    save_tile_config(scratch)
    load_tile_config(a[CONFIG])
    while True:
        part = fetch_add(base + 8 * NEXT)
        if part >= a[COUNT]:
            break
        low = part * a[PIECE]
        _serve(a, mine, low, min(low + a[PIECE], a[WIDTH_OUT]), scratch + 64)
    load_tile_config(scratch)


def supports(layout: Layout) -> bool:
    """Whether this machine has AMX, and sub-vectors are short enough."""
    return layout.dim <= WIDEST and amx_allowed()


def parts_of(x: torch.dtype, codebooks: Tensor) -> tuple[int, int]:
    """Return into how many numbers of bfloat16 an input and a weight are split."""
    asked = "medium" if x == torch.bfloat16 else torch.get_float32_matmul_precision()
    if asked == "medium":
        return 1, 1
    if codebooks.shape[0] > 1 or codebooks.dtype == torch.float32:
        weight = 3
    else:
        weight = 1 if codebooks.dtype == torch.bfloat16 else 2
    return (2, min(weight, 2)) if asked == "high" or x == torch.float16 else (3, weight)


def _slabs(images: int, tokens: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Yield (images, tokens) of one piece of work: `most` groups of 16 tokens, or fewer."""
    per_image = -(-tokens // 16)
    if per_image > most:
        step = 16 * -(-per_image // -(-per_image // most))
        yield from ((slice(i, i + 1), slice(t, t + step)) for i in range(images) for t in range(0, tokens, step))
    else:
        step = -(-images // -(-images // (most // per_image)))
        yield from ((slice(i, i + step), slice(None)) for i in range(0, images, step))


def multiply(
    lookup: bool, x: Tensor, codes: Tensor, tables: Tensor, layout: Layout, parts: tuple[int, int], factors: int, scales: int,
    bias: int, out: Tensor,
) -> None:  # fmt: skip
    """Write `x M^T` (`looks`) or `x M` to out [images, tokens, rows], x [images, tokens, columns]; float32 of any strides.

    Args:
        tables: float32 codebooks [stages, books, 256, dim]; [..., dim, 256] for `x M`.
        parts: of x and of M, as from `parts_of`.
        factors, scales, bias: addresses of float32, or 0: what multiplies the columns of x and the rows of the result, and what
            is added to these.
    """
    width_in, width_out = (layout.length, layout.n) if lookup else (layout.n, layout.length)
    unit_in, unit = (layout.dim, 1) if lookup else (1, layout.dim)
    terms = min(max(1, DEPTH // unit_in) * unit_in, -(-width_in // unit_in) * unit_in)
    tiles = -(-width_out // (2 * -(-width_out // (2 * ROWS)) * 32))  # pairs of tiles in one of an even number of pieces
    piece = max(1, 32 * tiles // unit) * unit
    steps, rows = -(-terms // 32), -(-piece // 32) * 32
    by_group = -(-width_in // terms) * steps * parts[0] * TILE
    most = max(LEAST, min(SLAB, 16 * (HELD // by_group))) // 16
    for some, part in _slabs(x.shape[0], x.shape[1], most):
        given, result = x[some, part], out[some, part]
        images, tokens, _ = given.shape
        per_image = -(-tokens // 16)
        groups = -(-images * per_image // 2) * 2
        loaded = held_room(groups * by_group, HELD)
        fields = (
            codes.data_ptr(), *codes.stride(), tables.data_ptr(), layout.stages, layout.books, layout.blocks, layout.dim, layout.n, layout.length,
            0, 32 * steps, 0, 0, 0, 0, 0,
            lookup, given.data_ptr(), *given.stride(), factors, images, tokens, per_image, groups, parts[0], width_in, terms,
            loaded.ctypes.data, parts[1], _TILE_CONFIG.ctypes.data, result.data_ptr(), *result.stride(), scales, bias,
            width_out, piece,
        )  # fmt: skip
        run(load_tokens, fields, groups, 512 * steps)
        scratch = 16 + rows * (16 * steps * parts[1] + 16 * groups) + 32 * steps * max(STRIP, layout.dim)
        run(products, fields, -(-width_out // piece), scratch)
        del loaded  # until here: only its address was used
