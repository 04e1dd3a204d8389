"""Pieces of a coded matrix, expanded in the order in which `register_tiles` reads them: panels [terms, OUTPUTS].

A term is one number of the sum, an output a column of the result. Where the matrix is multiplied as `x M^T` (LOOKUP), codes of
neighbouring outputs lie side by side; else those of neighbouring terms. In bfloat16 (SHORT) two terms stand side by side.
"""

from __future__ import annotations

from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.jit.amx import split_in_two, write_pair
from rpq_convert.kernels.jit.byte_tables import in_write_order, load_bytes, table_lookup, write_words, zero_bytes
from rpq_convert.kernels.jit.cache import njit
from rpq_convert.kernels.jit.memory import read_byte, read_float, read_long, write_float
from rpq_convert.kernels.jit.register_tiles import OUTPUTS
from rpq_convert.kernels.jit.threads import FIRST
from rpq_convert.kernels.jit.vectors import LANES, load, store, width

# the fields of a task that say what is expanded; PLANES and WORDS are 0 where no faster way serves
(
    CODES, BY_STAGE, BY_BLOCK, BY_ROW, BOOKS, STAGES, BOOK_COUNT, BLOCKS, DIM, ROWS, HALF, PLANES, WORDS, LOOKUP, SHORT,
) = range(FIRST, FIRST + 15)  # fmt: skip
AFTER = FIRST + 15  # the first field of a task's own
TWO, FOUR, EIGHT, SIXTEEN = (LANES[lanes] for lanes in (2, 4, 8, 16))


@njit(cache=True, nogil=True)
def _write(to, value, more):
    write_float(to, read_float(to) + value if more else value)


@njit(cache=True, nogil=True)
def _pick(code, by_code, count, table, to, apart, more):
    """Write the numbers of a table [256] that `count` codes name, `apart` bytes from one to the next; `more` adds them."""
    i = 0
    if by_code == 1:
        while i + 8 <= count:  # eight codes in one read
            eight = read_long(code + i)
            for j in range(8):
                _write(to + (i + j) * apart, read_float(table + 4 * ((eight >> 8 * j) & 255)), more)
            i += 8
    while i < count:
        _write(to + i * apart, read_float(table + 4 * read_byte(code + i * by_code)), more)
        i += 1


@njit(cache=True, nogil=True)
def _copy(tag, code, by_code, count, words, to):
    """Write the codewords [256, lanes of the tag] that `count` codes name, each to a row of OUTPUTS numbers."""
    for i in range(count):
        store(to + 4 * OUTPUTS * i, load(words + 4 * width(tag) * read_byte(code + i * by_code), tag))


