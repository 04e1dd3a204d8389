"""Inner loops of k-means and of additive coding: numba, single-threaded, nogil, no global state.

Points lie coordinate-major, [r, N], so that LLVM puts neighbouring points in neighbouring lanes: a tile of points stays
in L1 while the 256 codewords stream past, best score and index beside it. Four codewords share each visit (two from
dim 5 on, one from dim 9 on; the best of 1, 2, 4, 8 as timed). No points x 256 array ever exists. Callers run several
fits in Python threads; nothing here starts a thread, so the order of every sum, and every bit, is fixed.

Not used: BLAS products plus an argmin (nothing promises the same bits at every thread count); the expanded form
|c|^2 - 2 x.c at dim <= 4 (it saves little there and loses small differences between large numbers); `fastmath=True`
(it reorders sums that need not be).
"""

from functools import cache

import numpy as np
from numba import njit

from rpq_convert.kernels.lookup import table

CODEWORDS = 256
LARGE = np.float32(3e38)
WIDE = 16  # above this many coordinates LLVM unrolls no more: registers are named, or sums cut in slices of WIDE
FUSE = {"contract", "nsz"}  # a * b + c may fuse; nothing is reordered
REORDER = {"contract", "nsz", "nnan", "reassoc"}  # for sums over lanes: LLVM's order, the same on every call


@cache
def _assign(r: int, form: str):
    """Compile nearest-codeword search for `r` coordinates; form: difference, product, weighted."""
    if r > WIDE:
        return _assign_product if form == "product" else _assign_wide(form == "weighted")
    together = 4 if r <= 4 else 2 if r <= 8 else 1
    tile = 128 if r <= 4 else 64
    product, weighted = form == "product", form == "weighted"

    @njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
    def assign(points, weights, codebook, halves, codes, errors):
        total = points.shape[1]
        x = np.zeros((r, tile), np.float32)
        w = np.zeros((r, tile), np.float32)
        best = np.empty(tile, np.float32)
        which = np.empty(tile, np.int32)
        for start in range(0, total, tile):
            count = min(tile, total - start)
            for j in range(r):
                for p in range(count):
                    x[j, p] = points[j, start + p]
                if weighted:
                    for p in range(count):
                        w[j, p] = weights[j, start + p]
            for p in range(tile):
                best[p] = np.float32(np.inf)
                which[p] = 0
            for k in range(0, 256, together):
                for p in range(tile):
                    b = best[p]
                    i = which[p]
                    for q in range(together):
                        if product:
                            s = halves[k + q]
                            for j in range(r):
                                s -= codebook[k + q, j] * x[j, p]
                        else:
                            s = np.float32(0)
                            for j in range(r):
                                d = x[j, p] - codebook[k + q, j]
                                if weighted:
                                    s += w[j, p] * d * d
                                else:
                                    s += d * d
                        i = np.int32(k + q) if s < b else i
                        b = s if s < b else b
                    best[p] = b
                    which[p] = i
            for p in range(count):
                codes[start + p] = which[p]
                errors[start + p] = best[p]

    return assign


@cache
def _assign_wide(weighted: bool):
    """The same for any number of coordinates, a slice of WIDE at a time; points come padded to a multiple of WIDE."""
    tile = 64

    @njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
    def assign(points, weights, codebook, halves, codes, errors):
        r, total = points.shape
        padded = (r + WIDE - 1) // WIDE * WIDE
        c = np.zeros((256, padded), np.float32)
        c[:, :r] = codebook
        x = np.zeros((padded, tile), np.float32)
        w = np.zeros((padded, tile), np.float32)
        s = np.empty(tile, np.float32)
        best = np.empty(tile, np.float32)
        which = np.empty(tile, np.int32)
        for start in range(0, total, tile):
            count = min(tile, total - start)
            for j in range(r):
                for p in range(count):
                    x[j, p] = points[j, start + p]
                if weighted:
                    for p in range(count):
                        w[j, p] = weights[j, start + p]
            for p in range(tile):
                best[p] = np.float32(np.inf)
                which[p] = 0
            for k in range(256):
                for p in range(tile):
                    s[p] = np.float32(0)
                for base in range(0, padded, WIDE):
                    for p in range(tile):
                        a = s[p]
                        for j in range(WIDE):
                            d = x[base + j, p] - c[k, base + j]
                            if weighted:
                                a += w[base + j, p] * d * d
                            else:
                                a += d * d
                        s[p] = a
                for p in range(tile):
                    better = s[p] < best[p]
                    which[p] = np.int32(k) if better else which[p]
                    best[p] = s[p] if better else best[p]
            for p in range(count):
                codes[start + p] = which[p]
                errors[start + p] = best[p]

    return assign


