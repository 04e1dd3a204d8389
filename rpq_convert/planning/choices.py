"""Choices: what every parameter may become, what each form weighs and costs, and the plans that a budget makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rpq_convert.core.safetensors import SAFETENSORS_NAMES
from rpq_convert.core.spec import Spec
from rpq_convert.errors import PlanError
from rpq_convert.planning import planner
from rpq_convert.planning.allocation import Allocation, allocate
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.plan import Job, Plan, Skip
from rpq_convert.planning.planner import warnings_of
from rpq_convert.planning.rates import Costs, Sensitivity
from rpq_convert.planning.slots import Slot
from rpq_convert.report.curve import Sample

# (dim, stages) of 0.5 to 8 bits. Left out: three stages of dim 6, of less error but more harm than two of dim 4.
RATES = (
    (1, 1), (4, 3), (3, 2), (5, 3), (2, 1), (4, 2), (7, 3), (5, 2), (8, 3), (3, 1), (6, 2), (7, 2), (4, 1), (8, 2),
    (5, 1), (6, 1), (7, 1), (8, 1), (10, 1), (12, 1), (14, 1), (16, 1),
)  # fmt: skip
CODED = (
    7,
    6.5,
    6,
    5.5,
    5,
    4.75,
    4.5,
    4.25,
    4,
    3.75,
    3.5,
    3.25,
    3,
    2.75,
    2.5,
    2.25,
    2,
    1.75,
    1.5,
    1.25,
    1,
    0.75,
    0.5,
)  # bits
# Errors of equal size harm the more the farther a rate is from 2 bits. Above, they sit on the large weights, above all with one
# codebook: by what factor for every bit, fitted to SmolLM2's perplexities, [one stage, several]. Below, they no longer add up as
# squares: by what factor for every bit, fitted to MiniLM's cosine with its word embedding alone at 1.6, 1.33 and 1 bits.
HARM, BELOW = (1.2, 1.1), 1.7
ROUNDING = 1e-7
CLOSE = 0.99  # of a budget is to be used
BY = "the budget"
SHAPES = "sizes were chosen by shapes alone; measured sensitivities choose better (rpq.sensitivities)"


@dataclass(frozen=True)
class Option:
    """What a parameter may become.

    Args:
        decision: the job, or the skip of a parameter that stays dense.
        nbytes: of its tensors. entry: with its lines of a file's header, at most.
        error: expected relative squared error. loss: what is minimised.
    """

    decision: Job | Skip
    nbytes: int
    entry: int
    error: float = 0.0
    loss: float = 0.0


@dataclass(frozen=True)
class Point:
    """A plan of the curve of size against quality; `loss` is the sum of its options'."""

    plan: Plan
    loss: float


def sizes_of(options: PlanOptions) -> list[dict[str, Any]]:
    """Return the fields of options that give every parameter the same size, for all sizes that there are."""
    if options.coded:
        return [{"bits": bits} for bits in CODED]
    return [{"dim": dim, "stages": stages} for dim, stages in RATES]


def expected(job: Job) -> float:
    """Return a job's expected relative squared error as a fit, at least that of rounding to 16 bits."""
    return max(ROUNDING, job.spec.expected_error(job.weight_view, job.shape))


def harm(spec: Spec, error: float) -> float:
    """Return what a relative squared error of this layout counts, in errors of 2 bits."""
    if spec.rate is not None:  # large weights are as exact as small ones
        return error
    factor: float = BELOW ** (2 - spec.bits) if spec.bits < 2 else HARM[spec.stages > 1] ** (spec.bits - 2)
    return error * factor


