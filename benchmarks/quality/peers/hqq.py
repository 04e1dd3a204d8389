"""HQQ: half-quadratic quantization, data-free; groups along the inputs, an optimized zero point per group."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.quality.peers import Quantizer, by_matrix, stored

TITLE, ENVIRONMENT = "HQQ", "datafree"
_BITS = [(4, 64, 4), (3, 64, 4), (2, 16, 4), (2, 64, 2), (4, 64, 16), (8, 64, 8)]
_COMMON = [{"bits": b, "group": g, "embedding": e} for b, g, e in _BITS]
_VIT = [{"bits": b, "group": g, "embedding": 16} for b, g in ((4, 64), (3, 64), (2, 16))]
SETTINGS = {
    "smollm2": _COMMON,
    "smollm2-as-shipped": [{"bits": 4, "group": g, "embedding": e} for g, e in ((64, 4), (32, 8))],
    "minilm": _COMMON,
    "vit": _VIT,
}


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> int:
    embedding = settings["embedding"]
    linear = _quantizer(settings["bits"], settings["group"])
    return by_matrix(model, linear, _quantizer(embedding, settings["group"]) if embedding < 16 else None)


def _quantizer(bits: int, group: int) -> Quantizer:
    from hqq.core.quantize import Quantizer as HQQ

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        codes, meta = HQQ.quantize(weight, nbits=bits, group_size=group, axis=1, device="cpu")
        size = stored([codes, meta["scale"], meta["zero"]])
        meta["scale"], meta["zero"] = meta["scale"].half().float(), meta["zero"].half().float()
        return HQQ.dequantize(codes, meta).float(), size

    return quantize
