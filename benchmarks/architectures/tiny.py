"""Tiny configs: the default config of a model type with every width, depth and table made small.

All widths of one kind become one number, so that what must agree between parts goes on to agree. Lists keep their length and their
ratios. What these rules cannot know is in `overrides.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from benchmarks.architectures.overrides import OVERRIDES

WIDTH, INNER, HEADS, HEAD, WORDS, POSITIONS = 32, 48, 4, 8, 128, 64
KEPT = re.compile(
    r"^(num_channels|num_labels|type_vocab_size|conv_\w+|\w*stride\w*|num_mel_bins|hop_length|sampling_rate)$"
)

# The first pattern that a name has gives its number; a value that is smaller already stays
SIZES: list[tuple[str, int]] = [
    (r"vocab_size_input|pad_vocab_size_multiple|vocab_size_per", 4),
    (r"codebook_size$", 64),
    (r"initial_channel|base_channels|stem_channels|tdnn", 32),
    (r"vocab|num_embeddings$|n_words", WORDS),
    (r"(num|n)_(key_value|kv)_heads|num_kv_heads|multi_query_group_num|num_query_groups", 2),
    (r"(heads?|n_head|num_heads|attention_heads)$", HEADS),
    (r"rope_head_dim|rotary_dim", HEAD // 2),
    (r"head_dim|head_size|kv_channels|d_kv|key_size|head_width|d_head", HEAD),
    (r"(num|n)_(local_|routed_|total_)?experts$|num_moe_experts|moe_num_experts", 4),
    (r"(top_?k|experts_per_tok|experts_per_token|num_selected_experts|moe_k|num_experts_per_topk)$", 2),
    (r"n_group|topk_group", 1),
    (
        r"layers?$|depth$|num_blocks|n_layer|num_stages_|layers_per|num_layers|num_hidden_groups|num_resblocks|_blocks$",
        2,
    ),
    (r"ffn|intermediate|mlp_dim|d_ff|d_inner|mlp_hidden|inner_dim|feed_?forward_size|dim_feedforward|mlp_size", INNER),
    (r"lora_rank|_rank$|latent_size$|latent_dim$", 16),
    (
        r"max_(source_|target_)?position|n_positions|max_seq|context_length|max_2d_position|max_length|n_ctx|max_text_len",
        POSITIONS,
    ),
    (
        r"hidden_(size|dim)|d_model|embed(ding)?_(size|dim)|_dim$|^dim$|n_embd|channels$|projection_size|width$|num_filters|_features$",
        WIDTH,
    ),
    (r"num_(queries|query_tokens|latents)|num_object_queries|n_queries", 8),
]
LAYERS = 2
KV = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
PICTURE = ("image_size", "input_size", "img_size")
TOKEN = re.compile(r"token_(id|index)$|^(pad|bos|eos|mask|image|video|audio)_\w*(id|index)$")
LISTS = re.compile(r"hidden_sizes|embed_dims?|dims|channels|widths|heads")


def tiny_config(model_type: str) -> Any:
    """Return a small config of a model type."""
    return _tiny(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def _tiny(kind: Any, given: Mapping[str, Any]) -> Any:
    """Return a small config of a class.

    Args:
        given: what is not to be guessed; a part's own values as a dict.
    """
    parts = {n: v for n, v in given.items() if isinstance(v, dict) and "model_type" in v}
    return kind(**_arguments(kind(**parts), given))


def _arguments(default: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that make a default config small."""
    found: dict[str, Any] = {}
    values = _values(default)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            own = {**OVERRIDES.get(value.model_type, {}), **given.get(name, {})}
            found[name] = {"model_type": value.model_type, **_arguments(value, own)}
        elif (small := _small(name, value, values)) != value:
            found[name] = small
    found |= _token_ids(values, found.get("vocab_size", values.get("vocab_size")))
    return found | {n: v for n, v in given.items() if not isinstance(values.get(n), PreTrainedConfig)}


def _values(default: Any) -> dict[str, Any]:
    """Return the fields of a config: parts as they are, all others as the class has them. What follows from others is left to it."""
    if not dataclasses.is_dataclass(default):
        names = [n for n in inspect.signature(type(default).__init__).parameters if n not in ("self", "kwargs")]
        return {n: getattr(default, n, None) for n in names}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        if field.name in default.sub_configs or "Config" in str(field.type):
            found[field.name] = getattr(default, field.name, None)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return {n: v for n, v in found.items() if v is not None and not n.startswith("_")}


def _small(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    """Return the small value of a field."""
    if KEPT.match(name) or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _number(name, value, values)
    if not isinstance(value, (list, tuple)) or not value:
        return value
    layers = next((values[n] for n in ("num_hidden_layers", "num_layers", "n_layer") if n in values), None)
    if len(value) == layers:
        return [_small(name, v, values) for v in value[:LAYERS]]
    if not all(type(v) is int for v in value):
        return value
    if name in PICTURE:
        return [min(v, 64) for v in value]
    if re.search("depths|layers$|num_blocks", name):
        return [min(v, 1) for v in value]
    if LISTS.search(name):
        least = min(value)
        if "heads" in name:
            return [max(v // least, 1) for v in value]
        return [max(round(v * 16 / least / 8) * 8, 8) for v in value] if least > 16 else list(value)
    return value


def _number(name: str, value: int, values: Mapping[str, Any]) -> int:
    if name in PICTURE:
        return min(value, 64)
    if name in KV and value == next(
        (values[n] for n in ("num_attention_heads", "n_heads", "num_heads") if n in values), None
    ):
        return min(value, HEADS)
    return next((min(value, size) for pattern, size in SIZES if value > 0 and re.search(pattern, name)), value)


def _token_ids(values: Mapping[str, Any], words: int | None) -> dict[str, int]:
    """Return token ids that a small table still has, each another one."""
    words = words or WORDS
    names = [n for n, v in values.items() if TOKEN.search(n) and type(v) is int and v >= words]
    return {name: words - 1 - i for i, name in enumerate(names)}
