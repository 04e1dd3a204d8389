"""Composite models: a config with the configs of parts inside, such as a language model's and a picture encoder's.

A class that reads one part alone sees the part's own config, and the weights of all. So each of these configs says that its
weights are RPQ weights, and where they are described: in the config of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rpq_convert.schemas.kinds import FORMAT_VERSION

KEY = "quantization_config"
OF_A_PART: Mapping[str, Any] = {"quant_method": "rpq", "format_version": FORMAT_VERSION}


def with_description(config: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the description of its RPQ weights; its parts refer to it.

    A part gets the whole's dtype where it has none: transformers would take that of the first tensor, which may be a codebook.
    """
    dtype = config.get("dtype") or config.get("torch_dtype")
    return _changed(config, OF_A_PART, {"dtype": dtype} if dtype else None) | {KEY: dict(description)}


def without_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that says nothing of RPQ weights."""
    found = _changed(config, None)
    found.pop(KEY, None)
    return found


def _changed(
    config: Mapping[str, Any], said: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a config whose parts say this, or nothing, of RPQ weights."""
    found = dict(config)
    for name in _names(config):
        if isinstance(part := config.get(name), dict):
            changed = _changed(part, said, defaults)
            changed.pop(KEY, None)
            named = dict(defaults or {}) if "dtype" not in part and "torch_dtype" not in part else {}
            found[name] = changed | named | ({} if said is None else {KEY: dict(said)})
    return found


def _names(config: Mapping[str, Any]) -> list[str]:
    """Return the keys under which a config.json holds configs of parts."""
    kind = config.get("model_type")
    if kind is None:
        return []
    from rpq_convert.hf.loading import transformers

    known = transformers.CONFIG_MAPPING[kind].sub_configs if kind in transformers.CONFIG_MAPPING else {}
    own = (name for name, value in config.items() if isinstance(value, dict) and "model_type" in value)
    return list(dict.fromkeys((*known, *own)))


def parts(config: Any) -> Iterator[Any]:
    """Yield the configs inside a transformers config, and those inside them."""
    for name in getattr(config, "sub_configs", ()):
        part = getattr(config, name, None)
        if part is not None and part is not config:
            yield part
            yield from parts(part)
