"""optimum-quanto: symmetric 8 bits per row, or 4 and 2 bits in groups of at most 128 with a shift, data-free."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.quality.peers import Quantizer, by_matrix, stored

TITLE, ENVIRONMENT = "optimum-quanto", "datafree"
_COMMON = [{"bits": b, "embedding": e} for b, e in ((4, 4), (2, 4), (4, 8), (8, 8))]
_PLAIN = [{"bits": b} for b in (8, 4, 2)]
SETTINGS = {
    "smollm2": _COMMON, "minilm": [*_COMMON, {"bits": 2, "embedding": 2}],
    "efficientnet": _PLAIN, "resnet": _PLAIN, "vit": _PLAIN,
}  # fmt: skip


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> int:
    linear, embedding = _quantizer(settings["bits"]), settings.get("embedding", 16)
    return by_matrix(model, linear, _quantizer(embedding) if embedding < 16 else None, linear)


def _quantizer(bits: int) -> Quantizer:
    from optimum.quanto import QLinear, qint2, qint4, qint8

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        holder.weight = nn.Parameter(weight.clone())
        converted = QLinear.from_module(holder, weights={8: qint8, 4: qint4, 2: qint2}[bits])
        converted.freeze()
        parts: dict[str, Tensor] = {}
        converted.weight.save_to_state_dict(parts, "", False)
        return converted.weight.dequantize(), stored(parts.values())

    return quantize
