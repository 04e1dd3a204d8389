"""Conversion on load: a dense parameter that transformers reads is encoded before it reads the next one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers.core_model_loading import ConversionOps

from rpq_convert.calibration.sensitivity import needs_sensitivities
from rpq_convert.checkpoint.opening import Opened
from rpq_convert.conversion.memory import convert, finish, swap
from rpq_convert.conversion.plans import plan_opened
from rpq_convert.core.options import take
from rpq_convert.core.spec import dtype_of
from rpq_convert.encoding.encode import encode
from rpq_convert.errors import SourceError
from rpq_convert.hf.loading import keep_dtypes
from rpq_convert.hf.module_source import account
from rpq_convert.integrations.transformers.placing import is_computed
from rpq_convert.layers import surgery
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.plan import Job, Plan, Skip

FRESH = "new: the checkpoint has none of it"


class Encode(ConversionOps):
    """A step of transformers' loading: a dense parameter comes in, its codes go into the model, nothing comes out."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs = jobs

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any, missing_keys: set[str], **_: Any
    ) -> dict[str, Any]:
        for name, value in input_dict.items():
            job, tensor = self.jobs[name], value[0] if isinstance(value, list) else value
            if is_computed(model, job.name):
                continue  # a tied one that the checkpoint holds twice
            places = surgery.places(model, (job.name, *job.aliases))
            rpq = swap(places, job, encode(job, tensor.to(dtype_of(job.dtype))))
            rpq.to(tensor.device)
            for part in (*rpq.parameters(), *rpq.buffers()):
                part._is_hf_initialized = True  # type: ignore[attr-defined]
            missing_keys.difference_update((job.name, *job.aliases))
        return {}


def refuse_disk(device_map: Any) -> None:
    """Raise a SourceError where weights would stay on disk: what is converted while it is loaded is kept in memory."""
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise SourceError(
            "a device_map with 'disk' does not work while a model is converted on load: convert its folder (rpq convert), then load that "
            "with the device_map"
        )


def plan_on_load(model: Any, asked: Mapping[str, Any], files: Sequence[str]) -> Plan | None:
    """Return the plan of an empty model; None where sizes depend on the weights, which are not there yet.

    Args:
        files: the weight files that will be read. Names that they hold different tensors under are untied in the model.
    """
    (options,) = take(asked, PlanOptions)
    tied = copy.deepcopy(model)  # on meta; transformers ties weights when they are loaded
    for alias, name in model.all_tied_weights_keys.items():
        module, parameter = surgery.find(tied, alias)
        source, known = surgery.find(tied, name)
        module._parameters[parameter] = source._parameters[known]
    keep_dtypes(tied, model.config.dtype)
    found = account(tied, files)
    for name in () if found is None else found.untied:
        model.all_tied_weights_keys.pop(name, None)
    return None if needs_sensitivities(options) else plan_opened(Opened(tied, None), options)


def finish_on_load(model: Any, plan: Plan | None, asked: Mapping[str, Any]) -> None:
    """Do what follows when transformers has read all weights; what the checkpoint does not have stays dense, to be trained."""
    missing = _fresh(model)
    if plan is not None:
        plan = _left_dense(plan, missing)
        finish(model, plan)
    else:
        (options,) = take(asked, PlanOptions)
        without = replace(options, exclude=(*options.exclude, *sorted(missing)))
        plan = _left_dense(plan_opened(Opened(model, None), without), missing)
        convert(model, plan=plan)
    if named := [s.name for s in plan.skips if s.reason == FRESH]:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        warnings.warn(
            f"{', '.join(named[:3])}{more} left dense: the checkpoint has none, so they are new; "
            "train the model, then convert them too with rpq.convert(model)",
            stacklevel=2,
        )


def _fresh(model: Any) -> set[str]:
    """Return the parameters that transformers has initialised because the checkpoint has none of them."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not getattr(parameter, "_is_hf_initialized", False)}


def _left_dense(plan: Plan, names: Collection[str]) -> Plan:
    """Return the plan that leaves these parameters dense, and says why of those that could have been converted."""
    jobs = tuple(Skip(j.name, j.aliases, j.layer, j.shape, j.dtype, FRESH) for j in plan.jobs if j.name in names)
    skips = (replace(s, reason=FRESH) if s.name in names and len(s.shape) > 1 else s for s in plan.skips)
    return replace(plan, jobs=tuple(j for j in plan.jobs if j.name not in names), skips=(*skips, *jobs))
