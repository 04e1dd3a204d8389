"""RPQConfig: what transformers keeps as `model.config.quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from transformers.utils.quantization_config import QuantizationConfigMixin

from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.planning.options import PlanKeywords, PlanOptions
from rpq_convert.schemas.kinds import FORMAT_VERSION

METHOD = "rpq"
STORED = ("modules", "tied", "guard", "plan_sha256", "version")


class RPQConfig(QuantizationConfigMixin):
    """What transformers keeps as `model.config.quantization_config`.

    Args:
        format_version: of the files.
        stored: modules, tied, guard, plan_sha256 and version, as in docs/checkpoint-format.md; written, not typed. A part of a
            composite model has none of them in its own config: they are in the config of the whole.
        options: those of `rpq.plan` (bits, preset, codebooks, rules, …), to convert a dense model on load.

    Raises:
        TypeError: an option that there is none of; it names the nearest. PlanError: options that contradict each other.

    Example:
        >>> AutoModelForCausalLM.from_pretrained("gpt2", quantization_config=RPQConfig(bits=4))
    """

    @keywords(PlanOptions)
    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        *,
        stored: Mapping[str, Any] | None = None,
        **options: Unpack[PlanKeywords],
    ) -> None:
        (asked,) = take(options, PlanOptions)
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.stored = {name: (stored or {}).get(name) for name in STORED}
        self.options = {name: asked.as_json(name) for name in options}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the config that a file holds: a description of what is stored, or options to convert with."""
        rest = {k: v for k, v in config_dict.items() if k not in ("quant_method", *STORED)}
        version = rest.pop("format_version", FORMAT_VERSION)
        config = cls(version, stored=config_dict) if config_dict.get("modules") is not None else cls(version, **rest)
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def is_described(self) -> bool:
        """Whether it lists the RPQ weights, as the config of a whole model does."""
        return self.stored["modules"] is not None

    def to_dict(self) -> dict[str, Any]:
        base = {"quant_method": METHOD, "format_version": self.format_version}
        return base | (self.stored if self.stored["modules"] else self.options)

    def get(self, name: str, default: Any = None) -> Any:
        """Return what `to_dict` says: transformers asks the config of a model in memory as it asks that of a file."""
        return self.to_dict().get(name, default)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
