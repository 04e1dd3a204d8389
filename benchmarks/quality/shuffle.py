"""Shuffle a Llama's channels: the same function and the same numbers, but no grid of somebody's groups left in its rows.

The only real language model that installs from a package registry is SmolLM2-135M as a Q4_1 GGUF: in every row, each 32 weights
in a line lie on 16 levels. A tool that rounds to 16 levels in groups of 32 finds that grid again and looks lossless at 5 bits
per weight, which it is on no ordinary checkpoint. Channels have no order of their own: renaming those of the residual stream,
of each MLP and within each value head leaves what the model computes as it was and spreads a group's weights over its row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def shuffle_channels(model: Any, seed: int = 0) -> None:
    """Permute, in place, the residual, MLP and value channels of a `LlamaForCausalLM` with tied embeddings."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config
    stream = torch.randperm(config.hidden_size, generator=draw)  # the one order that all layers share

    def permute(weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        kept = weight if rows is None else weight[rows]
        weight.copy_(kept if columns is None else kept[:, columns])

    permute(model.model.embed_tokens.weight, columns=stream)  # the head is this very tensor
    permute(model.model.norm.weight, rows=stream)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            permute(norm.weight, rows=stream)
        inner = torch.randperm(config.intermediate_size, generator=draw)
        permute(mlp.gate_proj.weight, inner, stream)
        permute(mlp.up_proj.weight, inner, stream)
        permute(mlp.down_proj.weight, stream, inner)
        groups, shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        within = torch.stack([torch.randperm(attention.head_dim, generator=draw) for _ in range(groups)])
        offsets = torch.arange(groups)[:, None] * attention.head_dim
        permute(attention.v_proj.weight, (within + offsets).flatten(), stream)
        heads = within.repeat_interleave(shared, 0)  # every query head reads its group's values in the group's order
        offsets = torch.arange(groups * shared)[:, None] * attention.head_dim
        permute(attention.o_proj.weight, stream, (heads + offsets).flatten())
        permute(attention.q_proj.weight, columns=stream)
        permute(attention.k_proj.weight, columns=stream)
