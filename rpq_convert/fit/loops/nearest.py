"""The nearest of 256 codewords: numba, single-threaded, nogil.

Points lie coordinate-major, [r, N], so that neighbouring points are neighbouring lanes of a register. They stay in the
first cache while the codewords stream past; the best score and its code stay in registers, and no points x 256 array ever
exists. Three forms of the score, each summed in one order:

* difference: sum (x - c)^2, and sum w (x - c)^2 where each coordinate has a weight: right to the last bits of float32;
* product: |c|^2 / 2 - x.c, half the work, but what is small beside the points' distance from zero gets lost;
* product in AMX tiles: the same in Intel's matrix unit (`kernels/jit/amx.py`), with 2^-16 |x| |c| of error. Sixteen codewords are a
  tile's rows, sixteen points its columns, so its least row says which codeword is the best. 1.7 times as fast as in
  vectors of AVX-512 at 4 coordinates, 2.5 times at 8, 3 times at 64.

The products are for k-means' iterations, where a rare choice of the second best does not hurt. What is kept is chosen by
difference, so that a machine without AMX finds the same codes for the same codebook.

Not used: BLAS products plus an argmin (nothing promises the same bits at every thread count). Not tried: float16
arithmetic, twice the lanes (the processors that have it have AMX too); bounds that skip distances.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from rpq_convert.core.reproducible import is_reproducible
from rpq_convert.kernels.jit.amx import (
    TILE,
    amx_allowed,
    code_of,
    column_minimum,
    load_tile,
    load_tile_config,
    multiply_tiles,
    row_of_minimum,
    save_tile_config,
    split_in_two,
    store_tile,
    tile_config,
    write_pair,
    write_upper,
)
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import read_float
from rpq_convert.kernels.jit.vectors import (
    FEATURES,
    LANES,
    load,
    minimum,
    multiply,
    multiply_add,
    select_code,
    spread,
    store,
    subtract,
    subtract_product,
    width,
    write_codes,
    zero_codes,
)

CODEWORDS = 256
SIDE = LANES[32 if FEATURES.get("avx512f") else 16]  # points at once: eight sums and two more registers, on AVX2 too
LARGE = np.float32(3e38)
NONE = np.zeros((1, 1), np.float32)


@njit(inline="always")
def _halves(codebook):
    """Return half of each codeword's squared length [256]."""
    halves = np.empty(256, np.float32)
    for k in range(256):
        total = 0.0
        for j in range(codebook.shape[1]):
            total += np.float64(codebook[k, j]) * codebook[k, j]
        halves[k] = 0.5 * total
    return halves


