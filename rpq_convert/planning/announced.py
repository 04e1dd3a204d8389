"""Quantized already, as a config or a file beside it says. Free of torch: it is asked before anything is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rpq_convert.errors import SourceError

AGAIN = "start from the original weights"
FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quanto_qmap.json",
    "qmodel.pt",
)
KEYS = ("quantization_config", "compression_config", "quantization", "load_in_8bit", "load_in_4bit")


def refuse_config(config: Mapping[str, Any], files: Iterable[str], where: str | Path) -> None:
    """Refuse a checkpoint whose config, or a file beside it, says that it is quantized.

    Args:
        config: its config.json. files: names of its files. where: for the message.
    """
    if found := _announced(config):
        raise SourceError(f"{where} is quantized already ({found}); {AGAIN}")
    if records := sorted(set(FILES) & set(files)):
        raise SourceError(
            f"{where} is quantized already ({records[0]} says so); {AGAIN}, or remove that file where the weights are dense"
        )


def _announced(config: Any) -> str:
    """Return which part of a config announces quantized weights, or an empty text."""
    if isinstance(config, list):
        return next((f for v in config if (f := _announced(v))), "")
    if not isinstance(config, Mapping):
        return ""
    for key, value in config.items():
        if key in KEYS and (any(value.values()) if isinstance(value, Mapping) else value):
            method = value.get("quant_method") or value.get("quant_algo") if isinstance(value, Mapping) else None
            return str(method or key)
        if found := _announced(value):
            return found
    return ""
