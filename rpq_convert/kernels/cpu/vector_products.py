"""Products of many tokens with a coded matrix that expand no more of it than stays in the cache.

What is expanded is COLUMNS columns by some 192 terms, in the order in which vector registers read it, and it is multiplied by all
tokens at once. `tiled_linear` expands rows for torch's own product instead, which orders them once more; and that product, of Intel's
library, is less than half as fast as AMD's registers allow in float32. What is bfloat16 is multiplied as bfloat16, as in torch.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.cpu.pieces import (
    AFTER,
    EIGHT,
    PLANES,
    SHORT,
    SIXTEEN,
    expand_panel,
    expand_two_panels,
)
from rpq_convert.kernels.cpu.prepared import SMALL, pointer, prepared
from rpq_convert.kernels.jit.amx import split_in_two, write_upper
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import (
    address_of,
    fetch_add,
    read_float,
    read_short,
    write_float,
    write_short,
)
from rpq_convert.kernels.jit.register_tiles import BYTES, OUTPUTS, TOKENS, multiply_short_tile, multiply_tile
from rpq_convert.kernels.jit.threads import COUNT, NEXT, SCRATCH, SCRATCH_BYTES, SLOT, held_room, run
from rpq_convert.kernels.jit.vectors import HAS_BFLOAT16, HAS_VBMI, add, load, multiply, store

TOTAL = 48
(
    X, BY_IMAGE_IN, BY_TOKEN_IN, BY_COLUMN_IN, FACTORS, TOTAL_TOKENS, PER_IMAGE, WIDTH_IN, TERMS, LOADED, OUT, BY_IMAGE_OUT,
    BY_TOKEN_OUT, BY_COLUMN_OUT, SCALES, BIAS, WIDTH_OUT, SHORT_X, SHORT_OUT, PARTS,
) = range(AFTER, AFTER + 20)  # fmt: skip
DEPTH = 192  # terms expanded at a time, twice as many in bfloat16: with twelve tokens they fill a first-level cache of 32 KiB
COLUMNS = 2 * OUTPUTS  # of the result that are made at a time: two panels
SLAB = 1 << 23  # bytes of tokens that are held in their new order at a time
ENOUGH = 16  # tasks; where columns make fewer, tokens are divided as well
LEAST = 240  # tokens, or more of them where they are short


@njit(cache=True, nogil=True)
def _by_token(a):
    """Return the bytes of a token's terms in their new order: whole registers."""
    return (2 if a[SHORT] else 4) * k.rounded_up(a[TERMS], 16)


@njit(cache=True, nogil=True)
def _copy_short(from_, count, padded, to):
    """Copy numbers of 16 bits, and zeros after them."""
    whole = count // 16 * 16
    for i in range(0, whole, 16):
        store(to + 2 * i, load(from_ + 2 * i, EIGHT))
    for i in range(whole, count):
        write_short(to + 2 * i, read_short(from_ + 2 * i))
    for i in range(count, padded):
        write_short(to + 2 * i, np.int16(0))


@njit(cache=True, nogil=True)
def _load_group(a, group, room):
    """Write TOKENS tokens, times FACTORS, as [pieces of TERMS terms, groups, TOKENS, terms]; those beyond the last are zeros."""
    by_token = _by_token(a)
    by_piece = by_token * k.rounded_up(a[TOTAL_TOKENS], TOKENS)
    for t in range(TOKENS):
        number = group * TOKENS + t
        there = number < a[TOTAL_TOKENS]
        from_ = a[X] + (2 if a[SHORT_X] else 4) * (
            number // a[PER_IMAGE] * a[BY_IMAGE_IN] + number % a[PER_IMAGE] * a[BY_TOKEN_IN]
        )
        for first in range(0, a[WIDTH_IN], a[TERMS]):
            to = a[LOADED] + first // a[TERMS] * by_piece + number * by_token
            count = min(a[TERMS], a[WIDTH_IN] - first)
            if a[SHORT_X]:
                _copy_short(from_ + 2 * first, count if there else 0, k.rounded_up(count, 16), to)
                continue
            for i in range(0, count, 16):
                if there and a[BY_COLUMN_IN] == 1 and i + 16 <= count:
                    values = load(from_ + 4 * (first + i), SIXTEEN)
                    if a[FACTORS] != 0:
                        values = multiply(values, load(a[FACTORS] + 4 * (first + i), SIXTEEN))
                else:
                    k.clear(room, 16)
                    if there:
                        for j in range(min(16, count - i)):
                            value = read_float(from_ + 4 * (first + i + j) * a[BY_COLUMN_IN])
                            if a[FACTORS] != 0:
                                value *= read_float(a[FACTORS] + 4 * (first + i + j))
                            write_float(room + 4 * j, value)
                    values = load(room, SIXTEEN)
                if a[SHORT]:
                    write_upper(to + 2 * i, split_in_two(values)[0])
                else:
                    store(to + 4 * i, values)


