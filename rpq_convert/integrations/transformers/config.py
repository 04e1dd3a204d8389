"""RPQConfig: what transformers keeps as `model.config.quantization_config`."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from rpq_convert.schemas.kinds import FORMAT_VERSION

METHOD = "rpq"
STORED = ("modules", "tied", "guard", "plan_sha256", "version")


class RPQConfig(QuantizationConfigMixin):
    """What transformers keeps as `model.config.quantization_config`.

    Args:
        format_version, modules, tied, guard, plan_sha256, version: as in docs/checkpoint-format.md; written, not typed. A part of a
            composite model has none of them in its own config: they are in the config of the whole.
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

    @property
    def is_described(self) -> bool:
        """Whether it lists the RPQ weights, as the config of a whole model does."""
        return self.stored["modules"] is not None

    def to_dict(self) -> dict[str, Any]:
        base = {"quant_method": METHOD, "format_version": self.format_version}
        return base | (self.stored if self.stored["modules"] else self.options)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
