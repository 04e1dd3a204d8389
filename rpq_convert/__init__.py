"""Make big neural networks small: product-quantize their weights.

>>> import rpq_convert as rpq
>>> report = rpq.convert(model, bits=4)

The names below are loaded on first use, so that `rpq --help` does not wait for torch.
"""

from functools import cache
from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

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
    "CodeUpdates": "training.code_updates",
    "parameter_groups": "training.groups", "round_to_stored": "training.groups",
    "tune_blocks": "tuning.blocks",
    "tune": "tuning.tune", "Tuning": "tuning.tune",
}  # fmt: skip
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - the keys are strings

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from rpq_convert.calibration.sensitivity import sensitivities as sensitivities
    from rpq_convert.checkpoint.loading import load as load
    from rpq_convert.checkpoint.publishing import push as push
    from rpq_convert.checkpoint.restoring import restore_checkpoint as restore_checkpoint
    from rpq_convert.checkpoint.saving import save as save
    from rpq_convert.checkpoint.verifying import audit as audit
    from rpq_convert.checkpoint.verifying import verify as verify
    from rpq_convert.conversion.memory import convert as convert
    from rpq_convert.conversion.plans import plan as plan
    from rpq_convert.conversion.plans import sweep as sweep
    from rpq_convert.conversion.recalibration import recalibrate as recalibrate
    from rpq_convert.conversion.restore_model import model_size as model_size
    from rpq_convert.conversion.restore_model import restore as restore
    from rpq_convert.conversion.streaming import convert_checkpoint as convert_checkpoint
    from rpq_convert.core.axes import WeightView as WeightView
    from rpq_convert.core.results import Evaluation as Evaluation
    from rpq_convert.core.spec import Spec as Spec
    from rpq_convert.errors import CalibrationError as CalibrationError
    from rpq_convert.errors import EncodeError as EncodeError
    from rpq_convert.errors import EvaluateError as EvaluateError
    from rpq_convert.errors import FolderError as FolderError
    from rpq_convert.errors import HubError as HubError
    from rpq_convert.errors import PlanError as PlanError
    from rpq_convert.errors import SourceError as SourceError
    from rpq_convert.errors import TuneError as TuneError
    from rpq_convert.errors import VerifyError as VerifyError
    from rpq_convert.evaluation.evaluate import evaluate as evaluate
    from rpq_convert.evaluation.layers import layer_errors as layer_errors
    from rpq_convert.inputs.synthetic import own_inputs as own_inputs
    from rpq_convert.integrations.peft import merge_adapter as merge_adapter
    from rpq_convert.integrations.transformers import RPQConfig as RPQConfig
    from rpq_convert.kernels.torch_ops import decompositions as decompositions
    from rpq_convert.layers.surgery import RPQLayer as RPQLayer
    from rpq_convert.layers.surgery import decoded as decoded
    from rpq_convert.layers.weight import RPQWeight as RPQWeight
    from rpq_convert.planning.layer_types import register_layer as register_layer
    from rpq_convert.planning.plan import Job as Job
    from rpq_convert.planning.plan import Plan as Plan
    from rpq_convert.planning.plan import Skip as Skip
    from rpq_convert.planning.rules import Rule as Rule
    from rpq_convert.planning.rules import preset_names as preset_names
    from rpq_convert.report.schema import Report as Report
    from rpq_convert.training.code_updates import CodeUpdates as CodeUpdates
    from rpq_convert.training.groups import parameter_groups as parameter_groups
    from rpq_convert.training.groups import round_to_stored as round_to_stored
    from rpq_convert.tuning.blocks import tune_blocks as tune_blocks
    from rpq_convert.tuning.tune import Tuning as Tuning
    from rpq_convert.tuning.tune import tune as tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rpq_convert' has no attribute {name!r}")
    _watch_savers()
    return getattr(import_module(f"rpq_convert.{_HOMES[name]}"), name)


@cache
def _watch_savers() -> None:
    """Let savers that would lose RPQ weights refuse them, or keep them, once there may be some."""
    when_imported("huggingface_hub.hub_mixin", "rpq_convert.integrations.other_savers:hub_mixin")
    when_imported("diffusers.models.modeling_utils", "rpq_convert.integrations.other_savers:diffusers")
    when_imported("timm.models._hub", "rpq_convert.integrations.other_savers:timm")
    for name in ("sentence_transformers.base.model", "sentence_transformers.SentenceTransformer"):
        when_imported(name, "rpq_convert.integrations.sentence_transformers:install")


def __dir__() -> list[str]:
    return sorted(__all__)
