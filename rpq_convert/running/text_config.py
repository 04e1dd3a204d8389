"""The config of a transformers model's text part."""

from __future__ import annotations

from typing import Any, Literal


def text_config(config: Any, end: Literal["encoder", "decoder"]) -> Any:
    """Return the config of the text part of a model; a config that has no part for text is returned itself.

    Args:
        config: of any model. end: which one, where what is read and what is written have a config each, as in MusicGen.
    """
    if not hasattr(config, "get_text_config"):
        return config
    for which in ({}, {end: True}):
        try:
            return config.get_text_config(**which)
        except ValueError:  # transformers' way to say that there are several
            continue
    return config
