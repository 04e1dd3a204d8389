"""Small models for checkpoints that are not transformers': `factories:small` and the like."""

from torch import nn


def small() -> nn.Module:
    return nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 96))


def deep() -> nn.Module:
    """Enough fits to interrupt between two of them."""
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(40)))


class _Classifier(nn.Sequential):
    def forward(self, picture):
        return super().forward(picture)


def classifier() -> nn.Module:
    """Takes its input by a name."""
    return _Classifier(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 10)
    ).eval()
