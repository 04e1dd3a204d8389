"""Rates: what errors of a weight cost, and how weights whose codes are entropy-coded share their bits by that.

`bits` is an average. A bit more divides a weight's squared error by four, so what all errors cost together is least where a bit more
would save as much everywhere (reverse water-filling: Cover and Thomas 2006, section 10.3.3): a weight whose errors cost four times as
much gets one bit more. The stored bytes are those of equal rates, or a few fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rpq_convert.core import rans
from rpq_convert.core.elementary import log2
from rpq_convert.core.spec import Spec
from rpq_convert.errors import PlanError
from rpq_convert.planning.options import MOST_CODED, PlanOptions
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.planning.slots import Slot

Sensitivity = float | Mapping[Any, float]
STEPS = 1000  # of a bit
BELOW, ABOVE = 0.7, 1.2  # bits that a rate may lie below and above the average: errors add up while they are small
DAMPED = 0.8  # of the bits that sensitivities ask for, which are measured on few inputs and for errors of another size
# What an error of a table counts, in errors of a layer's weights. One that is only looked up: MiniLM at 3 bits loses .237 of its mean
# cosine where that is 4, .135 at 1, .063 at 1/4 and .052 at 1/16. A head, whose errors reach every prediction: SmolLM2's, which it looks up
# as well; k-means errs most on its large weights.
LOOKED_UP, HEAD, CODED_HEAD = 1 / 16, 4.0, 1.7


def by_shape(slot: Slot, *, coded: bool = False, calibrated: bool = False) -> float:
    """Return what a parameter's relative error counts where nothing was measured.

    Args:
        coded: whether its codes are entropy-coded. calibrated: whether fits are to inputs, which leaves a head's errors no worse than
            others'.
    """
    weights = math.prod(slot.shape)
    if slot.view is None or not weights:
        return float(weights)
    if slot.looked_up:
        return weights * LOOKED_UP
    inputs, outputs = slot.view.matrix_shape(slot.shape, "out")
    if slot.view.axis == "in" or outputs > 8 * inputs:
        return weights * (1.0 if calibrated else CODED_HEAD if coded else HEAD)
    return float(weights)


def interpolate(measured: Mapping[float, float], bits: float) -> float:
    """Return the loss at a rate from losses measured at others: log-linear in bits, the end pieces continued."""
    points = sorted((float(b), max(float(loss), 1e-300)) for b, loss in measured.items())
    if len(points) == 1:
        one: float = points[0][1] * 4.0 ** (points[0][0] - bits)
        return one
    k = next((i for i in range(1, len(points) - 1) if bits <= points[i][0]), len(points) - 1)
    (b0, l0), (b1, l1) = points[k - 1], points[k]
    return math.exp(math.log(l0) + (math.log(l1) - math.log(l0)) * (bits - b0) / (b1 - b0))


class Costs:
    """What errors of a model's parameters cost.

    Args:
        slots: the model.
        sensitivity: parameter names -> loss per unit of relative squared error, or {bits: loss}; names left out, and all with None or
            `"shape"`, count by their shape.
        converted: names of the parameters whose shapes together count 1 where nothing is measured. calibrated: as for `by_shape`.

    Raises:
        PlanError: a name that the model does not have.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        sensitivity: Mapping[str, Sensitivity] | str | None,
        converted: Iterable[str],
        *,
        calibrated: bool = False,
    ) -> None:
        self.calibrated = calibrated
        self.measured = {} if sensitivity is None or isinstance(sensitivity, str) else dict(sensitivity)
        shapes = {n: by_shape(s) for s in slots for n in (s.name, *s.aliases)}
        if strange := [n for n in self.measured if n not in shapes]:
            raise PlanError(f"sensitivity names {strange[0]}, which the model does not have")
        plain = {n: v for n, v in self.measured.items() if not isinstance(v, Mapping)}
        if plain:
            self.unit = sum(plain.values()) / max(1.0, sum(shapes[n] for n in plain))
        else:
            self.unit = 1 / max(1.0, sum(shapes[n] for n in converted))

    def of(self, slot: Slot, spec: Spec, error: float) -> float:
        """Return what a parameter of this form costs with this relative squared error."""
        known = next((self.measured[n] for n in (slot.name, *slot.aliases) if n in self.measured), None)
        if known is None:
            return by_shape(slot, coded=spec.rate is not None, calibrated=self.calibrated) * self.unit * error
        return interpolate(known, spec.bits) if isinstance(known, Mapping) else known * error


def share(plan: Plan, slots: Sequence[Slot], options: PlanOptions, *, calibrated: bool = False) -> Plan:
    """Return a plan whose entropy-coded parameters take `options.bits` on average; those keep their rate that a rule gives one.

    Args:
        plan: of these slots, with that rate for all. calibrated: whether fits are to inputs.

    Raises:
        PlanError: as `Costs`.
    """
    bits = options.bits
    assert bits is not None
    by_table = calibrated and options.sensitivity is None
    costs = Costs(slots, options.sensitivity, [j.name for j in plan.jobs], calibrated=by_table)
    free = {s.name: s for s in slots if not _has_own(s, options)}
    jobs = [j for j in plan.jobs if j.spec.rate == bits and j.name in free]
    numbers = [math.prod(j.shape) for j in jobs]
    each = [costs.of(free[j.name], j.spec, 1.0) / n for j, n in zip(jobs, numbers)]
    wanted = [round(STEPS * DAMPED * float(log2(max(c, 1e-300))) / 2) for c in each]
    if len(set(wanted)) < 2:
        return plan
    low, high = (round(STEPS * b) for b in (max(bits - BELOW, bits / 2), min(bits + ABOVE, MOST_CODED)))

    def rates(level: int) -> list[float]:
        return [min(max(level + w, low), high) / STEPS for w in wanted]

    def used(level: int) -> int:
        return sum(rans.stream_bytes(rate, n) for rate, n in zip(rates(level), numbers))

    room = sum(rans.stream_bytes(bits, n) for n in numbers)
    least, most = low - max(wanted), high - min(wanted) + 1  # all at the lowest rate, and beyond all at the highest
    while most - least > 1:
        level = (least + most) // 2
        least, most = (level, most) if used(level) <= room else (least, level)
    found = {j.name: _with_rate(j, rate, bits) for j, rate in zip(jobs, rates(least))}
    by = {} if options.sensitivity is None else {"sensitivity": "given" if costs.measured else "by shape"}
    return replace(plan, jobs=tuple(found.get(j.name, j) for j in plan.jobs), options={**plan.options, **by})


def _has_own(slot: Slot, options: PlanOptions) -> bool:
    rule = next((r for r in options.rules if r.matches(slot)), None)
    return rule is not None and "bits" in rule.settings


def _with_rate(job: Job, rate: float, bits: float) -> Job:
    return replace(job, spec=replace(job.spec, rate=rate), rule=f"{job.rule}, {bits:g} bits on average")