@njit(cache=True, nogil=True)
def _finish(a, at, first, count):
    """Scale and shift `count` sums of columns from `first` on, in their place."""
    i = 0
    while i + 16 <= count:
        values = load(at + 4 * i, SIXTEEN)
        if a[SCALES] != 0:
            values = multiply(values, load(a[SCALES] + 4 * (first + i), SIXTEEN))
        if a[BIAS] != 0:
            values = add(values, load(a[BIAS] + 4 * (first + i), SIXTEEN))
        store(at + 4 * i, values)
        i += 16
    while i < count:
        value = read_float(at + 4 * i)
        if a[SCALES] != 0:
            value *= read_float(a[SCALES] + 4 * (first + i))
        if a[BIAS] != 0:
            value += read_float(a[BIAS] + 4 * (first + i))
        write_float(at + 4 * i, value)
        i += 1


@njit(cache=True, nogil=True)
def _store(a, sums, begin, end, low, columns):
    """Write sums [tokens, OUTPUTS] of tokens `begin` to `end` as columns from `low` on of the result, scaled and shifted."""
    size = 2 if a[SHORT_OUT] else 4
    for number in range(begin, end):
        from_ = sums + 4 * OUTPUTS * (number - begin)
        out = a[OUT] + size * (number // a[PER_IMAGE] * a[BY_IMAGE_OUT] + number % a[PER_IMAGE] * a[BY_TOKEN_OUT])
        if a[SCALES] != 0 or a[BIAS] != 0:
            _finish(a, from_, low, columns)
        if a[SHORT_OUT]:
            for i in range(0, OUTPUTS, 16):
                rounded, _ = split_in_two(load(from_ + 4 * i, SIXTEEN))
                write_upper(from_ + 2 * i, rounded)
            _copy_short(from_, columns, columns, out + 2 * low)
        elif a[BY_COLUMN_OUT] == 1 and columns == OUTPUTS:
            for i in range(0, OUTPUTS, 16):
                store(out + 4 * (low + i), load(from_ + 4 * i, SIXTEEN))
        else:
            for i in range(columns):
                write_float(out + 4 * (low + i) * a[BY_COLUMN_OUT], read_float(from_ + 4 * i))


def load_tokens(data):
    """Bring groups of tokens into their new order."""
    a, base = carray(data, TOTAL), address_of(data)
    room = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]
    while True:
        group = fetch_add(base + 8 * NEXT)
        if group >= a[COUNT]:
            return
        _load_group(a, group, room)


