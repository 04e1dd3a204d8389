"""Convert a checkpoint tensor by tensor, whatever its size, into a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rpq_convert.checkpoint.metadata import write_rest
from rpq_convert.checkpoint.opening import Factory, either, open_checkpoint
from rpq_convert.conversion.jobs import run_jobs
from rpq_convert.conversion.memory import Progress, convert_calibrated
from rpq_convert.conversion.plans import plan_opened
from rpq_convert.core.results import Encoded
from rpq_convert.errors import SourceError
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.report.schema import Report
from rpq_convert.running.data import Calibration, inputs_of
from rpq_convert.running.digest import describe
from rpq_convert.storage.writer import Folder


def convert_checkpoint(
    src: str | Path,
    out: str | Path,
    *,
    factory: str | Factory | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    executor: str = "threads",
    workers: int | None = None,
    progress: Progress | None = None,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> Report:
    """Convert a checkpoint tensor by tensor, whatever its size, into a folder.

    Args:
        src: a hub id, a transformers folder, or (with `factory`) a safetensors file or folder.
        out: the folder to make; a killed run leaves `<out>.partial`, and the same call goes on from there.
        factory: `"package.module:callable"` or a callable that builds the model, for what is not transformers'.
        overwrite: replace `out`.
        revision: branch, tag or commit of a hub id. token: instead of the stored one. local_files_only: take it from the
            local cache. allow_pickle: read pickled weights, as tensors only, where there are no others.
        plan: a plan made before, for this checkpoint; otherwise one is made from the options.
        calibration: as for `convert`; the model is then run, its weights read from disk as they are used.
        options: those of `rpq.plan`.

    Raises:
        SourceError, PlanError, EncodeError, FolderError: see their docs. Nothing is left under the name `out`.
    """
    opened = open_checkpoint(
        src,
        factory=factory,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    if opened.model is None:
        raise SourceError(f"{src} has no config.json: give factory='package.module:callable' that builds its model")
    model = opened.model if calibration is None else opened.filled()
    data = inputs_of(calibration, model)
    plan = plan or plan_opened(opened, data=data, **options)
    if data is not None:
        plan = replace(plan, options={**plan.options, "calibration": describe(data)})
    folder = Folder(out, plan, overwrite=overwrite, origin=opened.origin)
    by_name = {j.name: j for j in plan.jobs}
    how: dict[str, Any] = {"executor": executor, "workers": workers}

    def keep(job: Job, encoded: Encoded | None) -> None:
        if encoded is not None:
            folder.put(encoded)
        if progress:
            progress(job, encoded)

    if data is not None:
        convert_calibrated(model, plan, opened.source, data, keep, how, stored=folder.get)
    else:
        for job in plan.jobs:
            if folder.done(job):
                keep(job, None)
        for encoded in run_jobs([j for j in plan.jobs if not folder.done(j)], opened.source, **how):
            keep(by_name[encoded.name], encoded)
    aliases = {s.name: (s.name, *s.aliases) for s in plan.skips}
    folder.write_weights(lambda name: either(opened.source, aliases[name]))
    facts = {j.name: folder.facts(j) for j in plan.jobs}
    title = Path(src).resolve().name if Path(src).exists() else Path(src).name
    folder.copy(opened.files)
    return write_rest(folder, opened.config, facts, title, opened.base)
