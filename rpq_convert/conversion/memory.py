"""Convert a model in memory, in place. Whatever fails, the model is as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from rpq_convert.calibration.sequential import walk
from rpq_convert.checkpoint.described import keep_evaluations, report_of
from rpq_convert.checkpoint.metadata import with_evaluation
from rpq_convert.checkpoint.opening import Opened
from rpq_convert.conversion.asked import check_asked, check_plan_alone
from rpq_convert.conversion.bar import Progress, shown
from rpq_convert.conversion.cluster import connected
from rpq_convert.conversion.jobs import run_jobs
from rpq_convert.conversion.options import BEST, GOOD
from rpq_convert.conversion.plans import plan_opened
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.core.results import Encoded
from rpq_convert.core.spec import dtype_of
from rpq_convert.encoding.encode import build
from rpq_convert.encoding.init_std import configured_std
from rpq_convert.encoding.measure import set_record
from rpq_convert.errors import PlanError
from rpq_convert.evaluation.check import quick_check
from rpq_convert.inputs.items import Calibration, prepare
from rpq_convert.inputs.synthetic import own_inputs
from rpq_convert.layers import surgery
from rpq_convert.layers.encoders import padded
from rpq_convert.layers.rollback import unchanged_on_failure
from rpq_convert.layers.surgery import AFTER, Places
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.layer_types import original_class
from rpq_convert.planning.options import PlanKeywords, PlanOptions
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.planning.quantized import refuse_model
from rpq_convert.report.schema import Report
from rpq_convert.report.verdict import SYNTHETIC
from rpq_convert.running.digest import describe
from rpq_convert.running.holders import optimizers_of
from rpq_convert.running.offload import refuse_offloaded
from rpq_convert.running.wrappers import unwrapped


@keywords(PlanOptions)
def convert(
    model: nn.Module,
    *,
    executor: str = "threads",
    workers: int | None = None,
    progress: Progress | bool | None = None,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    effort: Literal["fast", "good"] | None = None,
    check: bool | Calibration = False,
    **options: Unpack[PlanKeywords],
) -> Report:
    """Convert a model in place.

    Args:
        model: any module, also inside `torch.compile`; on meta with `fit="random"` it stays on meta but for codes and codebooks.
        progress: called with each job and its result; by default a bar in notebooks and on terminals, none with False.
        plan: a plan made before; otherwise one is made from the options.
        calibration: inputs such as the model will see: layers are then fitted in the order of execution to what they are given,
            which keeps far more quality from 2 to 5 bits and takes some forward passes over them. Each is a tensor, a tuple or a
            dict of keyword arguments, a text, a chat, a picture or a row of a data set (`inputs/items.py`); or a
            function of the dense model that returns such inputs (`rpq.own_inputs`).
        tokenizer: the tokenizer or processor of texts, chats and pictures; by default that of the model's folder.
        effort: `good` calibrates on synthetic inputs where no calibration is given; otherwise the weights alone decide.
        check: compare the result with the model as it was, on these inputs, or True for synthetic ones: the report's evaluations, and
            its verdict in words, then say what was lost, and so does a folder that the model is saved to. It takes a copy of the dense model.
        options: fields of `PlanOptions`: preset, bits, dim, codebooks, rules, include, exclude, fit, seed, …

    Returns:
        The size-audit report, with the measured error of every layer.

    Raises:
        PlanError: what was asked cannot be planned. EncodeError: NaN or infinite weights; CalibrationError: data
            that is none for this model. The model is then unchanged.

    Example:
        >>> report = rpq.convert(model, bits=4); print(report)
    """
    (asked,) = take(options, PlanOptions)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{model!r} is no module; convert_checkpoint(src, out) converts a folder, a file or a hub id")
    check_plan_alone(plan, options, calibrated=calibration is not None)
    how: dict[str, Any] = {"executor": executor, "workers": workers}
    check_asked(asked, calibrated=calibration is not None, effort=effort, tokenizer=tokenizer, **how)
    if effort == BEST:
        raise PlanError(
            "effort best tunes against the dense model: keep a copy, take effort good, and then rpq.tune(model, copy, data)"
        )
    if effort == GOOD and calibration is None:
        calibration = partial(own_inputs, seed=asked.seed)
    with unwrapped(model) as inside:
        optimizers = optimizers_of(inside)
        refuse_model(inside)
        refuse_offloaded(inside, "convert")
        with unchanged_on_failure(inside), torch.inference_mode(False):  # whose tensors would never train
            data = None if calibration is None else prepare(calibration, inside, "calibration", tokenizer=tokenizer)
            plan = plan or plan_opened(Opened(inside, None), asked, data=data)
            if not plan.jobs and (coded := len(surgery.layers_of(inside))):
                raise PlanError(
                    f"{original_class(inside).__name__} is converted already: {coded} weights are codes; start from the dense model, or "
                    "make it dense with rpq.restore(model)"
                )
            plan = replace(plan, warnings=(*plan.warnings, *_stale(inside, plan, optimizers)))
            base = None if check is False else copy.deepcopy(inside)
            with connected(executor), shown(progress, plan) as callback:
                report = _convert(inside, plan, data, callback, how)
        return report if base is None else _checked(base, inside, report, check)


def _checked(base: nn.Module, model: nn.Module, report: Report, data: Any) -> Report:
    """Return the report with what a comparison of both models found, or a warning that says what prevented it."""
    try:
        found = quick_check(
            base, model, None if data is True else prepare(data, base, "check", labels=True), seconds=math.inf
        )
    except Exception as e:  # models raise what they like, and the conversion is done
        return replace(
            report, warnings=(*report.warnings, f"not checked: {(str(e).strip() or repr(e)).splitlines()[0]}")
        )
    report = with_evaluation(report, SYNTHETIC if data is True else "given inputs", found)
    keep_evaluations(model, report)
    return report


def _stale(model: nn.Module, plan: Plan, optimizers: Sequence[tuple[str, frozenset[int]]]) -> list[str]:
    """Return warnings about optimizers that would go on with parameters that are no longer there."""
    dense = {id(surgery.parameter_at(model, job.name)) for job in plan.jobs}
    return [
        f"{name} holds {len(held & dense)} of the converted weights and will not train their codebooks; make the optimizer anew"
        for name, held in optimizers
        if held & dense
    ]


def _convert(
    model: nn.Module, plan: Plan, data: Sequence[Any] | None, progress: Progress | None, how: Mapping[str, Any]
) -> Report:
    source = parameters_of(model)
    unknown = [j.name for j in plan.jobs if j.name not in source]
    if unknown:
        raise PlanError(f"the plan is for another model: it has no parameter {unknown[0]}")
    if data is not None:
        plan = replace(plan, options={**plan.options, "calibration": describe(data)})
        convert_calibrated(model, plan, source, data, progress, how)
    else:
        results: dict[str, Encoded] = {}
        by_name = {j.name: j for j in plan.jobs}
        for encoded in run_jobs(plan.jobs, source, std=configured_std(model) if _on_meta(source) else None, **how):
            results[encoded.name] = encoded
            if progress:
                progress(by_name[encoded.name], encoded)
        source.clear()
        for job in plan.jobs:
            swap(surgery.places(model, (job.name, *job.aliases)), job, results.pop(job.name))
    return finish(model, plan)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter under each of its names, detached."""
    return {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}


