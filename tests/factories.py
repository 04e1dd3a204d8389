"""Small models for checkpoints that are not transformers': `factories:small` and the like."""

from torch import nn


def small() -> nn.Module:
    return nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 96))


def deep() -> nn.Module:
    """Enough fits to interrupt between two of them."""
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(40)))
