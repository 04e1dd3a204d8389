"""RPQQuantizer: what transformers calls while it loads a model that is, or is to be, converted, and when it saves one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from rpq_convert.checkpoint.described import recall_evaluations
from rpq_convert.conversion.restore_model import restore
from rpq_convert.core import description
from rpq_convert.core.description import Contents
from rpq_convert.errors import SourceError
from rpq_convert.integrations.transformers import on_load, placing
from rpq_convert.layers import surgery
from rpq_convert.layers.surgery import AFTER
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.schemas.kinds import FORMAT_VERSION
from rpq_convert.storage.verified import check_signatures, check_weights, signatures


class RPQQuantizer(HfQuantizer):
    """Puts RPQ weights in their places when transformers loads a model."""

    requires_calibration = False
    quantization_config: Any
    plan: Plan | None = None  # of a conversion on load
    jobs: Mapping[str, Job] = {}
    contents: Contents | None = None  # of a converted folder
    placed: placing.Placed | None = None
    signatures: Mapping[Path, tuple[int, ...]] = {}  # of the files that are read
    dense: Mapping[str, torch.Tensor] | None = None  # `state_dict` of save_pretrained, which transformers forgets
    ties: Mapping[str, str] = {}  # the model's own; while weights are read, it has others

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized and config.format_version != FORMAT_VERSION:
            raise SourceError(
                f"the checkpoint has format version {config.format_version!r}, this rpq-convert reads {FORMAT_VERSION}"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = list(kwargs.get("checkpoint_files") or ())
        if self.pre_quantized:
            self.ties = dict(model.all_tied_weights_keys)
            self.signatures = signatures(files)
            check_weights(files)
            self.contents = placing.contents_of(self.quantization_config.stored, files)
            resized = bool(_asked("ignore_mismatched_sizes"))
            self.placed = placing.place(model, self.contents, files, resized=resized)
            return model
        on_load.refuse_disk(kwargs.get("device_map"))
        self.plan = on_load.plan_on_load(model, self.quantization_config.options, files)
        self.ties = dict(model.all_tied_weights_keys)
        if self.plan is not None:
            self.jobs = {name: job for job in self.plan.jobs for name in (job.name, *job.aliases)}
            model.all_tied_weights_keys = {k: v for k, v in self.ties.items() if k not in self.jobs}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        found: list[Any] = super().update_weight_conversions(weight_conversions, model)
        if self.contents is None or self.placed is None:
            return found
        return [*found, self.placed.renaming(self.contents, found, model)]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.jobs

    def get_quantize_ops(self) -> on_load.Encode:
        return on_load.Encode(self.jobs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_signatures(self.signatures)
        left, computed = model.all_tied_weights_keys, placing.is_computed
        model.all_tied_weights_keys = {a: s for a, s in self.ties.items() if a in left or computed(model, a)}
        if not self.pre_quantized:
            on_load.refuse_disk(getattr(model, "hf_device_map", None))
            on_load.finish_on_load(model, self.plan, self.quantization_config.options)
        for path, weight in surgery.layers_of(model).items():
            _check_loaded(path, weight)
            weight._probe = torch.empty(0, dtype=weight.dtype, device=weight.codes.device)
        for act in AFTER:
            act(model)
        for folder in {path.parent for path in self.signatures}:
            recall_evaluations(model, folder)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return restore(model).to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what `save_pretrained` writes: every tensor under one name, and the guards."""
        from rpq_convert.integrations.transformers.attaching import attach, state_to_save

        attach(model)
        return state_to_save(model, self.dense), {}

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


def _asked(argument: str) -> Any:
    """Return an argument of the `from_pretrained` that is running: transformers does not tell it to quantizers."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and argument in frame.f_locals:
            return frame.f_locals[argument]
        frame = frame.f_back
    return None


def _check_loaded(path: str, weight: RPQWeight) -> None:
    try:
        weight.guard()
        weight.check()
    except ValueError as e:
        raise SourceError(f"{path}: {e}") from None
    expected = weight.spec.tensors(weight.view, weight.shape)
    if wrong := description.misplaced(expected, weight.positions, weight.layout.inputs):
        raise SourceError(f"{path}_rpq.{wrong}")
