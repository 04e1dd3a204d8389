"""Conversion: a model in memory, or a checkpoint as a stream. One core, `run_jobs`; they differ in source and sink.

source (name -> tensor) -> encode(job, tensor) in an executor -> sink: swap into the model | piece in the folder
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert import layers
from rpq_convert.calibration import Calibration, calibrate, describe, inputs_of
from rpq_convert.encode import Encoded, Statistics, build, encode
from rpq_convert.executors import run
from rpq_convert.folder import Folder
from rpq_convert.opened import Factory, Opened, either, open_checkpoint
from rpq_convert.planning import Job, Plan
from rpq_convert.record import make_report, write_rest
from rpq_convert.report.curve import Curve
from rpq_convert.report.schema import Report
from rpq_convert.rules import PlanError
from rpq_convert.sensitivity import asks
from rpq_convert.source import SourceError
from rpq_convert.walk import walk

AFTER: list[Callable[[nn.Module], None]] = []  # called with every model whose layers were converted, loaded or restored
Progress = Callable[[Job, Encoded | None], None]


def plan(
    target: nn.Module | str | Path | Any,
    *,
    factory: str | Factory | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> Plan:
    """Plan a conversion; a weight is read only to measure what a budget is best spent on.

    Args:
        target: a live or meta model, a transformers config, a hub id (of which the config and the headers of the weight
            files are read, kilobytes), a folder, or a safetensors file.
        factory: for a checkpoint that is not transformers': a callable or `"package:callable"` that builds the model.
        revision, token, local_files_only, allow_pickle: where a checkpoint comes from, as for `convert_checkpoint`.
        options: those of `make_plan`: preset, bits, target_size, max_error, sensitivity, dim, codebooks, axis, rules,
            include, exclude, fit, seed, dtype, … With a budget (target_size, an average of bits) and weights at hand,
            a live model or a folder, the model is run to measure its sensitivities, unless they are given or
            `sensitivity="shape"`.

    Example:
        >>> rpq.plan(model, bits=4).explain("layers.0.fc1")
    """
    where = {
        "factory": factory,
        "revision": revision,
        "token": token,
        "local_files_only": local_files_only,
        "allow_pickle": allow_pickle,
    }
    return _open(target, asks(options), where).plan(**options)


def sweep(
    target: nn.Module | str | Path | Any,
    *,
    points: int = 24,
    factory: str | Factory | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> Curve:
    """Return the curve of size against expected quality.

    Args:
        target, factory, revision, token, local_files_only, allow_pickle: as for `plan`.
        points: plans from the smallest to 8 bits everywhere.
        options: those of `plan` that choose no size.

    Example:
        >>> print(rpq.sweep(model)); Path("curve.svg").write_text(rpq.sweep(model).to_svg("my model"))
    """
    where = {
        "factory": factory,
        "revision": revision,
        "token": token,
        "local_files_only": local_files_only,
        "allow_pickle": allow_pickle,
    }
    return _open(target, options.get("sensitivity") is None, where).sweep(points=points, **options)


def _open(target: Any, measured: bool, where: Mapping[str, Any]) -> Opened:
    """Find what to plan for; with weights only where they are to be measured and lie on this machine."""
    if isinstance(target, nn.Module):
        return Opened(target, None)
    if not isinstance(target, (str, Path)):
        from rpq_convert.integrations import transformers

        return Opened(transformers.build_empty(target), None)
    return open_checkpoint(target, need="weights" if measured and Path(target).exists() else "headers", **where)


def _encode(item: tuple[Job, Tensor, float | None, Statistics | None, Mapping[str, Tensor] | None]) -> Encoded:
    job, tensor, std, statistics, start = item
    return encode(job, tensor, std=std, statistics=statistics, start=start)


def run_jobs(
    jobs: Iterable[Job],
    source: Mapping[str, Tensor],
    *,
    executor: str = "threads",
    workers: int | None = None,
    std: float | None = None,
    statistics: Mapping[str, Statistics | None] | None = None,
    start: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Iterator[Encoded]:
    """Encode every job, in order of completion; at most `workers` tensors are in memory."""

    def item(job: Job) -> tuple[Any, ...]:
        tensor = either(source, (job.name, *job.aliases)).detach().to(getattr(torch, job.dtype))
        return job, tensor, std, (statistics or {}).get(job.name), (start or {}).get(job.name)

    items = map(item, jobs)
    yield from run(_encode, items, executor=executor, workers=workers or default_workers())


def default_workers() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def convert(
    model: nn.Module,
    *,
    executor: str = "threads",
    workers: int | None = None,
    progress: Progress | None = None,
    plan: Plan | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> Report:
    """Convert a model in place.

    Args:
        model: any module; on meta with `fit="random"` it stays on meta but for codes and codebooks.
        plan: a plan made before; otherwise one is made from the options.
        calibration: inputs such as the model will see, each a tensor, a tuple or a dict of keyword arguments: layers are
            then fitted in the order of execution to what they are given (calibration.py), which keeps far more quality
            from 2 to 5 bits and takes some forward passes over them. Or a function of the dense model that returns such
            inputs (`rpq.own_inputs`).
        options: those of `rpq.plan`: preset, bits, dim, codebooks, rules, include, exclude, fit, seed, …

    Returns:
        The size-audit report, with the measured error of every layer.

    Raises:
        PlanError: what was asked cannot be planned. EncodeError: NaN or infinite weights; the model is then unchanged.

    Example:
        >>> report = rpq.convert(model, bits=4); print(report)
    """
    data = inputs_of(calibration, model)
    plan = plan or Opened(model, None).plan(data=data, **options)
    source = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    unknown = [j.name for j in plan.jobs if j.name not in source]
    if unknown:
        raise PlanError(f"the plan is for another model: it has no parameter {unknown[0]}")
    config = getattr(model, "config", None)  # OPT and a few others call it init_std
    std = next((v for n in ("initializer_range", "init_std") if (v := getattr(config, n, None))), None)
    how: dict[str, Any] = {"executor": executor, "workers": workers}
    if data is not None:
        plan = replace(plan, options={**plan.options, "calibration": describe(data)})
        convert_calibrated(model, plan, source, data, progress, how)
    else:
        results: dict[str, Encoded] = {}
        by_name = {j.name: j for j in plan.jobs}
        for encoded in run_jobs(plan.jobs, source, std=std if _on_meta(source) else None, **how):
            results[encoded.name] = encoded
            if progress:
                progress(by_name[encoded.name], encoded)
        source.clear()
        for job in plan.jobs:
            swap(model, job, results.pop(job.name))
    return finish(model, plan)


def finish(model: nn.Module, plan: Plan) -> Report:
    """Do what follows when every job of a model in memory is done; return the report."""
    dtype = plan.options.get("dtype")
    if dtype:
        _cast_rest(model, getattr(torch, dtype))
    model._rpq_options = dict(plan.options)  # type: ignore[assignment]
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
) -> None:
    """Fit and swap layer by layer, but for what an earlier run has `stored`; whatever fails, the model is as it was."""
    if _on_meta(source):
        raise PlanError("a model on meta has no outputs to calibrate; convert it with fit='random' or load its weights")
    by_name = {job.name: job for job in plan.jobs}
    dense: dict[str, Any] = {n: layers.find(model, n)[0]._parameters[layers.find(model, n)[1]] for n in by_name}

    def fit(known: Mapping[str, Statistics | None]) -> None:
        found = {name: stored(by_name[name]) for name in known}
        for name, encoded in found.items():
            if encoded is not None:
                swap(model, by_name[name], encoded)
                if progress:
                    progress(by_name[name], None)
        waiting = [by_name[name] for name, encoded in found.items() if encoded is None]
        for encoded in run_jobs(waiting, source, statistics=known, **how):
            swap(model, by_name[encoded.name], encoded)
            if progress:
                progress(by_name[encoded.name], encoded)

    try:
        calibrate(model, plan.jobs, data, fit)
    except BaseException:
        for job in plan.jobs:
            for path in (job.name, *job.aliases):
                module, name = layers.find(model, path)
                if name in getattr(module, "_rpq_names", ()):
                    layers.take(module, name, dense[job.name])
        raise


def _on_meta(source: Mapping[str, Tensor]) -> bool:
    return any(t.is_meta for t in source.values())


def _cast_rest(model: nn.Module, dtype: torch.dtype) -> None:
    inside = {id(t) for r in layers.layers_of(model).values() for t in r.parameters()}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in inside and p.is_floating_point():
                p.data = p.data.to(dtype)
        for name, b in module._buffers.items():
            if b is not None and b.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = b.to(dtype)


def swap(model: nn.Module, job: Job, encoded: Encoded) -> None:
    """Put one result in the place of its parameter, under every name it has."""
    module, name = layers.find(model, job.name)
    old = getattr(module, name)
    device = old.device if not old.is_meta else torch.device("cpu")
    rpq = build(job, {k: t.to(device) for k, t in encoded.tensors.items()}, encoded.zero_row)
    rpq.record = {  # type: ignore[assignment]
        "layer": job.layer, "fit": job.fit, "seed": job.seed, "rule": job.rule, "padding_idx": job.padding_idx,
        "error": encoded.error, "dead": encoded.dead, "seconds": encoded.seconds, "inputs": encoded.inputs,
    }  # fmt: skip
    for parameter in rpq.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(old.requires_grad)
    rpq.train(module.training)
    put_everywhere(model, (job.name, *job.aliases), rpq)


def put_everywhere(model: nn.Module, paths: Iterable[str], rpq: nn.Module) -> None:
    """Install one RPQWeight under several paths, which may lead to one module."""
    for path in paths:
        module, name = layers.find(model, path)
        if name in module._parameters:
            layers.put(module, name, rpq)  # type: ignore[arg-type]


def plan_of(model: nn.Module, max_shard_size: str | int | None = None) -> Plan:
    """Return the plan that describes a converted model as it stands, whoever converted it."""
    from rpq_convert.planning import DEFAULT_SHARD, Skip, parse_size
    from rpq_convert.spec import dtype_name

    groups: dict[int, list[str]] = {}
    found = layers.layers_of(model)
    for path, rpq in found.items():
        groups.setdefault(id(rpq), []).append(path)
    jobs = []
    for paths in groups.values():
        rpq = found[paths[0]]
        record = getattr(rpq, "record", {})
        module, _ = layers.find(model, paths[0])
        jobs.append(
            Job(
                name=paths[0],
                aliases=tuple(paths[1:]),
                layer=record.get("layer", layers.original_class(module).__name__),
                shape=rpq.shape,
                dtype=dtype_name(rpq.dtype),
                view=rpq.view.names,
                spec=stored_spec(rpq),
                fit=record.get("fit", "random"),
                seed=record.get("seed", 0),
                rule=record.get("rule", "built by hand"),
                padding_idx=record.get("padding_idx"),
            )
        )
    skips = [
        Skip(s.name, s.aliases, s.layer, s.shape, dtype_name(s.dtype), s.reason or _why(model, s.name), s.buffer)
        for s in walk(model)
        if s.layer != "RPQWeight"
    ]
    options = getattr(model, "_rpq_options", {})
    return Plan(tuple(jobs), tuple(skips), options, parse_size(max_shard_size or DEFAULT_SHARD))


def stored_spec(rpq: Any) -> Any:
    """Return the spec with the dtypes that the tensors need now (a model may have been cast, or trained)."""
    from rpq_convert.spec import dtype_name

    kept = rpq.stored()
    named = {"codebooks": "codebook_dtype", "scales": "scales", "outliers": "outlier_dtype"}
    return replace(rpq.spec, **{named[part]: dtype_name(t.dtype) for part, t in kept.items() if part in named})


def _why(model: nn.Module, name: str) -> str:
    return getattr(model, "_rpq_reasons", {}).get(name, "not converted")


def report_of(model: nn.Module, plan: Plan) -> Report:
    """Return the report of a converted model in memory."""
    found = layers.layers_of(model)
    facts = {j.name: getattr(found[j.name], "record", {}) for j in plan.jobs if j.name in found}
    model._rpq_reasons = {s.name: s.reason for s in plan.skips}  # type: ignore[assignment]
    return make_report(plan, facts, title=type(model).__name__)


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
    plan = plan or opened.plan(data=data, **options)
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
