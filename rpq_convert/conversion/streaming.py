"""Convert a checkpoint tensor by tensor, whatever its size, into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from rpq_convert.checkpoint.extra_state import check_plain
from rpq_convert.checkpoint.metadata import write_rest
from rpq_convert.checkpoint.opening import Opened, either, open_checkpoint
from rpq_convert.conversion.asked import check_asked, check_plan_alone
from rpq_convert.conversion.bar import Progress, shown
from rpq_convert.conversion.jobs import run_jobs
from rpq_convert.conversion.memory import convert_calibrated, parameters_of
from rpq_convert.conversion.plans import ConversionKeywords, plan_opened
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.core.results import Encoded
from rpq_convert.core.spec import dtype_name
from rpq_convert.encoding.init_std import configured_std
from rpq_convert.errors import PlanError, SourceError
from rpq_convert.inputs.items import Calibration, prepare
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.plan import Job, Plan, Skip
from rpq_convert.report.schema import Dropped, Report
from rpq_convert.running.digest import describe
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.room import check_free
from rpq_convert.storage.sources import is_drawn
from rpq_convert.storage.writer import Folder


@keywords(PlanOptions, SourceOptions)
def convert_checkpoint(
    src: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    executor: str = "threads",
    workers: int | None = None,
    progress: Progress | bool | None = None,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    **options: Unpack[ConversionKeywords],
) -> Report:
    """Convert a checkpoint tensor by tensor, whatever its size, into a folder.

    Args:
        src: a hub id, a transformers folder, or (with `factory`) a safetensors file or folder.
        out: the folder to make; a killed run leaves `<out>.partial`, and the same call goes on from there.
        overwrite: replace `out`.
        executor: how fits run: `serial`, `threads` or `processes`. workers: how many at once; up to 4 by default.
        progress: called with each job and its result, or None where an earlier run had done it; by default a bar in notebooks
            and on terminals, none with False.
        plan: a plan made before, for this checkpoint; otherwise one is made from the options.
        calibration, tokenizer: as for `convert`; the model is then loaded and run.
        options: fields of `PlanOptions` and of `SourceOptions`, as for `rpq.plan`.

    Raises:
        SourceError, PlanError, EncodeError, FolderError: see their docs. Nothing is left under the name `out`.
    """
    asked, source = take(options, PlanOptions, SourceOptions)
    check_plan_alone(plan, options)
    check_asked(asked, calibrated=calibration is not None, tokenizer=tokenizer, executor=executor, workers=workers)
    check_free(out, overwrite=overwrite)
    fit, seed = (asked.fit, asked.seed) if plan is None else (plan.options.get("fit"), plan.options.get("seed", 0))
    opened = open_checkpoint(src, source, draw=seed if is_drawn(src, source, fit) else None)
    data = calibration
    if calibration is not None and opened.model is not None:
        data = prepare(calibration, opened.filled(), "calibration", tokenizer=tokenizer)
    plan = plan or plan_opened(opened, asked, data=data)
    how: dict[str, Any] = {"executor": executor, "workers": workers}
    with shown(progress, plan) as callback:
        return convert_opened(opened, out, plan, data, overwrite=overwrite, progress=callback, **how)


def convert_opened(
    opened: Opened,
    out: str | Path,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    overwrite: bool = False,
    executor: str = "threads",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint that was opened before, by a plan that was made for it.

    Args:
        opened: with its weights. out, calibration and the others: as for `convert_checkpoint`.
    """
    if opened.model is None:
        raise SourceError(
            f"{opened.src} has no config.json: give factory='package.module:callable' that builds its model"
        )
    data = None if calibration is None else prepare(calibration, opened.filled(), "calibration")
    if data is not None:
        plan = replace(plan, options={**plan.options, "calibration": describe(data)})
    plan = _checked(plan, opened)
    folder = Folder(out, plan, overwrite=overwrite, origin=opened.origin)
    by_name = {j.name: j for j in plan.jobs}
    how: dict[str, Any] = {"executor": executor, "workers": workers}

    def keep(job: Job, encoded: Encoded | None) -> None:
        if encoded is not None:
            folder.put(job, encoded)
        if progress:
            progress(job, encoded)

    try:
        if data is not None:
            model = opened.give_filled()
            convert_calibrated(model, plan, parameters_of(model), data, keep, how, stored=folder.get)
        else:
            opened.drop_filled()  # measured for a budget before: a stream needs one tensor at a time
            for job in plan.jobs:
                if folder.done(job):
                    keep(job, None)
            left = [j for j in plan.jobs if not folder.done(j)]
            source, std = _tensors(opened)
            for encoded in run_jobs(left, source, std=std, **how):
                keep(by_name[encoded.name], encoded)
    except Exception:
        folder.forget()  # such as of data that is none for this model: the next try may have other settings
        raise
    aliases = {s.name: (s.name, *s.aliases) for s in plan.skips}
    folder.write_weights(lambda name: either(opened.source, aliases[name]))
    facts = {j.name: folder.facts(j) for j in plan.jobs}
    folder.copy(opened.files)
    states = {name: check_plain(name, value) for name, value in getattr(opened.source, "extra", {}).items()}
    return write_rest(folder, opened.config, facts, opened.title, opened.base, extra=opened.kept(), extra_state=states)


def _tensors(opened: Opened) -> tuple[Mapping[str, Tensor], float | None]:
    """Return the tensors to encode, and the deviation of those that are drawn."""
    if opened.is_drawn and opened.model is not None:
        return parameters_of(opened.model), configured_std(opened.model)
    return opened.source, None


def _checked(plan: Plan, opened: Opened) -> Plan:
    """Return the plan with what it leaves out of the source; refuse one that was made for another model.

    Raises:
        PlanError: which tensor the plan does not know, or ties otherwise than the checkpoint does.
    """
    items: list[Job | Skip] = [*plan.jobs, *plan.skips]
    names = {i.name: {i.name, *i.aliases} for i in items}
    slots, kept = opened.slots(), set(opened.kept())
    for slot in slots:
        if slot.name not in kept and names.get(slot.name) != {slot.name, *slot.aliases}:
            raise PlanError(f"the plan is for another model: {slot.name} is not in it, or tied otherwise; plan again")
    left = tuple(
        Dropped(s.name, s.shape, dtype_name(s.dtype), "the plan does not have it") for s in slots if s.name not in names
    )
    return replace(plan, dropped=(*plan.dropped, *left)) if left else plan
