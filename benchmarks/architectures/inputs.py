"""One forward pass of any tiny model, where its inputs can be guessed from the names of its arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

MAIN = ("input_ids", "pixel_values", "input_values", "input_features")


def outputs(model: Any) -> Tensor | str:
    """Return all tensors of one forward pass as one vector, or why there is none."""
    try:
        with torch.no_grad():
            torch.manual_seed(1)
            found = model(**_inputs(model))
        parts = [t.flatten().float() for t in found.to_tuple() if isinstance(t, Tensor) and t.is_floating_point()]
        return torch.cat(parts)
    except Exception as e:
        return f"{type(e).__name__}: {e}"[:120]


def _inputs(model: Any) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    config, takes = model.config, inspect.signature(model.forward).parameters
    text = config.get_text_config()
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", 64), getattr(vision, "num_channels", 3)
    side = size if isinstance(size, int) else size[0]
    words = min(getattr(text, "vocab_size", 100) or 100, 100)
    ids = torch.randint(3, words, (2, 12), generator=g)
    made = {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "pixel_values": torch.randn(2, channels, side, side, generator=g),
        "input_values": torch.randn(2, 1600, generator=g),
        "input_features": torch.randn(
            2, getattr(config, "num_mel_bins", 16), 2 * getattr(config, "max_source_positions", 50), generator=g
        ),
    }
    names = [model.main_input_name]
    if config.is_encoder_decoder:
        names.append("decoder_input_ids")
    if type(model).__name__.endswith(("CLIPModel", "SiglipModel")):
        names = ["input_ids", "pixel_values"]
    return {n: made[n] for n in names if n in takes}