@njit(cache=True, nogil=True, error_model="numpy")
def _assign_product(points, weights, codebook, halves, codes, errors):
    """The expanded form for any number of coordinates: 32 points are two registers, all their products one small table."""
    tag = np.int32(0)  # 32 lanes
    r, total = points.shape
    flipped = np.ascontiguousarray(codebook.T)  # [r, 256]
    x = np.zeros((r, 32), np.float32)
    products = np.empty((256, 32), np.float32)
    best = np.empty(32, np.float32)
    which = np.empty(32, np.int32)
    for start in range(0, total, 32):
        count = min(32, total - start)
        for j in range(r):
            for p in range(count):
                x[j, p] = points[j, start + p]
        table(tag, flipped.ctypes.data, r, x.ctypes.data, products.ctypes.data)
        for p in range(32):
            best[p] = np.float32(np.inf)
            which[p] = 0
        for k in range(256):
            for p in range(32):
                s = halves[k] - products[k, p]
                which[p] = np.int32(k) if s < best[p] else which[p]
                best[p] = s if s < best[p] else best[p]
        for p in range(count):
            codes[start + p] = which[p]
            errors[start + p] = best[p]


_NONE = np.zeros((1, 1), np.float32)
_NO_HALVES = np.zeros(CODEWORDS, np.float32)


def assign(points, weights, codebook, *, quick=False):
    """Find each point's nearest codeword.

    points [r, N] fp32; weights None or [r, N], one weight per coordinate; codebook [256, r] fp32. `quick` uses the
    expanded form above dim 4 (points should then be centred) and leaves the errors without the points' own norms.
    Returns codes [N] uint8 and errors [N] fp32 (weighted squared distance). Ties go to the lowest code.
    """
    r, total = points.shape
    codebook = np.ascontiguousarray(codebook, np.float32)
    codes = np.empty(total, np.uint8)
    errors = np.empty(total, np.float32)
    if weights is not None:
        _assign(r, "weighted")(points, weights, codebook, _NO_HALVES, codes, errors)
    elif quick and r > 4:
        halves = (0.5 * (codebook.astype(np.float64) ** 2).sum(1)).astype(np.float32)
        _assign(r, "product")(points, _NONE, codebook, halves, codes, errors)
    else:
        _assign(r, "difference")(points, _NONE, codebook, _NO_HALVES, codes, errors)
    return codes, errors


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def accumulate(rows, weights, codes, sums, mass):
    """Add weight * point to sums [256, r] and weight to mass [256, r], in point order, fp64.

    rows [N, r]; weights [1, 1] (all one), [N, 1] or [N, r].
    """
    total, r = rows.shape
    if weights.shape[0] == 1:
        for p in range(total):
            k = codes[p]
            for j in range(r):
                sums[k, j] += rows[p, j]
            mass[k, 0] += 1.0
    elif weights.shape[1] == 1:
        for p in range(total):
            k = codes[p]
            w = np.float64(weights[p, 0])
            for j in range(r):
                sums[k, j] += w * rows[p, j]
            mass[k, 0] += w
    else:
        for p in range(total):
            k = codes[p]
            for j in range(r):
                sums[k, j] += np.float64(weights[p, j]) * rows[p, j]
                mass[k, j] += weights[p, j]


