"""Cost: which kernel is the fastest for a shape, a number of tokens and a dtype."""

from __future__ import annotations

import math

import torch

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import amx_products
from rpq_convert.kernels.jit.vectors import HAS_AMX, HAS_BFLOAT16, TWO_FMA_512

IMAGES = 1.6  # what lookups over the pixels of images cost more: pixels lie along rows, and 16 seldom divide them


def cost(layout: Layout, tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the time of a layer that never expands its weight over that of decoding it and multiplying, roughly."""
    lookup = layout.axis == "in"
    own = min(lookup_time(lookup, layout, tokens), amx_time(lookup, layout, tokens, dtype))
    return own / decode_time(lookup, tokens, dtype)


def pointwise_cost(layout: Layout, images: int, pixels: int) -> float:
    """The same for `pointwise`."""
    return min(pixel_times(layout, images, pixels)) / decode_time(layout.axis == "in", images * pixels, torch.float32)


def pixel_times(layout: Layout, images: int, pixels: int) -> tuple[float, float]:
    """Return the times of lookups and of tiles for images: tiles take whole groups of an image's pixels."""
    lookup, padded = layout.axis == "in", images * -(-pixels // 16) * 16
    return IMAGES * lookup_time(lookup, layout, images * pixels), amx_time(lookup, layout, padded, torch.float32)


# Times of a product with every token, in those of one token by a dense product in float32. Few tokens are bound by memory,
# where codes always win. From benchmarks/speed.py on AMD EPYC 9004 and Intel Sapphire Rapids, where dense products are 1.75
# times as fast beside lookups.
FASTER = 1.75 if TWO_FMA_512 else 1.0


def lookup_time(lookup: bool, layout: Layout, tokens: int) -> float:
    return FASTER * tokens * layout.one_token_times[lookup]


def decode_time(lookup: bool, tokens: int, dtype: torch.dtype) -> float:
    """A decoded weight counts as 50 tokens (90 where a sub-vector lies along a row).

    Dense bfloat16 is 2.4 times as fast as float32 where the processor has it, with AMX 5.8 times.
    """
    decoded = 90.0 if lookup else 50.0
    if dtype == torch.bfloat16 and HAS_AMX:
        return tokens / 5.8 + 2.4 * decoded
    if dtype == torch.bfloat16 and HAS_BFLOAT16:
        return (tokens + 1.5 * decoded) / 2.4
    return tokens + decoded


def amx_time(lookup: bool, layout: Layout, tokens: int, dtype: torch.dtype) -> float:
    if tokens <= 16 or not amx_products.supports(layout):
        return math.inf
    rows, terms = (layout.n, layout.length) if lookup else (layout.length, layout.n)
    expanded = layout.stages * (45 + 90 / layout.dim if lookup else 70)
    if dtype == torch.bfloat16:
        return tokens * (0.2 + 60 / rows + 30 / terms) + 0.85 * expanded
    return tokens * (0.45 + 100 / rows + 30 / terms) + expanded