@cache
def search_by(form: str):
    """Compile the search in float32; form: difference, weighted, product."""
    product, weighted = form == "product", form == "weighted"

    @njit(inline="always")
    def closer(total, x, w, c):
        if product:
            return subtract_product(total, x, c)
        d = subtract(x, c)
        return multiply_add(multiply(w, d) if weighted else d, d, total)

    @njit(cache=True, nogil=True, error_model="numpy")
    def search(points, weights, codebook, tag, codes):
        r, total = points.shape
        side = width(tag)
        room = np.zeros(2 * r * side + 16, np.float32)
        room = room[(-room.ctypes.data % 64) // 4 :]  # from the beginning of a cache line
        x = room[: r * side].reshape(r, side)
        w = room[r * side : 2 * r * side].reshape(r, side)
        found = np.empty(side, np.uint8)
        step = 4 * r
        halves = _halves(codebook)
        zero = np.float32(0)
        for start in range(0, total, side):
            count = min(side, total - start)
            for j in range(r):
                for p in range(count):
                    x[j, p] = points[j, start + p]
                if weighted:
                    for p in range(count):
                        w[j, p] = weights[j, start + p]
            best = spread(LARGE, tag)
            which = zero_codes(tag)
            for k in range(0, 256, 4):
                s0 = spread(halves[k] if product else zero, tag)
                s1 = spread(halves[k + 1] if product else zero, tag)
                s2 = spread(halves[k + 2] if product else zero, tag)
                s3 = spread(halves[k + 3] if product else zero, tag)
                at = codebook.ctypes.data + k * step
                for j in range(r):
                    v = load(x.ctypes.data + 4 * side * j, tag)
                    u = load(w.ctypes.data + 4 * side * j, tag) if weighted else v
                    s0 = closer(s0, v, u, spread(read_float(at), tag))
                    s1 = closer(s1, v, u, spread(read_float(at + step), tag))
                    s2 = closer(s2, v, u, spread(read_float(at + 2 * step), tag))
                    s3 = closer(s3, v, u, spread(read_float(at + 3 * step), tag))
                    at += 4
                which = select_code(s0, best, k, which)
                best = minimum(s0, best)
                which = select_code(s1, best, k + 1, which)
                best = minimum(s1, best)
                which = select_code(s2, best, k + 2, which)
                best = minimum(s2, best)
                which = select_code(s3, best, k + 3, which)
                best = minimum(s3, best)
            write_codes(found.ctypes.data, which)
            for p in range(count):
                codes[start + p] = found[p]

    return search


# ---- in AMX tiles --------------------------------------------------------------------------------------------------------

POINTS = 32  # at a time: two tiles of them


@njit(inline="always")
def _small(r):
    """Return the row, in a column of tiles, after the r rows of large parts: where it divides by 8, no write is divided."""
    return (r + 7) // 8 * 8


@njit(inline="always")
def _lay_codewords(codebook, depth, codewords, sums):
    """Lay codewords [256, r], negative, in [16, depth] tiles, and what sums start from in 16 tiles.

    A codeword is a row of pairs: (large, large) of each coordinate, then the small parts. Between and after them stand
    other numbers, which meet zeros.
    """
    tag = np.int16(0)
    r = codebook.shape[1]
    halves = _halves(codebook)
    minus = np.zeros(256 * r + 16, np.float32)
    for k in range(256):
        store(sums + 64 * k, spread(halves[k], tag))
        for j in range(r):
            minus[k * r + j] = -codebook[k, j]
    for k in range(256):
        own = minus.ctypes.data + 4 * r * k
        at = codewords + TILE * depth * (k >> 4) + 64 * (k & 15)
        for j in range((r - 1) & ~15, -1, -16):  # the last first: its large parts may reach over the small ones
            large, small = split_in_two(load(own + 4 * j, tag))
            write_pair(at + TILE * (j >> 4), large, large)
            row = _small(r) + (j >> 1)
            write_upper(at + TILE * (row >> 4) + 4 * (row & 15), small)


@njit(inline="always")
def _lay_points(points, stride, r, panel):
    """Lay 16 points in a column of tiles: pairs (small, large) of each coordinate, then pairs of large parts."""
    tag = np.int16(0)
    pairs = panel + 64 * _small(r)
    for j in range(0, r, 2):
        large, small = split_in_two(load(points + j * stride, tag))
        write_pair(panel + 64 * j, small, large)
        next_large = zero_codes(tag)
        if j + 1 < r:
            next_large, next_small = split_in_two(load(points + (j + 1) * stride, tag))
            write_pair(panel + 64 * (j + 1), next_small, next_large)
        write_pair(pairs + 32 * j, large, next_large)


@njit(inline="always")
def _better(scores, tile, best, which):
    least = column_minimum(scores)
    return minimum(least, best), select_code(least, best, tile, which)


@njit(inline="always")
def _turn(codewords, depth, points, start, sums, last, best0, which0, best1, which1):
    """Make the sums of two tiles of codewords with two of points, and look through those of the turn before, `last`.

    Registers 0 to 3 are sums, 4 and 5 codewords, 6 and 7 points. A tile of sums is stored three products after its own.
    """
    s1, s2, s3 = sums + TILE, sums + 2 * TILE, sums + 3 * TILE
    if depth == 1:
        load_tile(4, codewords)
        load_tile(0, start)
        multiply_tiles(0, 4, 6)
        store_tile(1, s1)
        best0, which0 = _better(sums, last, best0, which0)
        load_tile(1, start)
        multiply_tiles(1, 4, 7)
        store_tile(2, s2)
        best1, which1 = _better(s1, last, best1, which1)
        load_tile(5, codewords + TILE)
        load_tile(2, start + TILE)
        multiply_tiles(2, 5, 6)
        store_tile(3, s3)
        best0, which0 = _better(s2, last + 1, best0, which0)
        load_tile(3, start + TILE)
        multiply_tiles(3, 5, 7)
        store_tile(0, sums)
        best1, which1 = _better(s3, last + 1, best1, which1)
    else:
        store_tile(1, s1)
        store_tile(2, s2)
        store_tile(3, s3)
        load_tile(0, start)
        load_tile(1, start)
        load_tile(2, start + TILE)
        load_tile(3, start + TILE)
        for t in range(0, TILE * depth, TILE):
            load_tile(4, codewords + t)
            load_tile(6, points + t)
            multiply_tiles(0, 4, 6)
            load_tile(7, points + TILE * depth + t)
            multiply_tiles(1, 4, 7)
            load_tile(5, codewords + TILE * depth + t)
            multiply_tiles(2, 5, 6)
            multiply_tiles(3, 5, 7)
        best0, which0 = _better(sums, last, best0, which0)
        best1, which1 = _better(s1, last, best1, which1)
        best0, which0 = _better(s2, last + 1, best0, which0)
        best1, which1 = _better(s3, last + 1, best1, which1)
        store_tile(0, sums)
    return best0, which0, best1, which1


@njit(cache=True, nogil=True, error_model="numpy")
def _search_tiles(points, codebook, wanted, codes):
    """Find the codeword with the least product score for at least POINTS points."""
    r, total = points.shape
    stride = 4 * total
    tag = np.int16(0)
    depth = (_small(r) + (r + 1) // 2 + 15) // 16  # tiles
    room = np.zeros((21 + 18 * depth) * 256 + 16, np.uint32)
    words = room[(-room.ctypes.data % 64) // 4 :]  # from the beginning of a cache line
    c = words.ctypes.data  # codewords, [16, depth] tiles
    h = c + 16 * TILE * depth  # what sums start from, 16 tiles
    s = h + 16 * TILE  # sums, 4 tiles
    b = s + 4 * TILE  # points, [2, depth] tiles
    old = b + 2 * TILE * depth
    _lay_codewords(codebook, depth, c, h)
    for k in range(0, 4 * TILE, 64):
        store(s + k, spread(LARGE, tag))  # before the first turn
    save_tile_config(old)
    load_tile_config(wanted.ctypes.data)
    load_tile(1, s)
    load_tile(2, s)
    load_tile(3, s)
    best0 = spread(LARGE, tag)
    best1 = spread(LARGE, tag)
    which0 = zero_codes(tag)
    which1 = zero_codes(tag)
    out = codes.ctypes.data
    for first in range(0, total, POINTS):
        start = min(first, total - POINTS)  # the last ones overlap
        at = points.ctypes.data + 4 * start
        _lay_points(at, stride, r, b)
        _lay_points(at + 64, stride, r, b + TILE * depth)
        load_tile(6, b)
        load_tile(7, b + TILE * depth)
        best0, which0, best1, which1 = _turn(c, depth, b, h, s, 14, best0, which0, best1, which1)
        write_codes(
            out, code_of(which0, row_of_minimum(best0))
        )  # of the points before these; the first time there are none
        write_codes(out + 16, code_of(which1, row_of_minimum(best1)))
        best0 = spread(LARGE, tag)
        best1 = spread(LARGE, tag)
        out = codes.ctypes.data + start
        for g in range(2, 16, 2):
            best0, which0, best1, which1 = _turn(
                c + TILE * depth * g, depth, b, h + TILE * g, s, g - 2, best0, which0, best1, which1
            )
    best0, which0, best1, which1 = _turn(c, depth, b, h, s, 14, best0, which0, best1, which1)  # for the last ones
    write_codes(out, code_of(which0, row_of_minimum(best0)))
    write_codes(out + 16, code_of(which1, row_of_minimum(best1)))
    load_tile_config(old)
    words[0] = 0  # used until here: nothing else tells numba that addresses point there


def nearest(points, weights, codebook, *, quick=False):
    """Find each point's nearest codeword; returns codes [N] uint8.

    points [r, N] fp32; weights None or [r, N], one weight per coordinate; codebook [256, r] fp32. `quick` scores by
    products, which is for centred points and for choices that need not be the best to the last bit. Of equally near
    codewords the lowest code wins, unless `quick`.
    """
    codebook = np.ascontiguousarray(codebook, np.float32)
    codes = np.empty(points.shape[1], np.uint8)
    if quick and weights is None and len(codes) >= POINTS and not is_reproducible() and amx_allowed():
        _search_tiles(points, codebook, _TILE_CONFIG, codes)
    else:
        form = "weighted" if weights is not None else "product" if quick else "difference"
        search_by(form)(points, NONE if weights is None else weights, codebook, SIDE, codes)
    return codes


_TILE_CONFIG = tile_config()


def blank(shape: tuple[int, int]) -> np.ndarray:
    """Return an fp32 array that begins a cache line, so that no register of points lies across two."""
    raw = np.empty(shape[0] * shape[1] + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + shape[0] * shape[1]].reshape(shape)