class Choices:
    """The options of every parameter of a model, and the plans that budgets make of them.

    Args:
        slots, options, sensitivity, warnings: as for `sweep`.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        options: PlanOptions,
        sensitivity: Mapping[str, Sensitivity] | str | None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.slots, self.warnings = slots, tuple(warnings)
        one = replace(options, preset=None, bits=None, target_size=None, max_error=None, sensitivity=None)
        self.uniform = [planner.make_plan(slots, replace(one, **size), warnings=warnings) for size in sizes_of(options)]
        self.costs = Costs(slots, sensitivity, {j.name for p in self.uniform for j in p.jobs})
        decisions = [_in_order(p, slots) for p in self.uniform]
        self.items = [self._options(slot, list(dict.fromkeys(d[i] for d in decisions))) for i, slot in enumerate(slots)]
        self.free = {i for i, o in enumerate(self.items) if any(isinstance(x.decision, Job) for x in o)}

    def _options(self, slot: Slot, decisions: list[Job | Skip]) -> list[Option]:
        job = next((d for d in decisions if isinstance(d, Job)), None)
        if job is None:  # whatever the reason
            decisions = decisions[:1]
        elif len(decisions) > 1:  # else a rule gave it a size
            dense = Skip(slot.name, slot.aliases, slot.layer, slot.shape, job.dtype, f"kept dense by {BY}")
            decisions = [*(replace(d, rule=BY) for d in decisions if isinstance(d, Job)), dense]
        return [self._option(slot, d) for d in decisions]

    def _option(self, slot: Slot, decision: Job | Skip) -> Option:
        if isinstance(decision, Skip):
            return Option(decision, decision.nbytes, decision.nbytes + self._lines({decision.name: decision.shape}))
        tensors = decision.spec.stored(decision.weight_view, decision.shape)
        nbytes = sum(decision.nbytes.values())
        lines = self._lines({f"{decision.name}_rpq.{part}": shape for part, (_, shape) in tensors.items()})
        error = expected(decision)
        return Option(decision, nbytes, nbytes + lines, error, self._loss(slot, decision, error))

    def _lines(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the most bytes that these tensors take in a header."""
        kind = max(SAFETENSORS_NAMES.values(), key=len)
        lines = {k: {"dtype": kind, "shape": s, "data_offsets": [self._far, self._far]} for k, s in shapes.items()}
        return len(json.dumps(lines, separators=(",", ":"), ensure_ascii=False).encode())

    @cached_property
    def _far(self) -> int:
        return sum(s.nbytes for s in self.slots)  # the largest offset that a header may hold

    def _loss(self, slot: Slot, job: Job, error: float) -> float:
        return self.costs.of(slot, job.spec, harm(job.spec, error))

    @property
    def measured(self) -> bool:
        return bool(self.costs.measured)

    def within_size(self, target: int) -> Point:
        """Return the best plan whose weight files take at most `target` bytes."""
        small, large = self.smallest, self.point([max(range(len(o)), key=lambda i: o[i].entry) for o in self.items])
        if not small.plan.file_bytes <= target <= large.plan.file_bytes / CLOSE:
            raise PlanError(
                f"{target:,} bytes cannot be met: the weight files can take from {small.plan.file_bytes:,} to "
                f"{large.plan.file_bytes:,} bytes"
            )
        found = self._fit(self.items, target) or small
        if found.plan.file_bytes < CLOSE * target:
            found = self._fit(self.finer, target) or found
        if large.plan.file_bytes <= target and large.loss < found.loss:  # its header is shorter than it could have been
            found = large
        return self._told(found, found.plan.file_bytes, target, {"target_size": target})

    def _fit(self, items: Sequence[Sequence[Option]], target: int) -> Point | None:
        room = target
        while True:
            try:
                found = allocate([[(o.entry, o.loss) for o in options] for options in items], room)
            except ValueError:
                return None
            point = self.point(found.choice, items)
            over = point.plan.file_bytes - target  # a file takes some bytes that are no tensor's
            if over <= 0:
                return point
            room -= over

    def within_bits(self, bits: float) -> Point:
        """Return the best plan whose convertible parameters take at most `bits` per weight on average."""
        weights = sum(math.prod(self.slots[i].shape) for i in self.free)
        room = int(bits * weights / 8)
        small, large = (sum(pick(x.nbytes for x in self.items[i]) for i in self.free) for pick in (min, max))
        if not small <= room <= large / CLOSE:
            raise PlanError(
                f"{bits} bits per weight cannot be met: with codebooks and scales these parameters can take from "
                f"{8 * small / max(1, weights):.3f} to {8 * large / max(1, weights):.3f}"
            )

        def spend(items: Sequence[Sequence[Option]]) -> Allocation:
            return allocate(
                [[(o.nbytes * (i in self.free), o.loss) for o in options] for i, options in enumerate(items)], room
            )

        items, found = self.items, spend(self.items)
        if found.nbytes < CLOSE * room:
            items, found = self.finer, spend(self.finer)
        return self._told(self.point(found.choice, items), found.nbytes, room, {"bits": bits})

    def within_error(self, limit: float) -> Point:
        """Return the smallest plan whose parameters each have an expected error of at most `limit`."""
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < 1:
            raise PlanError(f"max_error must lie between 0 and 1, a share of each weight's energy, not {limit!r}")
        fit = [[i for i, x in enumerate(o) if x.error <= limit or len(o) == 1] for o in self.items]
        point = self.point([min(f, key=lambda i: o[i].entry) for f, o in zip(fit, self.items)])
        return self._told(point, 1, 1, {"max_error": limit})

    @property
    def smallest(self) -> Point:
        return self.point([min(range(len(o)), key=lambda i: o[i].entry) for o in self.items])

    @cached_property
    def finer(self) -> list[list[Option]]:
        """The options, and their jobs with 2, 4, 8, … codebooks: small steps where few parameters leave large gaps."""
        return [[*options, *(m for o in options if len(options) > 1 for m in _with_books(o))] for options in self.items]

    def point(self, choice: Sequence[int], items: Sequence[Sequence[Option]] | None = None) -> Point:
        """Return the plan of these options, one of every parameter."""
        chosen = [options[i] for options, i in zip(items or self.items, choice)]
        decisions = [o.decision for o in chosen]
        base = self.uniform[0]
        options = {k: v for k, v in base.options.items() if k != "stages"} | {"dim": None}
        jobs = tuple(d for d in decisions if isinstance(d, Job))
        skips = tuple(d for d in decisions if isinstance(d, Skip))
        return Point(Plan(jobs, skips, options, base.max_shard_size, parts=base.parts), sum(o.loss for o in chosen))

    def loss(self, plan: Plan) -> float:
        """Return the expected loss of any plan for this model."""
        slots = {s.name: s for s in self.slots}
        return sum(self._loss(slots[j.name], j, expected(j)) for j in plan.jobs)

    def sample(self, plan: Plan, loss: float, how: str) -> Sample:
        """Return a plan as a row of a curve."""
        sizes = {j.name: math.prod(j.shape) for j in plan.jobs}
        weights = sum(math.prod(s.shape) for s in self.slots if not s.buffer)
        free = sum(math.prod(self.slots[i].shape) for i in self.free)
        error = sum(sizes[j.name] * expected(j) for j in plan.jobs) / free
        return Sample(how, plan.file_bytes, 8 * plan.file_bytes / weights, error, loss)

    def _told(self, point: Point, used: int, room: int, asked: Mapping[str, Any]) -> Point:
        """Return the point whose plan says what was asked and what there is to know."""
        plan = replace(
            point.plan, options={**point.plan.options, **asked, "sensitivity": "given" if self.measured else "by shape"}
        )
        told = list(self.warnings)
        if not self.measured and "max_error" not in asked:
            told.append(SHAPES)
        if used < CLOSE * room:
            told.append(f"{used:,} bytes are the nearest to {room:,} that these parameters can take")
        return replace(point, plan=replace(plan, warnings=(*told, *warnings_of(plan))))


def _in_order(plan: Plan, slots: Sequence[Slot]) -> list[Job | Skip]:
    found: dict[str, Job | Skip] = {j.name: j for j in plan.jobs}
    found |= {s.name: s for s in plan.skips}
    return [found[s.name] for s in slots]


def _with_books(option: Option) -> list[Option]:
    job = option.decision
    if not isinstance(job, Job) or job.spec.rate is not None:
        return []
    found = []
    blocks = job.spec.blocks(job.weight_view, job.shape)
    for books in (b for k in range(blocks.bit_length()) for b in (2 * 2**k, 3 * 2**k) if job.spec.books < b <= blocks):
        more = replace(job, spec=replace(job.spec, books=books))
        grown = sum(more.nbytes.values()) - option.nbytes
        error = expected(more)
        found.append(
            Option(more, option.nbytes + grown, option.entry + grown + 9, error, option.loss * error / option.error)
        )
    return [o for o in found if o.nbytes < job.dense_bytes]