def finish(model: nn.Module, plan: Plan) -> Report:
    """Do what follows when every job of a model in memory is done; return the report."""
    dtype = plan.options.get("dtype")
    if dtype:
        _cast_rest(model, getattr(torch, dtype))
    model.__dict__["_rpq_options"] = dict(plan.options)  # a class may refuse assignments
    report = report_of(model, plan)
    for act in AFTER:
        act(model)
    return report


def convert_calibrated(
    model: nn.Module,
    plan: Plan,
    source: Mapping[str, Tensor],
    data: Sequence[Any],
    progress: Progress | None,
    how: Mapping[str, Any],
    stored: Callable[[Job], Encoded | None] = lambda job: None,
    finished: Callable[[Job], bool] = lambda job: False,
) -> None:
    """Fit and install layer by layer, but for what an earlier run has `stored`, which it has where it has `finished` a job.

    The model runs in its own dtype; a weight is in that of its job when all are done.
    """
    if _on_meta(source):
        raise PlanError("a model on meta has no outputs to calibrate; convert it with fit='random' or load its weights")
    by_name = {job.name: job for job in plan.jobs}
    where = {job.name: surgery.places(model, (job.name, *job.aliases)) for job in plan.jobs}
    padded(model)  # it runs while some layers are converted and others not yet
    done: dict[str, RPQWeight] = {}

    def install(job: Job, encoded: Encoded, new: bool) -> None:
        running = where[job.name].parameter
        assert running is not None  # the plan was checked against the model
        done[job.name] = weight = swap(where[job.name], job, encoded)
        weight._probe = weight._probe.to(running.dtype)
        if progress:
            progress(job, encoded if new else None)

    with closing(walk(model, plan.jobs, data, finished)) as groups:
        for group, statistics in groups:
            found = {job.name: stored(job) for job in group}
            for job in group:
                if (encoded := found[job.name]) is not None:
                    install(job, encoded, new=False)
            waiting = [job for job in group if found[job.name] is None]
            for encoded in run_jobs(waiting, source, statistics=statistics, **how):
                install(by_name[encoded.name], encoded, new=True)
            del statistics  # before the next group's Hessian is made
    for name, weight in done.items():
        weight._probe = weight._probe.to(dtype_of(by_name[name].dtype))


def _on_meta(source: Mapping[str, Tensor]) -> bool:
    return any(t.is_meta for t in source.values())


def _cast_rest(model: nn.Module, dtype: torch.dtype) -> None:
    inside = {id(t) for r in surgery.layers_of(model).values() for t in r.parameters()}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in inside and p.is_floating_point():
                p.data = p.data.to(dtype)
        for name, b in module._buffers.items():
            if b is not None and b.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = b.to(dtype)


def swap(places: Places, job: Job, encoded: Encoded) -> RPQWeight:
    """Replace a parameter by its encoding, under every name it has; return the weight."""
    old = places.parameter
    assert old is not None  # the plan was checked against the model
    device = old.device if not old.is_meta else torch.device("cpu")
    rpq = build(job, {k: t.to(device) for k, t in encoded.tensors.items()}, encoded.zero_row)
    record = {
        "layer": job.layer, "fit": job.fit, "seed": job.seed, "rule": job.rule, "padding_idx": job.padding_idx,
        **encoded.measured,
    }  # fmt: skip
    set_record(rpq, record)
    for parameter in rpq.parameters():
        parameter.requires_grad_(old.requires_grad)
    rpq.train(places.module.training)
    places.install(rpq)
    return rpq
