"""Adapters of PEFT: merged into converted layers.

PEFT runs on converted layers without changes: they keep their class and their `weight` reads like a tensor. It cannot add an
adapter to codes: that write raises. `merge_adapter` makes the adapted layers dense, lets PEFT merge, and encodes them again with
the same settings. The report gives the error of each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from rpq_convert.checkpoint.described import plan_of
from rpq_convert.conversion.memory import convert
from rpq_convert.layers import surgery
from rpq_convert.layers.rollback import unchanged_on_failure
from rpq_convert.planning.plan import Plan
from rpq_convert.planning.slots import parts_of
from rpq_convert.report.schema import Report

WRAPPED = ".base_layer"  # what PEFT calls the layer inside an adapted one


def merge_adapter(model: Any, *, adapters: list[str] | None = None) -> tuple[nn.Module, Report]:
    """Merge a PEFT model's adapters into its RPQ layers and unload them.

    Args:
        model: a `PeftModel` over a converted model; it is used up, as by `merge_and_unload`. If PEFT refuses, it is as it was.
        adapters: which to merge, the active ones by default.

    Returns:
        The plain converted model, and a report with the relative squared error of every layer that was encoded again.

    Raises:
        ValueError: no adapted layer of this model is an RPQ layer; call `merge_and_unload` itself.

    Example:
        >>> model, report = rpq.merge_adapter(peft_model)
    """
    base = model.get_base_model()
    plan = plan_of(base)
    jobs = [j for j in plan.jobs if any(WRAPPED in name for name in (j.name, *j.aliases))]
    if not jobs:
        raise ValueError(f"{type(base).__name__} has no RPQ layer with an adapter; use merge_and_unload()")
    found = surgery.layers_of(base)
    with unchanged_on_failure(model):
        for j in jobs:
            places = surgery.places(base, (j.name, *j.aliases))
            places.remove(nn.Parameter(found[j.name]().detach(), requires_grad=False))
        merged = model.merge_and_unload(adapter_names=adapters)
    again = tuple(
        replace(j, name=_plain(j.name), aliases=tuple(map(_plain, j.aliases)), fit="kmeans" if j.is_random else j.fit)
        for j in jobs
    )
    names = {j.name for j in again}
    options = getattr(merged, "_rpq_options", {})
    skips = tuple(s for s in plan_of(merged).skips if s.name not in names)
    return merged, convert(merged, plan=Plan(again, skips, options, plan.max_shard_size, parts=parts_of(merged)))


def _plain(name: str) -> str:
    return name.replace(WRAPPED, "")
