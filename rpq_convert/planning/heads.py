"""What `codebooks="heads"` means for a model: the rules of RPQ-pytorch 0.0.2, which reproduce its published sizes.

A transformers model: every sub-vector is one attention head long (`hidden / heads`), one codebook for each block. A
vit-pytorch ViT: as many codebooks as its layer has heads, times the layer's width over the model's. The seed raised
ZeroDivisionError where heads do not divide a width; here the last block is padded, or the count lowered to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rpq_convert.planning.rules import Rule
from rpq_convert.running.text_config import text_config


def head_rules(model: nn.Module | None, config: Any = None) -> Sequence[Rule] | None:
    """Return the rules for this model, or None where it has no attention heads that we know to find."""
    if any(c.__module__.startswith("vit_pytorch") for c in type(model).__mro__):
        return _vit(model)
    config = config if config is not None else getattr(model, "config", None)
    size = head_size(config)
    return None if size is None else [Rule("*", {"dim": size})]


def head_size(config: Any) -> int | None:
    """Return hidden size / attention heads of a transformers config (its text part, if it has several)."""
    if config is None or not hasattr(config, "get_text_config"):
        return None
    text = text_config(config, "decoder")
    try:
        hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    except RuntimeError:  # transformers' way to say that its layers differ
        return None
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return None
    return -(-hidden // heads)


def _vit(model: Any) -> Sequence[Rule] | None:
    try:
        attention, mlp = model.transformer.layers[0]
        heads = attention.heads
        width, hidden = (next(m for m in mlp.modules() if isinstance(m, nn.Linear)).weight.shape[i] for i in (1, 0))
        patch = next(m for m in model.to_patch_embedding.modules() if isinstance(m, nn.Linear)).weight.shape[1]
    except (AttributeError, IndexError, StopIteration, TypeError, ValueError):
        return None

    def books(count: int, length: int) -> dict[str, Any]:
        return {"dim": -(-length // max(1, count))}

    return [
        Rule("*.to_qkv", books(3 * heads, attention.to_qkv.weight.shape[0])),
        Rule("*.to_out*", books(heads, width)),
        Rule("transformer.layers.*.1.net.1", books(heads * (hidden // width), hidden)),
        Rule("transformer.layers.*.1.net.4", books(heads * (hidden // width), width)),
        Rule("to_patch_embedding*", books(heads * (width // patch), width)),
        Rule("*", {"skip": True}),
    ]
