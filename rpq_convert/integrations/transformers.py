"""RPQ inside transformers: `from_pretrained` and `save_pretrained` of converted models.

A converted folder loads through any Auto class as soon as `rpq_convert` is imported: before weights are read, the empty
model gets empty RPQ weights in the places that config.json lists, and transformers fills them like any parameter. A dense
checkpoint with `quantization_config=RPQConfig(bits=4)` is converted while it is loaded, a parameter at a time. Nothing here runs code that a
checkpoint names.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rpq_convert.calibration.sensitivity import needs_sensitivities
from rpq_convert.checkpoint.described import plan_of
from rpq_convert.checkpoint.metadata import quantization_config
from rpq_convert.checkpoint.opening import Opened
from rpq_convert.conversion.memory import convert, finish, swap
from rpq_convert.conversion.plans import plan_opened
from rpq_convert.conversion.restore_model import restore
from rpq_convert.core import description
from rpq_convert.core.options import take
from rpq_convert.core.spec import dtype_of
from rpq_convert.encoding.encode import encode
from rpq_convert.errors import SourceError
from rpq_convert.hf.module_source import account
from rpq_convert.layers import surgery
from rpq_convert.layers.surgery import AFTER
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.plan import FORMAT_VERSION, Job, Plan
from rpq_convert.storage.reader import TensorInfo, read_header

METHOD = "rpq"
STORED = ("modules", "tied", "guard", "plan_sha256", "version")


class RPQConfig(QuantizationConfigMixin):
    """What transformers keeps as `model.config.quantization_config`.

    Args:
        format_version, modules, tied, guard, plan_sha256, version: as in docs/checkpoint-format.md; written, not typed.
        options: those of `rpq.plan` (bits, preset, codebooks, rules, …), to convert a dense model on load.

    Example:
        >>> AutoModelForCausalLM.from_pretrained("gpt2", quantization_config=RPQConfig(bits=4))
    """

    def __init__(self, format_version: int = FORMAT_VERSION, **options: Any) -> None:
        options.pop("quant_method", None)
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.stored = {name: options.pop(name, None) for name in STORED}
        self.options = options

    def to_dict(self) -> dict[str, Any]:
        base = {"quant_method": METHOD, "format_version": self.format_version}
        return base | (self.stored if self.stored["modules"] else self.options)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class Encode(ConversionOps):
    """A step of transformers' loading: a dense parameter comes in, its codes go into the model, nothing comes out."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs = jobs

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any, missing_keys: set[str], **_: Any
    ) -> dict[str, Any]:
        for name, value in input_dict.items():
            job, tensor = self.jobs[name], value[0] if isinstance(value, list) else value
            if _computed(model, job.name):
                continue  # a tied one that the checkpoint holds twice
            places = surgery.places(model, (job.name, *job.aliases))
            rpq = swap(places, job, encode(job, tensor.to(dtype_of(job.dtype))))
            rpq.to(tensor.device)
            for part in (*rpq.parameters(), *rpq.buffers()):
                part._is_hf_initialized = True  # type: ignore[attr-defined]
            missing_keys.difference_update((job.name, *job.aliases))
        return {}


