"""RPQOPTModel and its heads: transformers' OPT classes with random codes, one codebook per attention head.

They are functions that return transformers' own objects, so that generation, saving and loading know them. Unlike in
RPQ-pytorch the language-model head stays tied to the embedding.
"""

from __future__ import annotations

from typing import Any

from rpq_convert.hf import torchvision
from rpq_convert.models.fresh import fresh

torchvision.fix()

import transformers as tf  # noqa: E402


def RPQOPTModel(config: tf.OPTConfig, *, seed: int | None = None, grow: bool = False) -> Any:
    """Build an `OPTModel` with random RPQ weights; `seed` and `grow` as in `rpq_convert.models.fresh`."""
    return fresh(tf.OPTModel, config, seed=seed, grow=grow)


def RPQOPTForCausalLM(config: tf.OPTConfig, *, seed: int | None = None, grow: bool = False) -> Any:
    """Build an `OPTForCausalLM` with random RPQ weights."""
    return fresh(tf.OPTForCausalLM, config, seed=seed, grow=grow)


def RPQOPTForSequenceClassification(config: tf.OPTConfig, *, seed: int | None = None, grow: bool = False) -> Any:
    """Build an `OPTForSequenceClassification` with random RPQ weights."""
    return fresh(tf.OPTForSequenceClassification, config, seed=seed, grow=grow)


def RPQOPTForQuestionAnswering(config: tf.OPTConfig, *, seed: int | None = None, grow: bool = False) -> Any:
    """Build an `OPTForQuestionAnswering` with random RPQ weights."""
    return fresh(tf.OPTForQuestionAnswering, config, seed=seed, grow=grow)