@njit(inline="always")
def _shrink(points, weights, centre, nearest, chunks):
    """nearest = min(nearest, weighted squared distance to centre); chunks[i] = its sum over the i-th 256 points.

    Inlined, and summed in an order of its own: a second compiled copy, optimised in another place, once gave other bits in
    the process that compiled it than in those that read it from the cache.
    """
    r, total = points.shape
    per_coordinate = weights.shape[0] > 1
    d = np.empty(256, np.float32)
    for c in range(chunks.shape[0]):
        start = c * 256
        count = min(256, total - start)
        for p in range(count):
            d[p] = 0
        for j in range(r):
            v = centre[j]
            if per_coordinate:
                for p in range(count):
                    e = points[j, start + p] - v
                    d[p] += weights[j, start + p] * e * e
            else:
                for p in range(count):
                    e = points[j, start + p] - v
                    d[p] += e * e
        if not per_coordinate and weights.shape[1] > 1:
            for p in range(count):
                d[p] *= weights[0, start + p]
        for p in range(count):
            n = nearest[start + p]
            n = d[p] if d[p] < n else n
            nearest[start + p] = n
            d[p] = n
        for p in range(count, 256):
            d[p] = 0
        half = 128
        while half > 0:  # pairs, then pairs of pairs
            for p in range(half):
                d[p] += d[p + half]
            half //= 2
        chunks[c] = d[0]


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def seed_plus_plus(points, weights, first, uniforms, codebook):
    """Choose 256 points by k-means++ (Arthur and Vassilvitskii 2007): each with odds of its distance to those before.

    points [r, N]; weights [1, 1], [1, N] or [r, N]; first: the index of the first; uniforms [256] in [0, 1).
    Writes codebook [256, r].
    """
    r, total = points.shape
    nearest = np.full(total, np.inf, np.float32)
    chunks = np.empty((total + 255) // 256, np.float64)
    pick = first
    for k in range(256):
        for j in range(r):
            codebook[k, j] = points[j, pick]
        if k == 255:
            break
        _shrink(points, weights, codebook[k], nearest, chunks)
        left = uniforms[k] * chunks.sum()
        c = 0
        while c < chunks.shape[0] - 1 and left >= chunks[c]:
            left -= chunks[c]
            c += 1
        pick = c * 256
        last = min(pick + 256, total) - 1
        while pick < last and (left >= nearest[pick] or nearest[pick] == 0):
            left -= nearest[pick]
            pick += 1


@njit(cache=True, nogil=True)
def distinct(rows, table, slots, count, codes):
    """Number the distinct rows in order of appearance; stop, and return 257, at the 257th.

    rows [N, r] fp32 without -0; table [256, r] and slots [1024] int32 (-1 = free) carry over between calls, as `count`
    does. Returns the new count; codes [N] are each row's number.
    """
    total, r = rows.shape
    bits = rows.view(np.uint32)
    for p in range(total):
        h = np.uint64(14695981039346656037)
        for j in range(r):
            h = (h ^ np.uint64(bits[p, j])) * np.uint64(1099511628211)
        h ^= h >> np.uint64(29)
        at = np.int64(h & np.uint64(1023))
        while True:
            k = slots[at]
            if k < 0:
                if count == 256:
                    return 257
                for j in range(r):
                    table[count, j] = rows[p, j]
                slots[at] = count
                codes[p] = count
                count += 1
                break
            same = True
            for j in range(r):
                if table[k, j] != rows[p, j]:
                    same = False
                    break
            if same:
                codes[p] = k
                break
            at = (at + 1) & 1023
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def prefix_sums(values, weights, out):
    """Fill out [3, N + 1] with prefix sums of w, w x and w x^2; weights [1] (all one) or [N]."""
    a = b = c = 0.0
    out[:, 0] = 0
    for p in range(values.shape[0]):
        x = np.float64(values[p])
        w = np.float64(weights[p]) if weights.shape[0] > 1 else 1.0
        a += w
        b += w * x
        c += w * x * x
        out[0, p + 1] = a
        out[1, p + 1] = b
        out[2, p + 1] = c


@njit(cache=True, nogil=True, error_model="numpy")
def line_start(mass, first, second, pieces):
    """Split a sorted line of M pieces into `pieces` cells with the least squared error; exact, by dynamic programming.

    mass, first, second [M + 1]: prefix sums of w, w x, w x^2. Divide and conquer over monotone split points
    (Gronlund et al. 2017): pieces * M * log M. Returns the cells' first pieces [pieces].
    """
    m = mass.shape[0] - 1
    before = np.empty(m + 1)
    now = np.empty(m + 1)
    split = np.zeros((pieces, m + 1), np.int32)
    for i in range(m + 1):
        w = mass[i]
        before[i] = second[i] - first[i] * first[i] / w if w > 0 else 0.0
    stack = np.empty((64, 4), np.int64)
    for k in range(1, pieces):
        stack[0] = (1, m, 0, m - 1)
        now[0] = 0.0
        top = 1
        while top > 0:
            top -= 1
            lo, hi, a, b = stack[top]
            i = (lo + hi) >> 1
            best = np.inf
            at = a
            for s in range(a, min(b, i - 1) + 1):
                w = mass[i] - mass[s]
                f = first[i] - first[s]
                e = before[s] + (second[i] - second[s] - (f * f / w if w > 0 else 0.0))
                if e < best:
                    best = e
                    at = s
            now[i] = best
            split[k, i] = at
            if lo < i:
                stack[top] = (lo, i - 1, a, at)
                top += 1
            if i < hi:
                stack[top] = (i + 1, hi, at, b)
                top += 1
        before[:] = now
    starts = np.zeros(pieces, np.int32)
    i = m
    for k in range(pieces - 1, 0, -1):
        i = split[k, i]
        starts[k] = i
    return starts


@njit(cache=True, nogil=True, error_model="numpy")
def neighbours(codebook, nearest, distance):
    """Write each codeword's nearest other codeword [256] and the squared distance to it [256], fp64."""
    count, r = codebook.shape
    for k in range(count):
        distance[k] = np.inf
        for i in range(count):
            if i != k:
                d = 0.0
                for j in range(r):
                    e = np.float64(codebook[k, j]) - codebook[i, j]
                    d += e * e
                if d < distance[k]:
                    distance[k] = d
                    nearest[k] = i


@cache
def _beam(per_coordinate: bool):
    """Compile the beam search over stages; per_coordinate: weights differ inside a sub-vector, so no tables."""

    @njit(cache=True, nogil=True, fastmath=REORDER, error_model="numpy")
    def beam(rows, weights, codebooks, halves, tables, width, codes):
        total, r = rows.shape
        stages = codebooks.shape[0]
        base = np.empty(256, np.float32)
        score = np.empty((width, 256), np.float32)
        # Sixteen minima per beam, over every sixteenth score: a pick then reads 8 + 16 + 16 numbers and has no
        # branch to mispredict, unlike a sorted list with insertion.
        least = np.empty((width, 16), np.float32)
        half = np.empty(128, np.float32)
        top = np.empty(width, np.float32)
        residual = np.empty(r, np.float32)
        cost = np.zeros(width, np.float32)
        new_cost = np.empty(width, np.float32)
        path = np.zeros((width, stages), np.int64)
        new_path = np.zeros((width, stages), np.int64)
        for p in range(total):
            alive = 1
            cost[0] = 0
            for s in range(stages):
                if not per_coordinate:
                    for k in range(256):
                        base[k] = halves[s, k]
                    for j in range(0, r - 3, 4):
                        x0, x1, x2, x3 = rows[p, j], rows[p, j + 1], rows[p, j + 2], rows[p, j + 3]
                        for k in range(256):
                            a = x0 * codebooks[s, j, k] + x1 * codebooks[s, j + 1, k]
                            base[k] -= a + (x2 * codebooks[s, j + 2, k] + x3 * codebooks[s, j + 3, k])
                    for j in range(r & ~3, r):
                        x0 = rows[p, j]
                        for k in range(256):
                            base[k] -= x0 * codebooks[s, j, k]
                for b in range(alive):
                    if per_coordinate:
                        for j in range(r):
                            residual[j] = rows[p, j]
                            for t in range(s):
                                residual[j] -= codebooks[t, j, path[b, t]]
                        for k in range(256):
                            score[b, k] = 0
                        for j in range(r):
                            x = residual[j]
                            w = weights[p, j]
                            for k in range(256):
                                d = x - codebooks[s, j, k]
                                score[b, k] += w * d * d
                    elif s == 0:
                        for k in range(256):
                            score[b, k] = base[k]
                    else:
                        start = cost[b]
                        row = tables[0, s, path[b, 0]]
                        for k in range(256):
                            score[b, k] = base[k] + start + row[k]
                        for t in range(1, s):
                            row = tables[t, s, path[b, t]]
                            for k in range(256):
                                score[b, k] += row[k]
                    for k in range(128):
                        u, v = score[b, k], score[b, k + 128]
                        half[k] = v if v < u else u  # halving: one loop over 16 strided minima compiles to scalar code
                    for k in range(64):
                        u, v = half[k], half[k + 64]
                        half[k] = v if v < u else u
                    for k in range(32):
                        u, v = half[k], half[k + 32]
                        half[k] = v if v < u else u
                    for g in range(16):
                        u, v = half[g], half[g + 16]
                        least[b, g] = v if v < u else u
                    low = least[b, 0]
                    for g in range(1, 16):
                        v = least[b, g]
                        low = v if v < low else low
                    top[b] = low
                found = width if s < stages - 1 else 1
                for e in range(found):
                    b = 0
                    for i in range(1, alive):
                        b = i if top[i] < top[b] else b
                    v = top[b]
                    g = 0
                    while g < 15 and least[b, g] != v:
                        g += 1
                    k = g
                    while k < 240 and score[b, k] != v:
                        k += 16
                    new_cost[e] = v
                    for t in range(s):
                        new_path[e, t] = path[b, t]
                    new_path[e, s] = k
                    if e < found - 1:
                        score[b, k] = LARGE
                        low = LARGE
                        for i in range(g, 256, 16):
                            v = score[b, i]
                            low = v if v < low else low
                        least[b, g] = low
                        low = LARGE
                        for i in range(16):
                            v = least[b, i]
                            low = v if v < low else low
                        top[b] = low
                alive = found
                for e in range(found):
                    cost[e] = new_cost[e]
                    for t in range(s + 1):
                        path[e, t] = new_path[e, t]
            for s in range(stages):
                codes[s, p] = path[0, s]

    return beam


def encode_sum(rows, weights, codebooks, width):
    """Find codewords, one per stage, whose sum is near each point, by beam search over the stages.

    rows [N, r] fp32; weights None or [N, r]; codebooks [stages, 256, r] fp32. Returns codes [stages, N] uint8. Without
    weights the cost of one more stage is |c|^2 / 2 - x.c + (codewords so far).c, and the last term is a table.
    """
    stages = codebooks.shape[0]
    codes = np.empty((stages, rows.shape[0]), np.uint8)
    columns = np.ascontiguousarray(codebooks.transpose(0, 2, 1), np.float32)  # [stages, r, 256]
    wide = codebooks.astype(np.float64)
    halves = (0.5 * (wide**2).sum(2)).astype(np.float32)  # [stages, 256]
    # einsum without optimize runs numpy's own loops: BLAS bits would depend on its threads.
    tables = np.einsum("sjk,tjl->stkl", columns, columns, optimize=False) if weights is None else _NO_TABLES
    _beam(weights is not None)(rows, _NONE if weights is None else weights, columns, halves, tables, width, codes)
    return codes


_NO_TABLES = np.zeros((1, 1, 1, 1), np.float32)


@njit(cache=True, nogil=True, fastmath=FUSE, error_model="numpy")
def shift(residual, codes, change):
    """residual [N, r] += change [256, r] at each point's code."""
    total, r = residual.shape
    for p in range(total):
        k = codes[p]
        for j in range(r):
            residual[p, j] += change[k, j]
