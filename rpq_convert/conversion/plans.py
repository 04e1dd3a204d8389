"""Plan a conversion of anything that can be opened: a model, a config, a folder, a repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rpq_convert.calibration.sensitivity import asks, measure_for
from rpq_convert.checkpoint.opening import Factory, Opened, open_checkpoint
from rpq_convert.planning import budget
from rpq_convert.planning.budget import make_plan
from rpq_convert.planning.heads import head_rules
from rpq_convert.planning.plan import Plan
from rpq_convert.report.curve import Curve
from rpq_convert.running.data import Calibration


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
    return plan_opened(_open(target, asks(options), where), **options)


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
    return sweep_opened(_open(target, options.get("sensitivity") is None, where), points=points, **options)


def _open(target: Any, measured: bool, where: Mapping[str, Any]) -> Opened:
    """Find what to plan for; with weights only where they are to be measured and lie on this machine."""
    if isinstance(target, nn.Module):
        return Opened(target, None)
    if not isinstance(target, (str, Path)):
        from rpq_convert.hf import loading

        return Opened(loading.build_empty(target), None)
    return open_checkpoint(target, need="weights" if measured and Path(target).exists() else "headers", **where)


def plan_opened(opened: Opened, *, data: Calibration | None = None, **options: Any) -> Plan:
    """Plan a conversion; where sizes are chosen to a budget and the weights are at hand, the model is measured."""
    if asks(options):
        options = _measured(opened, options, data)
    return make_plan(opened.slots(), **_known(opened), **options)


def sweep_opened(opened: Opened, *, points: int = 24, data: Calibration | None = None, **options: Any) -> Curve:
    """Return the curve of size against expected quality, by measured sensitivities where `plan_opened` would measure them."""
    if options.get("sensitivity") is None:
        options = _measured(opened, options, data)
    return budget.sweep(opened.slots(), points=points, **_known(opened), **options)


def _known(opened: Opened) -> dict[str, Any]:
    """Return what a plan takes from the checkpoint beside its slots."""
    if opened.model is not None:
        return {"head_rules": head_rules(opened.model), "warnings": opened.notes}
    return {
        "warnings": ["planned from tensor names and shapes alone: layer types are guesses; give a factory to convert"]
    }


def _measured(opened: Opened, options: Mapping[str, Any], data: Calibration | None) -> dict[str, Any]:
    return dict(options) if opened.model is None else measure_for(options, opened.filled, data)
