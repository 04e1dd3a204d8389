"""Budget: the size of every parameter chosen so that the whole is as good as its bytes allow.

A plan is made at every rate; what a parameter gets in each of them, and staying dense, are its options. An option weighs
its exact bytes and loses `sensitivity x harm of the expected error`; `allocate` chooses. The outcome is an ordinary plan whose jobs
say their specs, so nothing after it knows of budgets.

Measured sensitivities (`rpq.sensitivities`) decide most. Without them shapes alone do (`rates.by_shape`): every weight of a layer
counts the same, one of an output layer more, one of a table that is only looked up less.

An average of bits of entropy-coded weights is no budget: any rate is possible, so `rates.share` finds them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rpq_convert.core.sizes import parse_size
from rpq_convert.errors import PlanError
from rpq_convert.planning import planner
from rpq_convert.planning.choices import SHAPES, Choices, sizes_of
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.plan import Plan
from rpq_convert.planning.rates import Sensitivity, share
from rpq_convert.planning.rules import Rule, load_preset, preset_names, split_bits
from rpq_convert.planning.slots import Slot
from rpq_convert.report.curve import Curve


def make_plan(
    slots: Sequence[Slot],
    options: PlanOptions,
    *,
    head_rules: Sequence[Rule] | None = None,
    warnings: Sequence[str] = (),
    calibrated: bool = False,
) -> Plan:
    """Plan as `planner.make_plan` does, the size of each parameter chosen where a budget is given.

    Args:
        slots: the model, from `walk` or `walk_headers`.
        options: with a budget, one of: `target_size`, bytes of the finished weight files, met within 1 % and never exceeded;
            `max_error`, the smallest form of each parameter whose expected relative squared error is not above it, and dense
            where it has none; `bits` that no layout has exactly, an average of all that convertible parameters become,
            codebooks and scales counted. `sensitivity` is a mapping from parameter names to loss per unit of relative squared
            error, as `rpq.sensitivities` measures it; or to {bits: loss}, losses that were measured at some sizes. Names left
            out count by their shape, all with `"shape"`. Parameters that a rule gives a size keep it.
        head_rules, warnings: as for `planner.make_plan`. calibrated: whether fits are to inputs.

    Raises:
        PlanError: a budget that cannot be met (it names the sizes that can).
    """
    if not options.budgets:
        plan = planner.make_plan(slots, options, head_rules=head_rules, warnings=warnings)
        return share(plan, slots, options, calibrated=calibrated) if options.shares else plan
    choices = Choices(slots, options, options.sensitivity, warnings)
    if options.max_error is not None:
        return choices.within_error(options.max_error).plan
    if options.target_size is not None:
        return choices.within_size(parse_size(options.target_size)).plan
    assert options.bits is not None
    return choices.within_bits(options.bits).plan


def sweep(
    slots: Sequence[Slot],
    options: PlanOptions,
    sensitivity: Mapping[str, Sensitivity] | str | None = None,
    *,
    points: int = 24,
    warnings: Sequence[str] = (),
) -> Curve:
    """Return the curve of size against expected quality, from the smallest plan to everything at 8 bits.

    Args:
        slots, options, warnings: as for `make_plan`; the options decide no size.
        sensitivity: what the sizes are chosen by, as `PlanOptions.sensitivity`.
        points: how many budgets, each larger than the one before by the same factor.

    Raises:
        PlanError: fewer than two points, or a model of which nothing can be converted.
    """
    if points < 2:
        raise PlanError(f"a curve needs at least 2 points, not {points}")
    choices = Choices(slots, options, sensitivity, warnings)
    if not choices.free:
        raise PlanError("no parameter of this model can be converted, so there is no curve")
    low, high = choices.smallest.plan.file_bytes, choices.uniform[0].file_bytes
    sizes = [round(low * (high / low) ** (i / (points - 1))) for i in range(points)]
    mixed = {p.plan.file_bytes: p for size in sizes if (p := choices.within_size(max(low, size)))}
    named = _presets()
    uniform = [
        (p, _described(size), named.get((size.get("dim", 0), size.get("stages", 0)), ""))
        for size, p in zip(sizes_of(options), choices.uniform)
        if p.jobs
    ]
    return Curve(
        tuple(choices.sample(p.plan, p.loss, "mixed") for p in mixed.values()),
        tuple(replace(choices.sample(p, choices.loss(p), how), preset=preset) for p, how, preset in uniform),
        () if choices.measured else (SHAPES,),
    )


def _described(size: Mapping[str, Any]) -> str:
    if "bits" in size:
        return f"entropy-coded, {size['bits']:g} bits"
    dim, stages = size["dim"], size["stages"]
    return f"dim {dim}{f' x {stages} stages' if stages > 1 else ''}, {8 * stages / dim:.3g} bits"


def _presets() -> dict[tuple[int, int], str]:
    """Return (dim, stages) -> the preset that gives every parameter this layout."""
    presets = [load_preset(name) for name in preset_names()]
    return {split_bits(p.settings["bits"]): p.name for p in presets if "bits" in p.settings and not p.rules}
