"""Make big neural networks small: product-quantize their weights.

>>> import rpq_convert as rpq
>>> report = rpq.convert(model, bits=4)

The names below are loaded on first use, so that `rpq --help` does not wait for torch.
"""

from functools import cache
from importlib import import_module
from pkgutil import extend_path
from typing import Any

__path__ = extend_path(__path__, __name__)  # cli/ and configs/ lie beside this folder in a checkout

from rpq_convert.integrations.import_hook import when_imported
from rpq_convert.version import __version__

# What transformers, PEFT and torch.export must know of us; nothing else in the process changes.
when_imported("transformers.quantizers.auto", "rpq_convert.integrations.transformers")  # from_pretrained knows "rpq"
when_imported("peft.peft_model", "rpq_convert.integrations.peft:prepare")
when_imported(
    "torch.export.pt2_archive._package", "rpq_convert.kernels.torch_ops"
)  # torch.export.load knows torch.ops.rpq

_HOMES = {
    "sensitivities": "calibration.sensitivity",
    "load": "checkpoint.loading",
    "push": "checkpoint.publishing",
    "restore_checkpoint": "checkpoint.restoring",
    "save": "checkpoint.saving",
    "verify": "checkpoint.verifying", "audit": "checkpoint.verifying",
    "convert": "conversion.memory",
    "plan": "conversion.plans", "sweep": "conversion.plans",
    "recalibrate": "conversion.recalibration",
    "restore": "conversion.restore_model", "model_size": "conversion.restore_model",
    "convert_checkpoint": "conversion.streaming",
    "WeightView": "core.axes",
    "Evaluation": "core.results",
    "Spec": "core.spec",
    **dict.fromkeys(
        ("VerifyError", "PlanError", "EvaluateError", "CalibrationError", "TuneError", "HubError", "SourceError", "EncodeError", "FolderError"),
        "errors",
    ),
    "evaluate": "evaluation.evaluate",
    "layer_errors": "evaluation.layers",
    "own_inputs": "inputs.synthetic",
    "merge_adapter": "integrations.peft",
    "RPQConfig": "integrations.transformers",
    "decompositions": "kernels.torch_ops",
    "RPQLayer": "layers.surgery", "decoded": "layers.surgery",
    "RPQWeight": "layers.weight",
    "register_layer": "planning.layer_types",
    "Plan": "planning.plan", "Job": "planning.plan", "Skip": "planning.plan",
    "Rule": "planning.rules", "preset_names": "planning.rules",
    "Report": "report.schema",
    "tune_blocks": "tuning.blocks",
    "tune": "tuning.tune", "Tuning": "tuning.tune",
}  # fmt: skip
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rpq_convert' has no attribute {name!r}")
    _watch_savers()
    return getattr(import_module(f"rpq_convert.{_HOMES[name]}"), name)


@cache
def _watch_savers() -> None:
    """Let savers that would lose RPQ weights refuse them, once there may be some."""
    when_imported("huggingface_hub.hub_mixin", "rpq_convert.integrations.other_savers:hub_mixin")
    when_imported("diffusers.models.modeling_utils", "rpq_convert.integrations.other_savers:diffusers")


def __dir__() -> list[str]:
    return sorted(__all__)
