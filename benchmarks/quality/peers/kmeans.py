"""Plain k-means: per weight 256 codewords, faiss as it comes (25 iterations, 256 sampled points a codeword), no scales.

The floor that a codebook method starts from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.peers import Quantizer, by_matrix

TITLE, ENVIRONMENT = "plain k-means (faiss)", None
_COMMON = [{"dim": d} for d in (1, 2, 3, 4)]
SETTINGS = dict.fromkeys(("smollm2", "minilm", "efficientnet", "resnet", "vit"), _COMMON)


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> int:
    return by_matrix(model, *[_quantizer(settings["dim"])] * 3)


def _quantizer(dim: int) -> Quantizer:
    import faiss

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        if weight.numel() < 256 * 2 * dim:
            return weight, 2 * weight.numel()  # the codebook would be larger
        columns = weight.shape[1] // dim * dim  # what is left over at a row's end stays as it is
        points = np.ascontiguousarray(weight[:, :columns].reshape(-1, dim).numpy())  # [vectors, dim]
        fit = faiss.Kmeans(dim, 256, niter=25, seed=0)
        fit.train(points)
        _, codes = fit.index.search(points, 1)
        words = torch.from_numpy(fit.centroids).half().float()
        decoded = weight.clone()
        decoded[:, :columns] = words[codes[:, 0]].view(len(weight), columns)
        return decoded, len(points) + 2 * (words.numel() + weight.numel() - len(points) * dim)

    return quantize
