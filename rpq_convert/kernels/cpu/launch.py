"""Launch: one product with a coded matrix, divided into tasks for threads.

Work is divided by shape alone, never by the number of threads: whole groups of 8 or 16 tokens, or some sub-vectors of one group where
tokens are few. What stays the same from call to call is prepared once, as a small layer takes microseconds.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.cpu import tasks as a
from rpq_convert.kernels.cpu.few_tokens import REST, TOGETHER, padded
from rpq_convert.kernels.cpu.one_token import ROW_STRIDE, ROWS_AT_ONCE, TABLE_BYTES
from rpq_convert.kernels.cpu.one_token_floats import EIGHT
from rpq_convert.kernels.cpu.tasks import CHUNK, TASKS, few_tokens, one_token, one_token_rows, transpose
from rpq_convert.kernels.jit.threads import FIRST, Work
from rpq_convert.kernels.jit.vectors import HAS_VBMI

PARTS = 4  # blocks are split into at most so many parts
WORTH = 1 << 18  # lookups that are worth a thread
WORTH_FEW = 1 << 15  # the same where a single group of tokens is shared out, in one task: 16 microseconds
WORTH_DOTS = 1 << 17  # weights of one token by digits that are worth a thread: 10 microseconds
WORTH_ONE = 24_000  # lookups of one token, where a table entry counts a quarter; half of a 768 x 768 layer at dim 64
LATE = 1 << 17  # floats of sums from which on all threads add them up


def _line(floats: int) -> int:
    """Round up to whole cache lines."""
    return -(-floats // 16) * 16


def share(count: int, work: int, step: int, worth: int = WORTH) -> int:
    """Return how many of `count` blocks make a part: a multiple of `step`, worth a thread."""
    parts = max(1, min(PARTS, work // worth, count // step))
    return -(-count // (parts * step)) * step


def decodes(lookup: bool, layout: Layout, codes: Tensor) -> bool:
    """Whether one token is served by whole codewords (`one_decoded`): no bin is read and written for each code then."""
    if lookup or layout.books > 1 or codes.stride(2) != 1:
        return False
    return layout.dim == 1 or (layout.dim in (2, 4, 8) and layout.n % 8 == 0 and layout.blocks % k.TOGETHER == 0)


class Launch:
    """One product with a coded matrix: the arguments of its tasks, and how its work is divided.

    Args:
        lookup: `x M^T`, by lookups; else `x M`, by bins.
        codes: uint8 [stages, blocks, n], of any strides.
        books, norms: as `prepared(codebooks, "lookup")` gives them.
        digits: as `prepared(codebooks, "digits")` gives them, where few tokens are to be served by `few_tokens`.
        codewords: as `prepared(codebooks, "float32")` gives them, where `decodes` says that one token reads them whole.
    """

    def __init__(
        self,
        lookup: bool,
        layout: Layout,
        codes: Tensor,
        books: Tensor,
        norms: Tensor,
        digits: tuple[Tensor, Tensor] | None = None,
        codewords: Tensor | None = None,
    ) -> None:
        self.lookup, self.layout, self.norms, self.digits = lookup, layout, norms.data_ptr(), digits
        self.kept = books, norms, codewords
        self.codewords = 0 if codewords is None else codewords.data_ptr()
        self.group_works: dict[int, tuple[Work, Work, Work | None, int, int]] = {}
        self.place = (codes.data_ptr(), *codes.stride(), books.data_ptr(), *layout.shape, books.dtype == torch.float16)
        self.integer_tables = HAS_VBMI and lookup and codes.stride(2) == 1
        self.by_rows = HAS_VBMI and lookup and codes.stride(1) == 1 and not self.integer_tables
        inner = layout.blocks * layout.dim  # the side along which sub-vectors run, padded
        self.padded_in, self.padded_out = (inner, layout.n) if lookup else (layout.n, inner)
        self.width_in, self.width_out = (layout.length, layout.n) if lookup else (layout.n, layout.length)

    def fields(self, *changes: tuple[int, int]) -> list[int]:
        """Return a task's own fields, in the order of `tasks`; changes: (place in the task's array, value)."""
        found = [0] * (a.INPUT_SCALES + 1 - FIRST)
        found[: len(self.place)] = self.place
        own = (a.LOOKUP, self.lookup), (a.WIDTH_IN, self.width_in), (a.WIDTH_OUT, self.width_out)
        padded = (a.PADDED_IN, self.padded_in), (a.PADDED_OUT, self.padded_out)
        strides = (
            (a.BY_TOKEN_IN, self.width_in),
            (a.BY_COLUMN_IN, 1),
            (a.BY_TOKEN_OUT, self.width_out),
            (a.BY_COLUMN_OUT, 1),
        )
        for place, value in (*own, *padded, *strides, *changes):
            found[place - FIRST] = value
        return found

    def scratch(self, lanes: int) -> int:
        """Return the floats that a thread needs to serve whole groups."""
        return (
            _line(lanes * self.padded_in) + _line(lanes * self.padded_out) + 256 * lanes * k.TOGETHER + self.layout.room
        )

    def part(self, lanes: int) -> int:
        """Return how many blocks of one group make a part; of a table's 256 rows three are made in the time of one lookup."""
        layout = self.layout
        work = (layout.n * layout.blocks + 85 * layout.length) * layout.stages * (lanes // 8)
        return share(layout.blocks, work, k.TOGETHER, WORTH_FEW)

    def many_tokens(self, x: Tensor, factors: int, scales: int, bias: int, out: Tensor) -> None:
        """Serve tokens in groups of 8 or 16: a thread takes whole groups, or, where they are few, some blocks of one."""
        tokens = x.shape[0]
        lanes = 8 if tokens <= 8 else 16
        groups, parts, adds, pieces, floats = self.group_works.get(lanes) or self.group_work(lanes)
        count = -(-tokens // lanes)
        to, from_ = out.data_ptr(), x.data_ptr()
        given: tuple[tuple[int, int], ...] = ((a.FACTORS, factors), (a.SCALES, scales), (a.BIAS, bias))
        if self.by_rows:  # stored row by row, every block's codes would be read from cache lines of their own
            stages, blocks, n = self.layout.stages, padded(self.layout.blocks), padded(self.layout.n) + 64
            transposed = torch.empty(stages, blocks, n, dtype=torch.uint8)
            self.transposing.run(-(-self.layout.n // ROWS_AT_ONCE), 0, ((a.OUT, transposed.data_ptr()),))
            given += (a.CODES, transposed.data_ptr()), (a.BY_STAGE, blocks * n), (a.BY_BLOCK, n), (a.BY_ROW, 1)
        scratch = self.scratch(lanes)
        if count >= min(4, pieces):
            groups.run(count, scratch, (*given, (a.TOKENS, tokens), (a.X, from_), (a.OUT, to)))
            return
        memory = x.new_empty(floats)
        for start in range(0, tokens, lanes):
            changes = (
                *given, (a.TOKENS, min(lanes, tokens - start)), (a.X, from_ + 4 * start * self.width_in),
                (a.OUT, to + 4 * start * self.width_out), (a.SUMS, memory.data_ptr()),
            )  # fmt: skip
            parts.run(pieces, scratch, changes)
            if adds is not None:
                adds.run(-(-self.width_out // CHUNK), 0, changes)

    def group_work(self, lanes: int) -> tuple[Work, Work, Work | None, int, int]:
        """Return the works of groups, of parts of one, and of what adds large sums up; the parts, and the floats of sums."""
        groups, parts, adds, _, _ = TASKS[lanes]
        part = self.part(lanes)
        pieces = -(-self.layout.blocks // part)
        own = pieces if self.lookup else 1  # lookups of a part are summed apart, bins have rows of their own
        left = _line(lanes * self.padded_out)
        add_later = self.lookup and own * left > LATE
        fields = self.fields(
            (a.PART_BLOCKS, part), (a.SUMS_BYTES, 4 * left * (own > 1)), (a.PARTS, own), (a.ADD_LATER, add_later)
        )
        later = Work(adds, fields) if add_later else None
        found = self.group_works[lanes] = Work(groups, fields), Work(parts, fields), later, pieces, own * left
        return found

    @functools.cached_property
    def transposing(self) -> Work:
        """Return the work that transposes codes which are stored row by row."""
        return Work(transpose, self.fields((a.PADDED_OUT, padded(self.layout.n) + 64)))

    def one_token(self, x: Tensor, scales: int, bias: int, out: int, input_scales: int = 0) -> None:
        """Serve one token x [enters] or [1, enters], times `input_scales` if there are any."""
        if self.padded_in > self.width_in and not input_scales:
            x = torch.nn.functional.pad(x, (0, self.padded_in - self.width_in))
        given = (a.X, x.data_ptr()), (a.OUT, out), (a.SCALES, scales), (a.BIAS, bias), (a.INPUT_SCALES, input_scales)
        if self.digits is not None:
            work, pieces, scratch = self.few_tokens_work
            work.run(pieces, scratch + self.padded_in, given)
            return
        work, pieces, floats, scratch = self.one_token_work
        work.run(pieces, scratch, given, shared=(a.SUMS, floats))

    @functools.cached_property
    def one_token_work(self) -> tuple[Work, int, int, int]:
        """Return one token's work, its parts, and the floats of its sums and of a thread's scratch."""
        layout = self.layout
        if self.by_rows:
            sums = ROWS_AT_ONCE + 256 * layout.dim  # and room for a wide codebook, needed before
            tables = TABLE_BYTES * layout.stages * layout.blocks + ROW_STRIDE * padded(layout.blocks)
            scratch = _line(self.padded_in) + tables // 4 + sums
            return (
                Work(one_token_rows, self.fields((a.TOKENS, 1), (a.FACTORS, self.norms))),
                -(-layout.n // ROWS_AT_ONCE),
                0,
                scratch,
            )
        value = layout.stages * (layout.n * layout.blocks + 64 * layout.length)
        parts = max(p for p in (1, 2, PARTS) if p == 1 or (value >= p * WORTH_ONE and layout.blocks >= p * k.TOGETHER))
        part = -(-layout.blocks // (parts * k.TOGETHER)) * k.TOGETHER
        pieces = -(-layout.blocks // part)
        own, left = pieces if self.lookup else 1, padded(self.padded_out)
        norms = self.norms if self.integer_tables else 0
        fields = self.fields(
            (a.TOKENS, 1),
            (a.FACTORS, norms),
            (a.LOADED, self.codewords),
            (a.PART_BLOCKS, part),
            (a.SUMS_BYTES, 4 * left * (own > 1)),
            (a.PARTS, own),
        )
        return Work(one_token, fields), pieces, own * left, _line(self.padded_in) + 256 * EIGHT + layout.room

    def few_tokens(self, x: Tensor, scales: int, bias: int, out: Tensor) -> None:
        """Serve a few tokens x [tokens, n] by digits."""
        tokens = x.shape[0]
        work, pieces, scratch = self.few_tokens_work
        changes = (a.X, x.data_ptr()), (a.OUT, out.data_ptr()), (a.SCALES, scales), (a.BIAS, bias), (a.TOKENS, tokens)
        work.run(pieces, scratch * (tokens if tokens == 1 else -(-tokens // TOGETHER) * TOGETHER), changes)

    @functools.cached_property
    def few_tokens_work(self) -> tuple[Work, int, int]:
        """Return the work of a few tokens by digits, its parts, and the floats of a thread's scratch for each token."""
        assert self.digits is not None
        layout, (books, steps) = self.layout, self.digits
        part = share(layout.blocks, layout.stages * layout.n * layout.blocks * layout.dim, 1, WORTH_DOTS)
        fields = self.fields(
            (a.TOKENS, 1), (a.FACTORS, steps.data_ptr()), (a.PART_BLOCKS, part), (a.BOOKS, books.data_ptr())
        )
        return Work(few_tokens, fields), -(-layout.blocks // part), (3 * padded(layout.n) + REST) // 4
