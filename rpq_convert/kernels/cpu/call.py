"""Call: one product with a coded matrix, laid out as tasks for threads.

Work is cut into parts by shape alone: whole groups of 8 or 16 tokens, or some blocks of one where tokens are few. What does
not change from call to call is laid out once, as a small layer takes microseconds.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rpq_convert.core.layout import Cut
from rpq_convert.kernels.cpu import lookup as k
from rpq_convert.kernels.cpu import tasks as a
from rpq_convert.kernels.cpu.few_tokens import REST, TOGETHER, padded
from rpq_convert.kernels.cpu.one_token import PLANES, TURNED, TURNED_LINE
from rpq_convert.kernels.cpu.tasks import CHUNK, TASKS, dots, entries, one, turns
from rpq_convert.kernels.jit.threads import FIRST, Work
from rpq_convert.kernels.jit.vectors import HAS_PICK

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


class Call:
    """One product with a coded matrix: the arguments of its tasks, and how its work is shared out."""

    def __init__(
        self,
        looks: bool,
        cut: Cut,
        codes: Tensor,
        books: Tensor,
        norms: Tensor,
        digits: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.looks, self.cut, self.norms, self.digits = looks, cut, norms.data_ptr(), digits
        self.kept = books, norms
        self.works: dict[int, tuple[Work, Work, Work | None, int, int]] = {}
        self.place = (codes.data_ptr(), *codes.stride(), books.data_ptr(), *cut.shape, books.dtype == torch.float16)
        self.picks = HAS_PICK and looks and codes.stride(2) == 1
        self.turns = HAS_PICK and looks and codes.stride(1) == 1 and not self.picks
        inner = cut.blocks * cut.dim  # the cut side, padded
        self.enters, self.leaves = (inner, cut.n) if looks else (cut.n, inner)
        self.wide_in, self.wide_out = (cut.length, cut.n) if looks else (cut.n, cut.length)

    def fields(
        self, x: int, tokens: int, factors: int, scales: int, bias: int, out: int, *, part: int = 0, entered: int = 0,
        sums: int = 0, sums_bytes: int = 0, parts: int = 0, pixels: int = 0, later: bool = False,
    ) -> tuple[int, ...]:  # fmt: skip
        """Return a task's own fields, in the order of `tasks`; with `pixels`, tokens are those of an image [columns, pixels]."""
        strides = (1, pixels, 1, pixels) if pixels else (self.wide_in, 1, self.wide_out, 1)
        return (
            *self.place, self.looks, x, self.wide_in, self.enters, factors, tokens, out, self.wide_out, self.leaves,
            scales, bias, part, entered, sums, sums_bytes, parts, 0, *strides, later,
        )  # fmt: skip

    def scratch(self, lanes: int) -> int:
        """Return the floats that a thread needs to serve whole groups."""
        return _line(lanes * self.enters) + _line(lanes * self.leaves) + 256 * lanes * k.TOGETHER + self.cut.room

    def part(self, lanes: int) -> int:
        """Return how many blocks of one group make a part; of a table's 256 rows three are made in the time of one lookup."""
        cut = self.cut
        work = (cut.n * cut.blocks + 85 * cut.length) * cut.stages * (lanes // 8)
        return share(cut.blocks, work, k.TOGETHER, WORTH_FEW)

    def many(self, x: Tensor, factors: int, scales: int, bias: int, out: Tensor) -> None:
        """Serve tokens in groups of 8 or 16: a thread takes whole groups, or, where they are few, some blocks of one."""
        tokens = x.shape[0]
        lanes = 8 if tokens <= 8 else 16
        groups, parts, leaves, pieces, floats = self.works.get(lanes) or self.shared(lanes)
        count = -(-tokens // lanes)
        to, from_ = out.data_ptr(), x.data_ptr()
        given: tuple[tuple[int, int], ...] = ((a.FACTORS, factors), (a.SCALES, scales), (a.BIAS, bias))
        if self.turns:  # codes that lie row by row: every block's would be read from a line of its own
            stages, blocks, n = self.cut.stages, padded(self.cut.blocks), padded(self.cut.n) + 64
            turned = torch.empty(stages, blocks, n, dtype=torch.uint8)
            self.turning.run(-(-self.cut.n // TURNED), 0, ((a.OUT, turned.data_ptr()),))
            given += (a.CODES, turned.data_ptr()), (a.BY_STAGE, blocks * n), (a.BY_BLOCK, n), (a.BY_ROW, 1)
        scratch = self.scratch(lanes)
        if count >= min(4, pieces):
            groups.run(count, scratch, (*given, (a.TOKENS, tokens), (a.X, from_), (a.OUT, to)))
            return
        memory = x.new_empty(floats)
        for start in range(0, tokens, lanes):
            changes = (
                *given, (a.TOKENS, min(lanes, tokens - start)), (a.X, from_ + 4 * start * self.wide_in),
                (a.OUT, to + 4 * start * self.wide_out), (a.SUMS, memory.data_ptr()),
            )  # fmt: skip
            parts.run(pieces, scratch, changes)
            if leaves is not None:
                leaves.run(-(-self.wide_out // CHUNK), 0, changes)

    def shared(self, lanes: int) -> tuple[Work, Work, Work | None, int, int]:
        """Return the works of groups, of parts of one, and of what adds large sums up; the parts, and the floats of sums."""
        groups, parts, leaves, _, _ = TASKS[lanes]
        part = self.part(lanes)
        pieces = -(-self.cut.blocks // part)
        own = pieces if self.looks else 1  # lookups of a part are summed apart, bins have rows of their own
        left = _line(lanes * self.leaves)
        later = self.looks and own * left > LATE
        fields = self.fields(0, 0, 0, 0, 0, 0, part=part, sums_bytes=4 * left * (own > 1), parts=own, later=later)
        adds = Work(leaves, fields) if later else None
        found = self.works[lanes] = Work(groups, fields), Work(parts, fields), adds, pieces, own * left
        return found

    @functools.cached_property
    def turning(self) -> Work:
        """Return the work that turns codes around."""
        fields = list(self.fields(0, 0, 0, 0, 0, 0))
        fields[a.LEAVES - FIRST] = padded(self.cut.n) + 64
        return Work(turns, fields)

    def one(self, x: Tensor, scales: int, bias: int, out: int) -> None:
        """Serve one token x [enters] or [1, enters]."""
        if self.enters > self.wide_in:
            x = torch.nn.functional.pad(x, (0, self.enters - self.wide_in))
        work, pieces, floats, scratch = self.single
        memory = x.new_empty(floats)
        changes = ((a.X, x.data_ptr()), (a.OUT, out), (a.SCALES, scales), (a.BIAS, bias), (a.SUMS, memory.data_ptr()))
        work.run(pieces, scratch, changes)

    @functools.cached_property
    def single(self) -> tuple[Work, int, int, int]:
        """Return one token's work, its parts, and the floats of its sums and of a thread's scratch."""
        cut = self.cut
        if self.turns:
            sums = TURNED + 256 * cut.dim  # and room for a wide codebook, needed before
            scratch = (PLANES * cut.stages * cut.blocks + TURNED_LINE * padded(cut.blocks)) // 4 + sums
            return Work(entries, self.fields(0, 1, self.norms, 0, 0, 0)), -(-cut.n // TURNED), 0, scratch
        value = cut.stages * (cut.n * cut.blocks + 64 * cut.length)
        parts = max(p for p in (1, 2, PARTS) if p == 1 or (value >= p * WORTH_ONE and cut.blocks >= p * k.TOGETHER))
        part = -(-cut.blocks // (parts * k.TOGETHER)) * k.TOGETHER
        pieces = -(-cut.blocks // part)
        own, left = pieces if self.looks else 1, padded(self.leaves)
        norms = self.norms if self.picks else 0
        fields = list(self.fields(0, 1, norms, 0, 0, 0, part=part, sums_bytes=4 * left * (own > 1), parts=own))
        return Work(one, fields), pieces, own * left, 256 * k.TOGETHER + cut.room

    def dots(self, x: Tensor, scales: int, bias: int, out: Tensor) -> None:
        """Serve a few tokens by digits."""
        tokens = x.shape[0]
        work, part = self.by_digits
        changes = (a.X, x.data_ptr()), (a.OUT, out.data_ptr()), (a.SCALES, scales), (a.BIAS, bias), (a.TOKENS, tokens)
        room = tokens if tokens == 1 else -(-tokens // TOGETHER) * TOGETHER
        work.run(-(-self.cut.blocks // part), room * (3 * padded(self.cut.n) + REST) // 4, changes)

    @functools.cached_property
    def by_digits(self) -> tuple[Work, int]:
        """Return the work of a few tokens by digits, and the blocks of a part."""
        assert self.digits is not None
        cut, (books, steps) = self.cut, self.digits
        part = share(cut.blocks, cut.stages * cut.n * cut.blocks * cut.dim, 1, WORTH_DOTS)
        fields = list(self.fields(0, 1, steps.data_ptr(), 0, 0, 0, part=part))
        fields[a.BOOKS - FIRST] = books.data_ptr()
        return Work(dots, fields), part
