"""Adapters of PEFT: merged into converted layers.

PEFT runs on converted layers: they keep their class and their `weight` reads like a tensor (what it looks up among parameters,
`prepare` adds). It cannot add an adapter to codes: that write raises. `merge_adapter` makes the adapted layers dense, lets PEFT
merge, and encodes them again with the same settings. The report gives the error of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from rpq_convert.checkpoint.described import plan_of
from rpq_convert.conversion.memory import convert
from rpq_convert.core.keywords import keywords
from rpq_convert.layers import surgery
from rpq_convert.layers.rollback import unchanged_on_failure
from rpq_convert.planning.plan import Plan
from rpq_convert.planning.slots import parts_of
from rpq_convert.report.schema import Report

WRAPPED = ".base_layer"  # what PEFT calls the layer inside an adapted one
TIED = "_get_module_names_tied_with_embedding"
TOKENS = ".token_adapter"  # what it puts between an embedding and the adapter of some of its rows


@keywords()
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
    return name.replace(TOKENS, "").replace(WRAPPED, "")


@functools.cache
def prepare() -> None:
    """Teach PEFT, once it is imported, what it looks up among parameters: a converted model has codebooks there.

    Prompts find the word embeddings; a head that is tied to them gets their adapter; and `target_parameters` that name converted
    experts are refused: they would get no adapter. A plain merge is refused before it begins.
    """
    from peft.peft_model import PeftModel
    from peft.tuners import tuners_utils
    from peft.utils import other

    changes: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (PeftModel, "_setup_prompt_encoder", _with_dense_names),
        (tuners_utils.BaseTuner, "inject_adapter", _refusing),
        (tuners_utils.BaseTuner, "_check_merge_allowed", _refusing_codes),
        (other, TIED, _with_tied),
        (tuners_utils, TIED, _with_tied),
    )
    for owner, name, wrap in changes:
        setattr(owner, name, wrap(getattr(owner, name)))


def _with_dense_names(set_up: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_up)
    def wrapped(self: Any, adapter_name: str) -> None:
        models = [m for m in (self.base_model, *self.base_model.children()) if surgery.layers_of(m)]
        try:
            for model in models:
                model.__dict__["named_parameters"] = functools.partial(_dense_named, model)
            set_up(self, adapter_name)
        finally:
            for model in models:
                model.__dict__.pop("named_parameters", None)

    return wrapped


def _with_tied(find: Callable[..., list[str]]) -> Callable[..., list[str]]:
    @functools.wraps(find)
    def wrapped(model: Any) -> list[str]:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base = base.model if hasattr(base, "tuner_layer_cls") else base
        found, paths = find(model), surgery.paths_of(base)
        if not any(len(tied) > 1 for tied in paths.values()):
            return found
        own = surgery.paths_of(base.get_input_embeddings())
        tied = [
            path.rpartition(".")[0] for weight in own for path in paths[weight][1:]
        ]  # the embeddings' own comes first
        return found + [name for name in tied if name not in found]

    return wrapped


def _dense_named(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Yield parameters as `named_parameters` does, and every converted weight, under its own name, before its codebooks."""
    weights, seen = surgery.layers_of(model), set()
    for name, parameter in type(model).named_parameters(model, *args, **kwargs):
        path = name.rpartition("_rpq.")[0]
        if path in weights and path not in seen:
            seen.add(path)
            module, key = surgery.find(model, path)
            yield path, getattr(module, key)
        yield name, parameter


def _refusing(inject: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(inject)
    def wrapped(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        targets = getattr(self.peft_config[adapter_name], "target_parameters", None) or ()
        for name in surgery.layers_of(model):
            if any(name == target or name.endswith(f".{target}") for target in targets):
                raise ValueError(
                    f"target_parameters: {name} is converted, and PEFT cannot add an adapter to codes; leave it dense "
                    f"(rpq_convert.convert(model, exclude=[{name!r}])), or adapt layers (target_modules)"
                )
        inject(self, model, adapter_name, *args, **kwargs)

    return wrapped


def _refusing_codes(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def wrapped(self: Any) -> None:
        check(self)
        if name := next((n for n in surgery.layers_of(self.model) if f"{WRAPPED}." in n), None):
            raise RuntimeError(
                f"{_plain(name)} is converted, and PEFT's merge would be lost in its codes: call rpq.merge_adapter(model), "
                "which encodes the adapted layers again, or rpq.restore(model) first"
            )

    return wrapped
