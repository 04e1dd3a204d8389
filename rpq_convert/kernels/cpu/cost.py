"""Cost: which kernel is the fastest for a shape, a number of tokens and a dtype."""

from __future__ import annotations

import math

import torch

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import amx_products
from rpq_convert.kernels.jit.register_tiles import TOKENS
from rpq_convert.kernels.jit.vectors import HAS_AMX, HAS_BFLOAT16, HAS_VBMI, PROCESSOR, TWO_FMA_512

LOOKUPS, VECTORS, TILES = "lookups", "vectors", "tiles"  # ways to multiply that never expand a whole weight
# What lookups and registers take more for the pixels of images than for tokens: pixels lie along rows, and 16 seldom divide them
IMAGES, IMAGES_BY_REGISTERS = 1.6, 1.45


def cost(layout: Layout, tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the time of a layer that never expands its weight over that of decoding it and multiplying, roughly."""
    lookup = layout.axis == "in"
    return best(lookup, layout, tokens, dtype)[0] / decode_time(lookup, tokens, dtype)


def best(lookup: bool, layout: Layout, tokens: int, dtype: torch.dtype) -> tuple[float, str]:
    """Return the time of the fastest way that never expands the weight, and which it is."""
    return min(
        (lookup_time(lookup, layout, tokens), LOOKUPS),
        (vector_time(lookup, layout, tokens, dtype), VECTORS),
        (amx_time(lookup, layout, tokens, dtype), TILES),
    )


def pointwise_cost(layout: Layout, images: int, pixels: int) -> float:
    """The same for `pointwise`, over a convolution."""
    decoded = DECODED[layout.axis == "in"]
    return best_for_pixels(layout, images, pixels)[0] / (CONVOLUTION * images * pixels + decoded)


def best_for_pixels(layout: Layout, images: int, pixels: int) -> tuple[float, str]:
    """As `best`, for images: tiles take whole groups of an image's pixels."""
    lookup, padded = layout.axis == "in", images * -(-pixels // 16) * 16
    return min(
        (IMAGES * lookup_time(lookup, layout, images * pixels), LOOKUPS),
        (IMAGES_BY_REGISTERS * vector_time(lookup, layout, images * pixels, torch.float32), VECTORS),
        (amx_time(lookup, layout, padded, torch.float32), TILES),
    )


# Times of a product with every token, in those of one token by a dense product in float32. Few tokens are bound by memory,
# where codes always win. From benchmarks/speed.py on AMD EPYC 9004 and Intel Sapphire Rapids, where dense products are 1.75
# times as fast beside lookups.
FASTER = 1.75 if TWO_FMA_512 else 0.9 if PROCESSOR == "znver5" else 1.0
CONVOLUTION = 0.5 if PROCESSOR == "znver5" else 1.0  # dense convolutions are oneDNN's, which uses all of AVX-512
DECODED = 50.0, 90.0  # tokens that a decoded weight counts; the second where a sub-vector lies along a row
BFLOAT16 = 4.4 if PROCESSOR == "znver5" else 2.4  # how much faster dense bfloat16 is than float32
# A token by `vector_products`, in bfloat16 half of it. torch multiplies float32 by Intel's library, which uses half of an AMD
# processor's AVX-512: measured on Zen 5; 0.87 there with AVX2 alone, from which those of Zen 2 to 4 are taken. Of Zen 1, whose units are
# half as wide, it gets all (33e9 operations a second and core)
VECTOR = {"znver5": 0.46, "znver1": math.inf}.get(PROCESSOR, 0.9 if PROCESSOR.startswith("znver") else math.inf)


def lookup_time(lookup: bool, layout: Layout, tokens: int) -> float:
    return FASTER * tokens * layout.one_token_times[lookup]


def vector_time(lookup: bool, layout: Layout, tokens: int, dtype: torch.dtype) -> float:
    """Few tokens wait for what is expanded: 0.1 nanoseconds a weight where 64 codes are taken at a time, else 0.3."""
    quick = HAS_VBMI and lookup and layout.stages == 1
    if tokens <= (3 if quick else 16):
        return math.inf
    rate = VECTOR / 2 if dtype == torch.bfloat16 and HAS_BFLOAT16 else VECTOR
    return rate * -(-tokens // TOKENS) * TOKENS + layout.stages * (6 if quick else 20)


def decode_time(lookup: bool, tokens: int, dtype: torch.dtype) -> float:
    """Return the time of decoding and multiplying.

    Dense bfloat16 is 2.4 times as fast as float32 where the processor has it, on Zen 5 4.4, with AMX 5.8 times.
    """
    decoded = DECODED[lookup]
    if dtype == torch.bfloat16 and HAS_AMX:
        return tokens / 5.8 + 2.4 * decoded
    if dtype == torch.bfloat16 and HAS_BFLOAT16:
        return tokens / BFLOAT16 + 0.6 * decoded
    return tokens + decoded


def amx_time(lookup: bool, layout: Layout, tokens: int, dtype: torch.dtype) -> float:
    if tokens <= 16 or not amx_products.supports(layout):
        return math.inf
    rows, terms = (layout.n, layout.length) if lookup else (layout.length, layout.n)
    expanded = layout.stages * (45 + 90 / layout.dim if lookup else 70)
    if dtype == torch.bfloat16:
        return tokens * (0.2 + 60 / rows + 30 / terms) + 0.85 * expanded
    return tokens * (0.45 + 100 / rows + 30 / terms) + expanded
