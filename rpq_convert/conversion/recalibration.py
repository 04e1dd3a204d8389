"""Recalibration: a converted model fitted to inputs later, from the codebooks and codes that it has.

The walk is that of a calibrated conversion: every layer is dense until its turn comes. It keeps its encoding where nothing
better is found, so under the inputs that it is given no layer gets worse.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from rpq_convert.checkpoint.described import plan_of
from rpq_convert.conversion.bar import Progress, shown
from rpq_convert.conversion.cluster import connected
from rpq_convert.conversion.memory import convert_calibrated, finish
from rpq_convert.core.keywords import keywords
from rpq_convert.core.spec import Spec, dtype_of
from rpq_convert.errors import CalibrationError
from rpq_convert.inputs.items import Calibration, prepare
from rpq_convert.layers import surgery
from rpq_convert.layers.precision import cast, widened, widest
from rpq_convert.layers.rollback import unchanged_on_failure
from rpq_convert.report.schema import Report
from rpq_convert.running.digest import describe


@keywords()
def recalibrate(
    model: nn.Module,
    base: nn.Module,
    data: Calibration,
    *,
    tokenizer: Any = None,
    executor: str = "threads",
    workers: int | None = None,
    progress: Progress | bool | None = None,
) -> Report:
    """Fit a converted model's layers to what they are given, in place, starting from their codebooks and codes.

    Args:
        model, base: the converted model and the dense one that it was made from, perhaps in another precision.
        data, tokenizer: as for `convert(calibration=, tokenizer=)`.
        executor, workers, progress: as for `convert`.

    Returns:
        The size-audit report: sizes as before, errors as they are now.

    Raises:
        CalibrationError: no data, no RPQ layer, or a base that lacks its weight; the model is then as it was.

    Example:
        >>> rpq.convert(model, bits=4); rpq.recalibrate(model, base, batches)
    """
    items, plan = prepare(data, base, "data", tokenizer=tokenizer), plan_of(model)
    # a loaded model does not know how it was fitted, and it does not matter: every fit has a start
    jobs = tuple(replace(j, fit=_fit_of(j.spec)) for j in plan.jobs)
    if not jobs:
        raise CalibrationError(f"{type(model).__name__} has no RPQ layer; convert it first")
    dense = {job.name: _dense(base, job.name, job.shape) for job in jobs}
    wide = None if all(dense[j.name].dtype == dtype_of(j.dtype) for j in jobs) else widest(model, *dense.values())
    if wide is not None:  # the base is in another precision: both meet in the wider one
        dense = {name: p if p.dtype == wide else nn.Parameter(p.detach().to(wide)) for name, p in dense.items()}
        items = [cast(item, wide) for item in items]
    found = surgery.layers_of(model)
    where = {job.name: surgery.places(model, (job.name, *job.aliases)) for job in jobs}
    start = {job.name: {k: t.detach().cpu() for k, t in found[job.name].stored().items()} for job in jobs}
    how: dict[str, Any] = {"executor": executor, "workers": workers, "start": start}
    source = {name: p.detach() for name, p in dense.items()}
    with unchanged_on_failure(model):
        with widened(model, wide) if wide else nullcontext(), connected(executor), shown(progress, plan) as callback:
            for name, places in where.items():
                places.remove(dense[name])
            convert_calibrated(model, replace(plan, jobs=jobs), source, items, callback, how)
        return finish(model, replace(plan, jobs=jobs, options={**plan.options, "calibration": describe(items)}))


def _fit_of(spec: Spec) -> str:
    if spec.rate is not None:
        return "ecvq"
    return "additive" if spec.stages > 1 else "kmeans"


def _dense(base: nn.Module, name: str, shape: tuple[int, ...]) -> nn.Parameter:
    try:
        module, key = surgery.find(base, name)
        parameter = module._parameters[key]
    except (AttributeError, KeyError):
        parameter = None
    if parameter is None or tuple(parameter.shape) != shape:
        raise CalibrationError(
            f"{name} {list(shape)} is no dense parameter of the base; give the model it was made from"
        )
    return parameter
