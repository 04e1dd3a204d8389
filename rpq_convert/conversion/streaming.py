"""Convert a checkpoint tensor by tensor, whatever its size, into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from rpq_convert.checkpoint.extra_state import check_plain
from rpq_convert.checkpoint.metadata import write_rest
from rpq_convert.checkpoint.opening import Opened, either, open_checkpoint
from rpq_convert.conversion.asked import check_address, check_asked, check_plan_alone
from rpq_convert.conversion.bar import Progress, shown
from rpq_convert.conversion.cluster import connected
from rpq_convert.conversion.jobs import run_jobs
from rpq_convert.conversion.memory import convert_calibrated, parameters_of
from rpq_convert.conversion.options import RunKeywords, RunOptions
from rpq_convert.conversion.plans import ConversionKeywords, plan_opened
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.core.results import Encoded
from rpq_convert.core.spec import dtype_name
from rpq_convert.encoding.init_std import configured_std
from rpq_convert.errors import PlanError, SourceError, TimeLimitReached
from rpq_convert.inputs.items import Calibration, prepare
from rpq_convert.planning import needs
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.plan import Job, Plan, Skip
from rpq_convert.report.schema import Dropped, Report, read_report
from rpq_convert.running.digest import describe
from rpq_convert.running.memory import available, within
from rpq_convert.storage.delivery import delivered
from rpq_convert.storage.lock import locked
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.reader import Witnessed
from rpq_convert.storage.records import REPORT
from rpq_convert.storage.room import check_apart, check_free
from rpq_convert.storage.sources import is_drawn
from rpq_convert.storage.writer import Folder


class StreamKeywords(ConversionKeywords, RunKeywords, total=False):
    """What callers may give to `convert_checkpoint`, for type checkers."""


@keywords(PlanOptions, SourceOptions, RunOptions)
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
    **options: Unpack[StreamKeywords],
) -> Report:
    """Convert a checkpoint tensor by tensor, whatever its size, into a folder.

    Args:
        src: a hub id, a transformers folder, or (with `factory`) a safetensors file or folder; or the address of one, such as s3://bucket/folder.
        out: the folder to make, or its address (`storage.delivery`); a killed run leaves `<out>.partial`, and the same call goes on from there.
        overwrite: replace `out`.
        executor: how fits run: `serial`, `threads`, `processes` or `ray` (cluster.py). workers: how many at once at most, up to 4 by default,
            on a cluster as many as it has processors.
        progress: called with each job and its result, or None where an earlier run had done it; by default a bar in notebooks
            and on terminals, none with False.
        plan: a plan made before, for this checkpoint; otherwise one is made from the options.
        calibration, tokenizer: as for `convert`; the model is then loaded and run.
        options: fields of `PlanOptions` and of `SourceOptions`, as for `rpq.plan`, and of `RunOptions`: time_limit, check_source, max_memory,
            address.

    Raises:
        SourceError, PlanError, EncodeError, FolderError: see their docs. TimeLimitReached: what is done is kept. Nothing is left under
            the name `out`.
    """
    asked, source, run = take(options, PlanOptions, SourceOptions, RunOptions)
    check_plan_alone(plan, options, calibrated=calibration is not None)
    check_asked(asked, calibrated=calibration is not None, tokenizer=tokenizer, executor=executor, workers=workers)
    check_address(run.address, executor)
    with (
        within(run.memory),
        delivered(out, overwrite=overwrite) as place,
    ):  # from the beginning: planning and measuring may take hours
        check_apart(src, place)
        check_free(place, overwrite=overwrite)
        fit, seed = (asked.fit, asked.seed) if plan is None else (plan.options.get("fit"), plan.options.get("seed", 0))
        opened = open_checkpoint(src, source, draw=seed if is_drawn(src, source, fit) else None)
        data = calibration
        if calibration is not None and opened.model is not None:
            data = prepare(calibration, opened.filled(), "calibration", tokenizer=tokenizer)
        plan = plan or plan_opened(opened, asked, data=data)
        how: dict[str, Any] = {"executor": executor, "workers": workers, "run": run}
        with shown(progress, plan) as callback:
            return convert_opened(opened, place, plan, data, overwrite=overwrite, progress=callback, **how)


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
    run: RunOptions | None = None,
) -> Report:
    """Convert a checkpoint that was opened before, by a plan that was made for it.

    Args:
        opened: with its weights. out, calibration and the others: as for `convert_checkpoint`.
    """
    if opened.model is None:
        raise SourceError(
            f"{opened.src} has no config.json: give factory='package.module:callable' that builds its model"
        )
    run = run or RunOptions()
    how: dict[str, Any] = {"executor": executor, "workers": workers}
    with within(run.memory), locked(out), connected(executor, run.address):
        needs.check_memory(plan.jobs, available(), drawn=opened.is_drawn)
        data = None if calibration is None else prepare(calibration, opened.filled(), "calibration")
        if data is not None:
            plan = replace(plan, options={**plan.options, "calibration": describe(data)})
        plan = _checked(plan, opened)
        folder = Folder(out, plan, overwrite=overwrite, origin=opened.origin, closely=run.check_source)
        if folder.is_complete:
            return read_report(folder.finish() / REPORT)
        aliases = {x.name: (x.name, *x.aliases) for items in (plan.jobs, plan.skips) for x in items}

        def original(item: Job | str) -> Tensor:
            return either(opened.source, aliases[item if isinstance(item, str) else item.name])

        folder.compare(original, original)
        try:
            _fit(opened, folder, data, progress, how, run)
        except Exception:
            folder.forget()  # such as of data that is none for this model: the next try may have other settings
            raise
        folder.write_weights(original)
        folder.check_source(original, original)
        facts = {j.name: folder.pieces.facts(j) for j in plan.jobs}
        folder.copy(opened.files)
        states = {name: check_plain(name, value) for name, value in getattr(opened.source, "extra", {}).items()}
        return write_rest(
            folder, opened.config, facts, opened.title, opened.base, extra=opened.kept(), extra_state=states
        )


def _fit(
    opened: Opened, folder: Folder, data: Sequence[Any] | None, progress: Progress | None, how: dict[str, Any], run: RunOptions
) -> None:  # fmt: skip
    """Do the jobs that no earlier run has done, and store each.

    Raises:
        TimeLimitReached: some are left.
    """
    plan, pieces = folder.plan, folder.pieces
    by_name = {j.name: j for j in plan.jobs}
    model = None if data is None else opened.give_filled()
    if data is None:
        opened.drop_filled()  # measured for a budget before: a stream needs one tensor at a time
    weights = opened.source if model is None else parameters_of(model)
    std = None
    if opened.is_drawn and opened.model is not None:
        weights, std = parameters_of(opened.model), configured_std(opened.model)
    source = Witnessed(weights)
    done = 0

    def keep(job: Job, encoded: Encoded | None) -> None:
        nonlocal done
        if encoded is not None and encoded.tensors:  # none: a machine of the cluster has written it
            pieces.put(job, encoded, source.digest((job.name, *job.aliases)))
        if progress:
            progress(job, encoded)
        done += 1
        if data is not None and encoded is not None:
            check_time()

    def check_time() -> None:
        if run.is_over and done < len(plan.jobs):
            raise TimeLimitReached(
                f"the time limit of {run.time_limit} is reached: {done} of {len(plan.jobs)} weights are done and kept"
            )

    if data is not None and model is not None:
        convert_calibrated(model, plan, source, data, keep, how, stored=pieces.get, finished=pieces.done)
        return
    for job in plan.jobs:
        if pieces.done(job):
            keep(job, None)
    waiting = (j for j in plan.jobs if not pieces.done(j))
    started = count()  # one at least is done, so that every try gets on
    at_hand = takewhile(lambda job: next(started) == 0 or not run.is_over, waiting)
    for encoded in run_jobs(at_hand, source, std=std, pieces=pieces, **how):
        keep(by_name[encoded.name], encoded)
    check_time()


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
