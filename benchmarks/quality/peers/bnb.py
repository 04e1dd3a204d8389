"""bitsandbytes: NF4 in blocks of 64, with the blocks' maxima quantized once more ("double quantization"), data-free."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.quality.peers import Quantizer, by_matrix

TITLE, ENVIRONMENT = "bitsandbytes NF4", "datafree"
_COMMON = [{"bits": 4, "embedding": e} for e in (16, 4)]
_VIT = [{"bits": 4, "embedding": 16}]
SETTINGS = {"smollm2": _COMMON, "minilm": _COMMON, "vit": _VIT}


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> int:
    return by_matrix(model, _quantizer(), _quantizer() if settings["embedding"] < 16 else None)


def _quantizer() -> Quantizer:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        codes, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        parts = state.as_dict(packed=True).values()  # its serialized form, codebooks and sizes too, in float32
        size = codes.numel() + sum(t.numel() * t.element_size() for t in parts)
        return dequantize_4bit(codes, state).float(), size

    return quantize
