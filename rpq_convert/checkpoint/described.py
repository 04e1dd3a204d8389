"""The plan and the report of a model that is converted already, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.checkpoint.metadata import make_report
from rpq_convert.core.rans import rate_of, stream_bytes
from rpq_convert.encoding.measure import record_of
from rpq_convert.errors import SourceError
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning import layer_types
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.planning.slots import home_first, parts_of, tied_names, walk
from rpq_convert.report.schema import Report, read_report
from rpq_convert.running.digest import describe
from rpq_convert.running.offload import onloaded
from rpq_convert.storage.records import REPORT


def plan_of(model: nn.Module, max_shard_size: str | int | None = None) -> Plan:
    """Return the plan that describes a converted model as it is now, whoever converted it."""
    from rpq_convert.core.sizes import parse_size
    from rpq_convert.core.spec import dtype_name
    from rpq_convert.planning.options import DEFAULT_SHARD
    from rpq_convert.planning.plan import Skip

    tied = tied_names(model)
    jobs = []
    for rpq, shared in surgery.paths_of(model).items():
        paths = home_first(shared, tied)
        record = getattr(rpq, "record", {})
        module, _ = surgery.find(model, paths[0])
        jobs.append(
            Job(
                name=paths[0],
                aliases=paths[1:],
                layer=record.get("layer", layer_types.original_class(module).__name__),
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
    size = parse_size(max_shard_size or DEFAULT_SHARD)
    return Plan(tuple(jobs), tuple(skips), options, size, parts=parts_of(model))


def stored_spec(rpq: Any) -> Any:
    """Return the spec with the dtypes and the rate that the tensors need now (a model may have been cast, or trained)."""
    from rpq_convert.core.spec import dtype_name
    from rpq_convert.kernels.rans import encode

    with onloaded(rpq):
        kept = rpq.stored()
    named = {
        "codebooks": "codebook_dtype", "scales": "scales", "input_scales": "input_scales", "outliers": "outlier_dtype",
    }  # fmt: skip
    changed: dict[str, Any] = {named[part]: dtype_name(t.dtype) for part, t in kept.items() if part in named}
    if rpq.spec.rate is not None and not kept["codes"].is_meta:  # codes that training changed may take more
        count, used = kept["codes"].numel(), len(encode(kept["codes"])[0])
        if used > stream_bytes(rpq.spec.rate, count):
            changed["rate"] = rate_of(used, count)
    return replace(rpq.spec, **changed)


def _why(model: nn.Module, name: str) -> str:
    return getattr(model, "_rpq_reasons", {}).get(name, "not converted")


def facts_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what is known of every RPQ weight beside its plan: what its fit measured, and its row of zeros."""
    return {
        name: {**record_of(weight), "zero_row": weight.zero_row} for name, weight in surgery.layers_of(model).items()
    }


def report_of(model: nn.Module, plan: Plan) -> Report:
    """Return the report of a converted model in memory."""
    model.__dict__["_rpq_reasons"] = {s.name: s.reason for s in plan.skips}
    return make_report(plan, facts_of(model), title=type(model).__name__, evaluations=evaluations_of(model))


def keep_evaluations(model: nn.Module, report: Report) -> None:
    """Leave with a model what its report says was measured of it, for what is saved of it as it is now."""
    if report.evaluations:
        model.__dict__["_rpq_evaluations"] = (_mark(model), report.evaluations)


def recall_evaluations(model: nn.Module, folder: Path) -> None:
    """Leave with a model that was loaded what the report in its folder says was measured of it, not of another class or of a whole."""
    if not (folder / REPORT).is_file():
        return
    try:
        report = read_report(folder / REPORT)
    except SourceError:
        return  # a damaged report keeps nobody from loading a model; `verify` names it
    if report.title == type(model).__name__:
        keep_evaluations(model, report)


def evaluations_of(model: nn.Module) -> tuple[Mapping[str, Any], ...]:
    """Return what was measured of a model; nothing, where a weight or a buffer has changed since."""
    mark, kept = model.__dict__.get("_rpq_evaluations", ("", ()))
    return kept if kept and mark == _mark(model) else ()


def _mark(model: nn.Module) -> str:
    """Return a digest of every tensor that files keep of a model, with its place in it."""
    digests = {}
    for path, module in model.named_modules():
        with onloaded(module):
            digests[path] = describe([_kept(module)])["sha256"]
    return str(describe([digests])["sha256"])


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own tensors as files keep them; those that no file can hold are left out."""
    if isinstance(module, RPQWeight):
        kept = module.stored()
    else:
        own = {**module._parameters, **module._buffers}
        kept = {k: t for k, t in own.items() if t is not None and k not in module._non_persistent_buffers_set}
    return {k: t for k, t in kept.items() if t.layout is torch.strided and not t.is_nested and not t.is_meta}
