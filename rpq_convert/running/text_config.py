"""What a transformers model says of its text part: the config, and how many tokens it knows."""

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


def vocabulary(model: Any) -> int | None:
    """Return how many token ids a model has entries for; None where nothing tells it.

    A dual encoder (CLIP) has no embeddings of its own in the eyes of transformers: its config says it.
    """
    try:
        found = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        found = getattr(text_config(model.config, "encoder"), "vocab_size", None)
    return found if isinstance(found, int) else None