class RPQQuantizer(HfQuantizer):
    """Puts RPQ weights in their places when transformers loads a model."""

    requires_calibration = False
    quantization_config: Any
    plan: Plan | None = None  # of a conversion on load
    jobs: Mapping[str, Job] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized and config.format_version != FORMAT_VERSION:
            raise SourceError(
                f"the checkpoint has format version {config.format_version!r}, this rpq-convert reads {FORMAT_VERSION}"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self._plan(model, kwargs.get("checkpoint_files") or ())
            return model
        contents = description.read_all(self.quantization_config.stored)
        tied, files = contents.aliases(), kwargs.get("checkpoint_files") or ()
        infos = _under_names_of(
            model, {k: i for f in files if str(f).endswith(".safetensors") for k, i in read_header(f).items()}
        )
        placed: dict[str, list[str]] = {}
        for name, what in contents.modules.items():
            if (home := _path(model, name)) is None:
                continue  # a head that a base model does not have
            paths = [home, *(p for n in tied.get(name, []) if (p := _path(model, n)) is not None)]
            for path in paths:
                description.check_place(path, what, surgery.parameter_at(model, path), type(model).__name__)
            if infos and (wrong := description.misfit(what.tensors, description.of_weight(name, infos))):
                raise SourceError(f"{name}_rpq.{wrong}")
            given: Any = surgery.parameter_at(model, home)
            weight = RPQWeight.of(replace(what, dtype=given.dtype), "meta")
            weight.unguard()
            surgery.places(model, paths).install(weight)
            placed[home] = paths[1:]
        if contents.modules and not placed:
            raise SourceError(f"no weight of the checkpoint has a place in {type(model).__name__}")
        ties = {k: v for k, v in model.all_tied_weights_keys.items() if not _computed(model, k)}
        for alias in [a for a, source in ties.items() if source in placed]:
            source = ties.pop(alias)
            if alias not in infos:  # else a head that was restored, and is its own now
                surgery.places(model, [alias]).install(surgery.layers_of(model)[source])
                placed[source].append(alias)
        for name, others in placed.items():
            parts = surgery.layers_of(model)[name].tensors()
            ties |= {f"{other}_rpq.{p}": f"{name}_rpq.{p}" for other in others for p in parts}
        model.all_tied_weights_keys = ties
        if guard := contents.guard:
            ignored = {rf"^(.*\.)?{re.escape(guard)}$"}
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        return model

    def _plan(self, model: Any, files: Sequence[str]) -> None:
        """Plan a conversion on load; one whose sizes depend on the weights waits until they are there."""
        (options,) = take(self.quantization_config.options, PlanOptions)
        tied = copy.deepcopy(model)  # on meta; transformers ties weights when they are loaded
        for alias, name in model.all_tied_weights_keys.items():
            module, parameter = surgery.find(tied, alias)
            source, known = surgery.find(tied, name)
            module._parameters[parameter] = source._parameters[known]
        found = account(tied, files)
        for name in () if found is None else found.untied:
            model.all_tied_weights_keys.pop(name, None)
        if needs_sensitivities(options):
            return
        self.plan = plan_opened(Opened(tied, None), options)
        self.jobs = {name: job for job in self.plan.jobs for name in (job.name, *job.aliases)}
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in self.jobs}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.jobs

    def get_quantize_ops(self) -> Encode:
        return Encode(self.jobs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.plan is not None:
            new = dict(model.named_parameters(remove_duplicate=False))  # a head that the checkpoint does not have
            for job in self.plan.jobs:
                if job.name in new:
                    swap(surgery.places(model, (job.name, *job.aliases)), job, encode(job, new[job.name].detach()))
            finish(model, self.plan)
        elif not self.pre_quantized:
            convert(model, **self.quantization_config.options)
        for path, weight in surgery.layers_of(model).items():
            weight.guard()
            _check_loaded(path, weight)
            weight._probe = torch.empty(0, dtype=weight.dtype, device=weight.codes.device)
        attach(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return restore(model).to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what `save_pretrained` writes: the state and the guard; and describe the model as it stands now."""
        config = model.config.quantization_config = describe(model)
        found = surgery.layers_of(model)
        stored = {id(w): w.stored() for w in found.values()}  # one tensor for all names, or it would be written twice
        parts = {f"{path}_rpq.{k}": t for path, w in found.items() for k, t in stored[id(w)].items()}
        return model.state_dict() | parts | {config.stored["guard"]: torch.empty(0)}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _under_names_of(model: Any, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the entries of a checkpoint's headers under their own names, and those that transformers renames under the model's."""
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix
    renamed = {rename_source_key(key, renamings, [], prefix, state)[0]: info for key, info in infos.items()}
    return {**renamed, **infos}


def _check_loaded(path: str, weight: RPQWeight) -> None:
    try:
        weight.check()
    except ValueError as e:
        raise SourceError(f"{path}: {e}") from None
    expected = weight.spec.tensors(weight.view, weight.shape)
    if wrong := description.misplaced(expected, weight.positions, weight.layout.inputs):
        raise SourceError(f"{path}_rpq.{wrong}")


def describe(model: nn.Module) -> RPQConfig:
    """Return the config of a converted model as it stands now."""
    zero_rows = {name: {"zero_row": w.zero_row} for name, w in surgery.layers_of(model).items()}
    return RPQConfig(**quantization_config(plan_of(model), zero_rows))


def attach(model: Any) -> None:
    """Make a transformers model say that it is converted, so that `save_pretrained` writes it; or no longer is."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    converted: Any = model
    if not surgery.layers_of(model):
        if model.__dict__.get("quantization_method") == METHOD:
            converted.hf_quantizer.remove_quantization_config(model)
        return
    _fix_dtype()
    config = describe(model)
    converted.hf_quantizer = RPQQuantizer(config, pre_quantized=True)
    converted.is_quantized = True
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.quantization_method = METHOD  # type: ignore[assignment]


@functools.cache
def _fix_dtype() -> None:
    """Let `model.dtype` be what weights expand to, where the first parameter is a codebook.

    The property is replaced for all of transformers' models, with the first one that is converted; of all others it returns what
    transformers' own returns. A generated class for the converted model alone would change `type(model)`, whose name and bases
    transformers reads (`can_generate`, `architectures` in config.json).
    """
    from transformers.modeling_utils import ModuleUtilsMixin

    plain: Any = ModuleUtilsMixin.dtype

    def dtype(self: Any) -> torch.dtype:
        if self.__dict__.get("quantization_method") != METHOD:
            return plain.fget(self)
        weight = next((m for m in self.modules() if isinstance(m, RPQWeight)), None)
        return plain.fget(self) if weight is None else weight.dtype

    ModuleUtilsMixin.dtype = property(dtype, doc=plain.__doc__)  # type: ignore[assignment, method-assign]


def _computed(model: nn.Module, path: str) -> bool:
    try:
        module, name = surgery.find(model, path)
    except AttributeError:
        return False
    return surgery.is_rpq(module, name)


def _path(model: Any, name: str) -> str | None:
    """Return where a parameter of the checkpoint lies in this model: with the base model's prefix, or without it."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            module, parameter = surgery.find(model, candidate)
        except AttributeError:
            continue
        if parameter in module._parameters:
            return candidate
    return None


AFTER.append(attach)
register_quantizer(METHOD)(RPQQuantizer)
register_quantization_config(METHOD)(RPQConfig)
