"""Attaching: every model of transformers that holds converted layers, or is held with them, says so when it is saved.

A model may be converted inside a wrapper, or as a part of a larger one that nobody names. Nothing then holds the models around it,
so what they say is brought up to date where transformers asks: in `save_pretrained`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.checkpoint.described import evaluations_of, facts_of, plan_of
from rpq_convert.checkpoint.metadata import quantization_config, renew
from rpq_convert.errors import SourceError
from rpq_convert.hf import composite
from rpq_convert.hf.model_card import base_of
from rpq_convert.integrations.transformers.config import METHOD, RPQConfig
from rpq_convert.integrations.transformers.placing import is_computed
from rpq_convert.integrations.transformers.quantizer import RPQQuantizer
from rpq_convert.kernels.rans import packed
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.plan import Plan
from rpq_convert.running.offload import is_offloaded, onloaded
from rpq_convert.running.wrappers import unwrapped
from rpq_convert.storage.writer import is_finite

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # what transformers calls weight files
ANY_VARIANT = re.compile(r"model(\.[^.]+?)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[^.]+)?\.json)?")


def describe(model: nn.Module, plan: Plan | None = None) -> RPQConfig:
    """Return the config of a converted model as it stands now."""
    return RPQConfig.from_dict(quantization_config(plan or plan_of(model), facts_of(model)))


def attach(model: nn.Module) -> None:
    """Make every transformers model in `model` say whether it is converted, so that `save_pretrained` writes it."""
    from transformers import PreTrainedModel

    seen: set[nn.Module] = set()
    for module in model.modules():  # the outer ones come first
        if isinstance(module, PreTrainedModel) and module not in seen:
            inner = [m for m in module.modules() if isinstance(m, PreTrainedModel) and m is not module]
            seen.update(inner)
            _attach(module, inner)


def _attach(model: Any, inner: list[Any]) -> None:
    """Describe one model and the models inside it; their configs refer to its own."""
    converted = bool(surgery.layers_of(model))
    if not converted and all(m.__dict__.get("quantization_method") != METHOD for m in (model, *inner)):
        return
    _install_hooks()
    for module in inner:
        _mark(module, RPQConfig() if surgery.layers_of(module) else None)
    described = describe(model) if converted else None
    _say(model.config, described)
    _mark(model, described)
    for config in (*composite.parts(model.config), *(m.config for m in inner)):
        if config is not model.config:
            _say(config, dict(composite.OF_A_PART) if converted else None)
            config.dtype = config.dtype or (model.dtype if converted else None)  # see composite.with_description


def _say(config: Any, said: Any) -> None:
    """Make a config describe RPQ weights, or none any more."""
    if said is not None:
        config.quantization_config = said
    elif hasattr(config, composite.KEY):
        del config.quantization_config


def _mark(model: Any, config: RPQConfig | None) -> None:
    if config is not None:
        model.hf_quantizer = RPQQuantizer(config, pre_quantized=True)
        model.is_quantized, model.quantization_method = True, METHOD
    elif model.__dict__.get("quantization_method") == METHOD:
        model.__dict__.pop("hf_quantizer", None)
        del model.quantization_method
        model.is_quantized = False


def state_to_save(model: Any, dense: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what `save_pretrained` writes: every RPQ weight under its first name, the guards, and all that is dense.

    Args:
        dense: where to take from what is dense, in place of the model.
    """
    plan, found = plan_of(model), surgery.layers_of(model)
    parts = {f"{path}_rpq.{part}" for path, weight in found.items() for part in weight.stored()}
    state = {k: t for k, t in (model.state_dict() if dense is None else dense).items() if k not in parts}
    for job in plan.jobs:
        with onloaded(found[job.name]):  # transformers finds no weight that several modules share where it is offloaded
            kept = packed(job.spec, job.weight_view, job.shape, found[job.name].stored())
            state |= {f"{job.name}_rpq.{part}": tensor for part, tensor in kept.items()}
    return state | {name: torch.empty(0) for name in plan.guards}


