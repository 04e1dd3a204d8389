"""Make big neural networks small: product-quantize their weights.

>>> import rpq_convert as rpq
>>> report = rpq.convert(model, bits=4)

The names below are loaded on first use, so that `rpq --help` does not wait for torch.
"""

from importlib import import_module
from pkgutil import extend_path
from typing import Any

__path__ = extend_path(__path__, __name__)  # cli/ and configs/ lie beside this folder in a checkout

from rpq_convert.integrations.hook import when_imported
from rpq_convert.version import __version__

when_imported("transformers.quantizers.auto", "rpq_convert.pretrained")  # from_pretrained knows "rpq" from then on
when_imported("torchvision.extension", "rpq_convert.integrations.torchvision:declare")  # before it misses its operators
when_imported("torch.export.pt2_archive._package", "rpq_convert.kernels.operators")  # so does torch.export.load

_HOMES = {
    "convert": "conversion", "convert_checkpoint": "conversion", "plan": "conversion", "sweep": "conversion", "sensitivities": "sensitivity",
    "save": "checkpoint", "load": "checkpoint", "restore": "checkpoint", "restore_checkpoint": "checkpoint",
    "verify": "checkpoint", "audit": "checkpoint", "model_size": "checkpoint", "VerifyError": "checkpoint",
    "Plan": "planning", "Job": "planning", "Skip": "planning", "Rule": "rules", "PlanError": "rules", "preset_names": "rules",
    "Spec": "spec", "WeightView": "view", "RPQWeight": "weight", "register_layer": "layers", "RPQLayer": "layers",
    "decoded": "layers", "RPQConfig": "pretrained", "decompositions": "kernels.operators",
    "evaluate": "evaluation", "layer_errors": "evaluation", "Evaluation": "evaluation", "EvaluateError": "evaluation",
    "CalibrationError": "calibration", "recalibrate": "recalibration",
    "tune": "tuning", "tune_blocks": "tuning", "Tuning": "tuning", "TuneError": "tuning", "own_inputs": "inputs",
    "merge_adapter": "adapters", "push": "publish", "HubError": "hub",
    "Report": "report.schema", "SourceError": "source", "EncodeError": "encode", "FolderError": "folder",
}  # fmt: skip
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rpq_convert' has no attribute {name!r}")
    return getattr(import_module(f"rpq_convert.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
