"""Plan a conversion of anything that can be opened: a model, a config, a folder, a repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from rpq_convert.calibration.sensitivity import Progress, measure_for, measured, needs_sensitivities
from rpq_convert.checkpoint.opening import Opened, open_checkpoint
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.inputs.items import Calibration
from rpq_convert.layers import surgery
from rpq_convert.planning import budget
from rpq_convert.planning.heads import head_rules
from rpq_convert.planning.options import MEASURED, PlanKeywords, PlanOptions
from rpq_convert.planning.plan import Plan
from rpq_convert.planning.quantized import refuse_model
from rpq_convert.report.curve import Curve
from rpq_convert.running.wrappers import unwrapped
from rpq_convert.storage.options import SourceKeywords, SourceOptions
from rpq_convert.storage.sources import is_drawn


class ConversionKeywords(PlanKeywords, SourceKeywords, total=False):
    """What callers may give to plan or convert anything that can be opened, for type checkers."""


@keywords(PlanOptions, SourceOptions)
def plan(target: nn.Module | str | Path | Any, **options: Unpack[ConversionKeywords]) -> Plan:
    """Plan a conversion; a weight is read only to measure what a budget is best spent on.

    Args:
        target: a live or meta model, a transformers config, a hub id (of which the config and the headers of the weight
            files are read, kilobytes), a folder, or a safetensors file.
        options: fields of `PlanOptions` (preset, bits, target_size, max_error, sensitivity, dim, codebooks, axis, rules, include,
            exclude, fit, seed, dtype, …) and of `SourceOptions` (factory, revision, token, local_files_only, allow_pickle). With a
            budget (target_size, an average of bits) and weights at hand, a live model or a folder, the model is run to measure
            its sensitivities, unless they are given or `sensitivity="shape"`; with `bits` of entropy-coded weights
            it is where `sensitivity="measured"`.

    Raises:
        PlanError: what was asked cannot be planned. SourceError: nothing found, or a broken file.

    Example:
        >>> rpq.plan(model, bits=4).explain("layers.0.fc1")
    """
    asked, source = take(options, PlanOptions, SourceOptions)
    with unwrapped(target) as inside:
        return plan_opened(open_target(inside, source, asked), asked)


@keywords(PlanOptions, SourceOptions)
def sweep(target: nn.Module | str | Path | Any, *, points: int = 24, **options: Unpack[ConversionKeywords]) -> Curve:
    """Return the curve of size against expected quality.

    Args:
        target: as for `plan`.
        points: plans from the smallest to 8 bits everywhere.
        options: those of `plan` that choose no size.

    Example:
        >>> print(rpq.sweep(model)); Path("curve.svg").write_text(rpq.sweep(model).to_svg("my model"))
    """
    sensitivity = options.pop("sensitivity", None)
    asked, source = take(options, PlanOptions, SourceOptions)
    with unwrapped(target) as inside:
        opened = open_target(inside, source, asked, measured=sensitivity in (None, MEASURED))
        return sweep_opened(opened, asked, points=points, sensitivity=sensitivity)


def open_target(target: Any, source: SourceOptions, options: PlanOptions, *, measured: bool | None = None) -> Opened:
    """Find what to plan for; with weights only where they are to be measured and lie on this machine.

    Args:
        options: of the plan. measured: whether it is measured whatever they say.
    """
    if isinstance(target, nn.Module):
        return Opened(target, None)
    if not isinstance(target, (str, Path)):
        from rpq_convert.hf import loading

        return Opened(loading.build_empty(target), None)
    draw = options.seed if is_drawn(target, source, options.fit) else None
    measured = needs_sensitivities(options) if measured is None else measured
    return open_checkpoint(
        target, source, need="weights" if measured and Path(target).exists() else "headers", draw=draw
    )


def plan_opened(
    opened: Opened, options: PlanOptions, *, data: Calibration | None = None, progress: Progress | None = None
) -> Plan:
    """Plan a conversion; where sizes are chosen to a budget and the weights are at hand, the model is measured.

    Args:
        data: what it is calibrated on, if it is. progress: as for `sensitivities`.

    Raises:
        PlanError: what was asked cannot be planned, or another tool has quantized the model.
    """
    options.check_used()
    if opened.model is not None:
        refuse_model(opened.model)
    asked = options.sensitivity
    if needs_sensitivities(options) and opened.model is not None:
        options = measure_for(options, opened.filled, data, progress)
    rules = None if opened.model is None else head_rules(opened.model)
    fed = data is not None
    plan = budget.make_plan(opened.slots(), options, head_rules=rules, warnings=_notes(opened), calibrated=fed)
    how = {"sensitivity": MEASURED} if asked == MEASURED else {}
    return replace(plan, options={**plan.options, **how}, dropped=opened.dropped())


def sweep_opened(
    opened: Opened, options: PlanOptions, *, points: int = 24, sensitivity: Any = None, progress: Progress | None = None
) -> Curve:
    """Return the curve of size against expected quality, by measured sensitivities where `plan_opened` would measure them."""
    if opened.model is not None and sensitivity in (None, MEASURED):
        sensitivity = measured(options, opened.filled, progress=progress)
    return budget.sweep(opened.slots(), options, sensitivity, points=points, warnings=_notes(opened))


def _notes(opened: Opened) -> Sequence[str]:
    if opened.model is not None:
        coded = len(surgery.layers_of(opened.model))
        return [*opened.notes, *([f"{coded} weights are codes already and stay as they are"] if coded else [])]
    return ["planned from tensor names and shapes alone: layer types are guesses; give a factory to convert"]