@contextmanager
def holding(model: Any, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let the RPQ weights of a model hold the tensors of a state dict, such as an average's, inside the block.

    Raises:
        SourceError: it has not all tensors of an RPQ weight, or others.
    """
    given = {} if state is None else {w: _given(w, state, names) for w, names in surgery.paths_of(model).items()}
    if given and is_offloaded(model):
        raise SourceError(
            f"{type(model).__name__} is offloaded: save_pretrained writes no other state_dict than its own"
        )
    before = [(w, dict(w._parameters), dict(w._buffers)) for w in given]
    try:
        for weight, tensors in given.items():
            for name, tensor in tensors.items():
                weight.set_tensor(name, tensor.detach())
        yield
    finally:
        for weight, parameters, buffers in before:
            weight._parameters.update(parameters)
            weight._buffers.update(buffers)
            weight.guard()


def _given(weight: RPQWeight, state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors that a state dict holds of a weight with these names."""
    prefix = next((p for p in (f"{n}_rpq." for n in names) if f"{p}codes" in state), f"{names[0]}_rpq.")
    try:
        given = weight.given(state, prefix)
    except ValueError as e:
        raise SourceError(f"state_dict: {e}") from None
    missing = next((part for part in weight.tensors() if part not in given), None)
    if missing is not None:
        raise SourceError(
            f"state_dict holds no {prefix}{missing}: pass the whole state dict of this converted model, or none; "
            "rpq_convert.restore(model) takes dense weights"
        )
    return given


@functools.cache
def _install_hooks() -> None:
    """Change what transformers' models do where they hold RPQ weights; all others do what they did.

    With the first converted model, methods of transformers' base class are replaced, as a model may be saved by a class that knows
    nothing of its parts. A generated class for converted models alone would change `type(model)`, whose name and bases transformers
    reads (`can_generate`, `architectures` in config.json).
    """
    from transformers import PreTrainedModel
    from transformers.modeling_utils import ModuleUtilsMixin

    base: Any = PreTrainedModel
    ModuleUtilsMixin.dtype = property(_dtype(ModuleUtilsMixin.dtype))  # type: ignore[assignment, method-assign, arg-type]
    base.half, base.float = _cast(base.half, nn.Module.half), _cast(base.float, nn.Module.float)
    base.get_parameter_or_buffer = _get_parameter(base.get_parameter_or_buffer)
    base.save_pretrained = _save_pretrained(base.save_pretrained)


def _dtype(plain: Any) -> Callable[[Any], torch.dtype]:
    """Let `model.dtype` be what weights expand to, where the first parameter is a codebook."""

    def dtype(self: Any) -> torch.dtype:
        found: torch.dtype = plain.fget(self)
        if self.__dict__.get("quantization_method") != METHOD:
            return found
        weight = next((m for m in self.modules() if isinstance(m, RPQWeight)), None)
        return found if weight is None else weight.dtype

    return functools.wraps(plain.fget)(dtype)


def _cast(plain: Callable[..., Any], cast: Callable[..., Any]) -> Callable[..., Any]:
    """Let `half` and `float` cast a converted model, as `to` does; transformers refuses them for everything quantized."""

    @functools.wraps(plain)
    def casts(self: Any, *args: Any) -> Any:
        return cast(self) if self.__dict__.get("quantization_method") == METHOD else plain(self, *args)

    return casts


def _get_parameter(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Let `tie_weights` find a computed weight; where it is tied to another one, that shares its codes."""

    @functools.wraps(plain)
    def get_parameter_or_buffer(self: Any, target: str) -> Any:
        if not is_computed(self, target):
            return plain(self, target)
        module, name = surgery.find(self, target)
        return getattr(module, name)

    return get_parameter_or_buffer


def _save_pretrained(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Let `save_pretrained` describe the model as it stands now, and renew what lies beside the weights."""
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not surgery.layers_of(self):
            attach(self)
            return plain(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments.get("state_dict")
        with unwrapped(self), holding(self, given):
            return save(self, *args, **kwargs)

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        attach(self)
        if self.__dict__.get("quantization_method") != METHOD or getattr(self, "_hf_peft_config_loaded", False):
            return plain(self, *args, **kwargs)
        asked = signature.bind(self, *args, **kwargs).arguments
        if is_offloaded(self) and not hasattr(self, "hf_device_map"):
            raise SourceError(
                f"{type(self).__name__} is offloaded without a device map, and transformers cannot save such a model: "
                "use rpq.save(model, folder)"
            )
        adapted = next((name for name in surgery.layers_of(self) if ".base_layer." in name), None)
        if adapted is not None:
            raise SourceError(
                f"{adapted} has an adapter: save the adapter by the PeftModel's save_pretrained, or merge it first (rpq.merge_adapter)"
            )
        folder = Path(asked["save_directory"])
        before = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors*")}
        variant = asked.get("variant")
        others = sorted(p.name for p in before if ANY_VARIANT.fullmatch(p.name) and f".{variant}" not in p.name)
        if variant and others:
            raise SourceError(
                f"{folder} holds {others[0]}, whose config.json would describe RPQ weights: save the variant {variant!r} to a folder of its own"
            )
        self.hf_quantizer.dense = asked.get("state_dict")
        try:
            done = plain(self, *args, **kwargs, save_original_format=False)
        finally:
            self.hf_quantizer.dense = None
        if asked.get("is_main_process", True):
            for path, time in before.items():
                if WEIGHTS.fullmatch(path.name) and path.is_file() and path.stat().st_mtime_ns == time:
                    path.unlink()  # of an earlier model in this folder: it would be read instead of this one, or beside it
            base = base_of(str(getattr(self, "name_or_path", "")))
            masks = sorted(name for name, buffer in self.named_buffers() if not is_finite(buffer))
            renew(folder, plan_of(self), facts_of(self), type(self).__name__, base, masks, evaluations_of(self))
        return done

    return save_pretrained
