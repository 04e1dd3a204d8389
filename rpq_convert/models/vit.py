"""RPQViT: vit-pytorch's ViT with as many codebooks as heads, and the layout that RPQ-pytorch published sizes for.

vit-pytorch has since put two norms into the patch embedding. They are left out here, so that the figures (361.429 MiB for
ViT giant, 88.164 MiB for ViT base) and the function are the published ones; `rpq.convert` on a current ViT keeps them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rpq_convert.hf import torchvision
from rpq_convert.models.fresh import fresh

torchvision.fix()

from vit_pytorch import ViT  # noqa: E402


class SeedViT(ViT):
    """The dense model of RPQ-pytorch: vit-pytorch's ViT without norms in the patch embedding."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.to_patch_embedding = nn.Sequential(
            *(m for m in self.get_submodule("to_patch_embedding").children() if not isinstance(m, nn.LayerNorm))
        )


def RPQViT(*, seed: int | None = None, grow: bool = False, **kwargs: Any) -> SeedViT:
    """Build a ViT with random RPQ weights.

    Args:
        kwargs: those of `vit_pytorch.ViT`: image_size, patch_size, num_classes, dim, depth, heads, mlp_dim, …
        seed, grow: see `rpq_convert.models.fresh`.

    Example:
        >>> RPQViT(image_size=224, patch_size=16, num_classes=10, dim=768, depth=12, heads=12, mlp_dim=3072)
    """
    return fresh(SeedViT, seed=seed, grow=grow, **kwargs)
