"""torchao: weight-only integers of 1 to 8 bits in groups, data-free; scales by least error (its HQQ variant) below 8 bits.

Its file holds every code in a byte unless a kernel's packed layout exists; counted here as if packed, which favours it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.peers import Quantizer, by_matrix, packed

TITLE, ENVIRONMENT = "torchao", "datafree"
_BITS = [(4, 32, 4), (3, 32, 3), (2, 32, 2), (5, 32, 5), (8, 64, 8)]
_COMMON = [{"bits": b, "group": g, "embedding": e} for b, g, e in _BITS]
_VIT = [{"bits": b, "group": g, "embedding": 16} for b, g in ((8, 64), (4, 32), (3, 32), (2, 32))]
SETTINGS = {
    "smollm2": _COMMON,
    "smollm2-as-shipped": [{"bits": 4, "group": 32, "embedding": 8}],
    "minilm": _COMMON,
    "vit": _VIT,
}


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> int:
    embedding = settings["embedding"]
    linear = _quantizer(settings["bits"], settings["group"])
    return by_matrix(model, linear, _quantizer(embedding, settings["group"]) if embedding < 16 else None)


def _quantizer(bits: int, group: int) -> Quantizer:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm as Choice

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group),
        intx_choose_qparams_algorithm=Choice.AFFINE if bits == 8 else Choice.HQQ_SCALE_ONLY,
    )

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        if weight.shape[1] % group:
            return weight, 2 * weight.numel()  # which it refuses
        holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
        holder[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(holder, config)
        groups = weight.numel() // group  # symmetric: no zero points to keep
        return holder[0].weight.dequantize(), packed(weight.numel(), bits) + 2 * groups

    return quantize