def products(data):
    """Make COLUMNS columns of the result for all tokens, or for one of PARTS parts of them."""
    a, base = carray(data, TOTAL), address_of(data)
    wide = a[SCRATCH] + fetch_add(base + 8 * SLOT) * a[SCRATCH_BYTES]  # float32 before it is shortened
    by_panel = 4 * OUTPUTS * k.rounded_up(a[TERMS], 2)
    weights = wide + by_panel
    groups = k.rounded_up(a[TOTAL_TOKENS], TOKENS) // TOKENS
    part = (groups + a[PARTS] - 1) // a[PARTS]
    sums = weights + 2 * by_panel
    room = sums + 2 * BYTES * part
    by_token = _by_token(a)
    while True:
        number = fetch_add(base + 8 * NEXT)
        if number >= a[COUNT]:
            return
        low, begin = COLUMNS * (number // a[PARTS]), part * (number % a[PARTS])
        end = min(begin + part, groups)
        columns = min(COLUMNS, a[WIDTH_OUT] - low)
        panels = k.rounded_up(columns, OUTPUTS) // OUTPUTS
        k.clear(sums, 2 * part * (BYTES // 4))
        for first in range(0, a[WIDTH_IN], a[TERMS]):
            count = min(a[TERMS], a[WIDTH_IN] - first)
            by_planes = a[PLANES] != 0 and columns == COLUMNS
            if by_planes:
                expand_two_panels(a, low, first, count, weights, weights + by_panel)
            x = a[LOADED] + first // a[TERMS] * by_token * TOKENS * groups
            for p in range(panels):
                panel = weights + by_panel * p
                if not by_planes:
                    start = low + OUTPUTS * p
                    expand_panel(a, start, min(OUTPUTS, a[WIDTH_OUT] - start), first, count, room, wide, panel)
                for group in range(begin, end):
                    at, y = x + by_token * TOKENS * group, sums + BYTES * (part * p + group - begin)
                    if a[SHORT]:
                        multiply_short_tile(at, panel, (count + 1) // 2, by_token, y)
                    else:
                        multiply_tile(at, panel, count, by_token, y)
        for p in range(panels):
            start = low + OUTPUTS * p
            last = min(TOKENS * end, a[TOTAL_TOKENS])
            _store(a, sums + BYTES * part * p, TOKENS * begin, last, start, min(OUTPUTS, a[WIDTH_OUT] - start))


def takes_short(x: Tensor) -> bool:
    """Whether `multiply_all` reads x [tokens, columns] as it is, and writes what has its dtype."""
    return HAS_BFLOAT16 and x.dtype == torch.bfloat16 and x.is_contiguous()


def multiply_all(
    lookup: bool, x: Tensor, dtype: torch.dtype, codes: Tensor, codebooks: Tensor, layout: Layout, factors: int, scales: int, bias: int,
    out: Tensor,
) -> None:  # fmt: skip
    """Write `x M^T` (`lookup`) or `x M` to out [images, tokens, rows], x [images, tokens, columns]; float32 of any strides.

    Args:
        dtype: what x was before, or is: bfloat16 without gaps, where `takes_short`. It is multiplied by weights that are rounded to
            bfloat16, where the processor can. out may be bfloat16 then.
        factors, scales, bias: addresses of float32, or 0: what multiplies the columns of x and those of the result, and what is
            added to these.
    """
    width_in, width_out = (layout.length, layout.n) if lookup else (layout.n, layout.length)
    short = dtype == torch.bfloat16 and HAS_BFLOAT16
    unit = layout.dim if lookup else 1
    unit = 2 * unit if short and unit % 2 else unit
    terms = min(max(1, (2 if short else 1) * DEPTH // unit) * unit, -(-width_in // unit) * unit)
    depth = -(-width_in // terms) * -(-terms // 16) * 16 // (2 if short else 1)  # floats of a token
    most = TOKENS * (max(LEAST, SLAB // (4 * depth)) // TOKENS)
    books, _ = prepared(codebooks, "lookup")
    planes = words = None
    if layout.stages == 1 and codebooks.numel() <= SMALL:
        if HAS_VBMI and lookup and codes.stride(2) == 1:
            planes = prepared(codebooks, "bfloat16 planes" if short else "float32 planes")
        elif not lookup and layout.dim in (2, 4, 8):
            words = prepared(codebooks, "float32")
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
            pieces = -(-width_out // COLUMNS)
            most_parts = 4 if planes is not None else 2  # each expands its columns for itself
            parts = max(1, min(most_parts, groups // 8, -(-ENOUGH // pieces)))
            loaded = held_room(4 * groups * TOKENS * depth, SLAB)
            fields = (
                codes.data_ptr(), *codes.stride(), books.data_ptr(), *layout.shape, books.dtype == torch.float16, pointer(planes),
                pointer(words), lookup, short, given.data_ptr(), *given.stride(), factors, total, given.shape[1], width_in, terms, loaded.ctypes.data,
                result.data_ptr(), *result.stride(), scales, bias, width_out,
                given.dtype == torch.bfloat16, result.dtype == torch.bfloat16, parts,
            )  # fmt: skip
            run(load_tokens, fields, groups, 16)
            scratch = 3 * OUTPUTS * (terms + terms % 2) + 2 * BYTES // 4 * -(-groups // parts) + layout.room
            run(products, fields, pieces * parts, scratch)
            del loaded  # until here: only its address was used