@njit(cache=True, nogil=True)
def _copy_words(a, low, columns, first, count, to):
    """As `_expand`, for whole codewords of 2, 4 or 8 numbers that run across the columns."""
    dim = a[DIM]
    for column in range(0, columns, dim):
        b = (low + column) // dim
        code = a[CODES] + b * a[BY_BLOCK] + first * a[BY_ROW]
        words = a[WORDS] + 1024 * dim * (b * a[BOOK_COUNT] // a[BLOCKS])
        if dim == 2:
            _copy(TWO, code, a[BY_ROW], count, words, to + 4 * column)
        elif dim == 4:
            _copy(FOUR, code, a[BY_ROW], count, words, to + 4 * column)
        else:
            _copy(EIGHT, code, a[BY_ROW], count, words, to + 4 * column)


@njit(cache=True, nogil=True)
def _expand(a, low, columns, first, count, room, to):
    """Write columns `low` to `low + columns` and terms `first` to `first + count` of the product's matrix as [terms, OUTPUTS]."""
    shape = a[STAGES], a[BOOK_COUNT], a[BLOCKS], a[DIM], a[ROWS], a[HALF]
    dim = a[DIM]
    start, length = (first, count) if a[LOOKUP] else (low, columns)  # what is cut into sub-vectors
    across = low if a[LOOKUP] else first
    for b in range(start // dim, (start + length + dim - 1) // dim):
        begin = b * dim - start
        for s in range(a[STAGES]):
            book = k.fetch_codebook(a[BOOKS], shape, s, b, room)
            code = a[CODES] + s * a[BY_STAGE] + b * a[BY_BLOCK] + across * a[BY_ROW]
            for j in range(max(0, -begin), min(dim, length - begin)):
                table = book + 1024 * j
                if a[LOOKUP]:
                    row = to + 4 * OUTPUTS * (begin + j)
                    if s == 0:
                        _pick(code, a[BY_ROW], columns, table, row, 4, False)
                    else:
                        _pick(code, a[BY_ROW], columns, table, row, 4, True)
                elif s == 0:
                    _pick(code, a[BY_ROW], count, table, to + 4 * (begin + j), 4 * OUTPUTS, False)
                else:
                    _pick(code, a[BY_ROW], count, table, to + 4 * (begin + j), 4 * OUTPUTS, True)


@njit(cache=True, nogil=True)
def _shorten(wide, terms, to):
    """Write float32 [terms, OUTPUTS] as pairs of terms in bfloat16; the terms are an even number."""
    for pair in range(terms // 2):
        for register in range(0, 4 * OUTPUTS, 64):
            at = wide + 8 * OUTPUTS * pair + register
            low, _ = split_in_two(load(at, SIXTEEN))
            high, _ = split_in_two(load(at + 4 * OUTPUTS, SIXTEEN))
            write_pair(to + 4 * OUTPUTS * pair + register, low, high)


@njit(cache=True, nogil=True)
def _picked(codes, plane):
    return table_lookup(
        codes, load_bytes(plane), load_bytes(plane + 64), load_bytes(plane + 128), load_bytes(plane + 192)
    )


@njit(cache=True, nogil=True)
def _codes_of(a, term, low):
    """Return the codes of COLUMNS columns for a term, and the planes of their coordinate."""
    b = term // a[DIM]
    coordinate = (b * a[BOOK_COUNT] // a[BLOCKS]) * a[DIM] + term - b * a[DIM]
    codes = in_write_order(load_bytes(a[CODES] + b * a[BY_BLOCK] + low * a[BY_ROW]))
    return codes, a[PLANES] + (512 if a[SHORT] else 1024) * coordinate


@njit(cache=True, nogil=True)
def expand_two_panels(a, low, first, count, to, second):
    """Write COLUMNS columns and `count` terms to two panels, 64 codes at a time; the numbers' bytes are picked one by one."""
    if a[SHORT]:
        for pair in range((count + 1) // 2):
            codes, at = _codes_of(a, first + 2 * pair, low)
            b0, b1 = _picked(codes, at), _picked(codes, at + 256)
            b2 = zero_bytes()
            b3 = b2
            if 2 * pair + 1 < count:
                codes, at = _codes_of(a, first + 2 * pair + 1, low)
                b2, b3 = _picked(codes, at), _picked(codes, at + 256)
            row = 4 * OUTPUTS * pair
            write_words(to + row, second + row, b0, b1, b2, b3)
        return
    for i in range(count):
        codes, at = _codes_of(a, first + i, low)
        row = 4 * OUTPUTS * i
        write_words(
            to + row,
            second + row,
            _picked(codes, at),
            _picked(codes, at + 256),
            _picked(codes, at + 512),
            _picked(codes, at + 768),
        )


@njit(cache=True, nogil=True)
def expand_panel(a, low, columns, first, count, room, wide, to):
    """Write a panel of at most OUTPUTS columns, what is not there as zeros."""
    target = wide if a[SHORT] else to
    if columns < OUTPUTS or count % 2:
        k.clear(target, OUTPUTS * k.rounded_up(count, 2))
    if a[WORDS] != 0 and columns % a[DIM] == 0:
        _copy_words(a, low, columns, first, count, target)
    else:
        _expand(a, low, columns, first, count, room, target)
    if a[SHORT]:
        _shorten(wide, k.rounded_up(count, 2), to)
