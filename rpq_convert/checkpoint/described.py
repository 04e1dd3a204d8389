"""The plan and the report of a model that is converted already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from rpq_convert.checkpoint.metadata import make_report
from rpq_convert.layers import surgery
from rpq_convert.planning import layer_types
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.planning.slots import walk
from rpq_convert.report.schema import Report


def plan_of(model: nn.Module, max_shard_size: str | int | None = None) -> Plan:
    """Return the plan that describes a converted model as it is now, whoever converted it."""
    from rpq_convert.core.safetensors import parse_size
    from rpq_convert.core.spec import dtype_name
    from rpq_convert.planning.options import DEFAULT_SHARD
    from rpq_convert.planning.plan import Skip

    groups: dict[int, list[str]] = {}
    found = surgery.layers_of(model)
    for path, rpq in found.items():
        groups.setdefault(id(rpq), []).append(path)
    jobs = []
    for paths in groups.values():
        rpq = found[paths[0]]
        record = getattr(rpq, "record", {})
        module, _ = surgery.find(model, paths[0])
        jobs.append(
            Job(
                name=paths[0],
                aliases=tuple(paths[1:]),
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
    return Plan(tuple(jobs), tuple(skips), options, parse_size(max_shard_size or DEFAULT_SHARD))


def stored_spec(rpq: Any) -> Any:
    """Return the spec with the dtypes that the tensors need now (a model may have been cast, or trained)."""
    from rpq_convert.core.spec import dtype_name

    kept = rpq.stored()
    named = {"codebooks": "codebook_dtype", "scales": "scales", "outliers": "outlier_dtype"}
    return replace(rpq.spec, **{named[part]: dtype_name(t.dtype) for part, t in kept.items() if part in named})


def _why(model: nn.Module, name: str) -> str:
    return getattr(model, "_rpq_reasons", {}).get(name, "not converted")


def report_of(model: nn.Module, plan: Plan) -> Report:
    """Return the report of a converted model in memory."""
    found = surgery.layers_of(model)
    facts = {j.name: getattr(found[j.name], "record", {}) for j in plan.jobs if j.name in found}
    model.__dict__["_rpq_reasons"] = {s.name: s.reason for s in plan.skips}
    return make_report(plan, facts, title=type(model).__name__)
