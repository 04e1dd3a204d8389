"""rpq-convert: fitted to the weights; calibrated; calibrated and tuned. Every weight, the embedding and the tied head with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.quality.peers import untouched

TITLE, ENVIRONMENT = "rpq-convert", None
_BITS = (8, 6, 5, 4, 3, 2)
_FREE = [{"bits": b} for b in _BITS]
_CALIBRATED = [{"bits": b, "calibrated": True} for b in _BITS[2:]]
_OWN = [
    {"bits": b, "own": True} for b in (4, 3, 2)
]  # no data: to text that the model writes itself, random tokens, noise
_OUTLIERS = [{"bits": 4, "outliers": 0.005, **how} for how in ({}, {"own": True}, {"calibrated": True})]
_HOW = ({}, {"sensitivity": "measured"}, {"own": True}, {"calibrated": True})
_CODED = [
    {"bits": b, "storage": "rans", **how} for b in (3.98, 3.03) for how in _HOW
]  # entropy-coded: 8 bits in memory
_FEW_CODED = [{"bits": b, "storage": "rans", "calibrated": True} for b in (2.5, 2.04)]
# a network without a config runs on no inputs of its own making, so nothing is measured there
_CODED_PICTURES = [
    {"bits": b, "storage": "rans", **how} for b in (4.4, 4, 3) for how in ({}, {"own": True}, {"calibrated": True})
]
_FINE = [{"bits": b, "calibrated": True} for b in (8, 6, 2.67, 2.5)]  # against others' 8 bits, Q5_K_M, GPTQ's 3 bits
# what 4.15 bits in memory can be from weights alone: bits by measured sensitivities, and inputs rotated
_ROTATED = {"target_size": 69_700_000, "rotation": 64}
_SIZED = {  # in the bytes of 2 bits for every weight
    "smollm2": {"target_size": 34_500_000, "calibrated": True},
    "minilm": {"target_size": 5_915_000, "calibrated": True},
}
_TWO_TUNED = {**_SIZED["minilm"], "steps": 1200, "rate": 4e-3, "recode": 2e-3}
_TEXT_TUNED = [
    {"bits": 1, "calibrated": True, "steps": 100, "recode": 2e-3},
    {"bits": 2, "calibrated": True, "steps": 400, "recode": 5e-4},
    *({"bits": b, "calibrated": True, "steps": s} for b, s in ((3, 200), (4, 100), (5, 100))),
]
_PICTURES = [*_FREE, *_OWN, *_CALIBRATED, *({"bits": b, "calibrated": True, "steps": 200} for b in (2, 1))]
_BYTES = [{**s, "codebooks": "float8_e4m3fn"} for s in _PICTURES if s["bits"] <= 2 and "own" not in s]
SETTINGS = {
    "smollm2": [
        *_FREE,
        *_CODED,
        *_FEW_CODED,
        *_OWN,
        *_OUTLIERS,
        *_CALIBRATED,
        *_FINE,
        _ROTATED,
        _SIZED["smollm2"],
        *_TEXT_TUNED,
    ],
    "smollm2-as-shipped": [{"bits": 4}],
    "minilm": [*_FREE, *_CODED, *_OWN, *_OUTLIERS, *_CALIBRATED, _SIZED["minilm"], _TWO_TUNED],
    "efficientnet": [*_PICTURES, *_CODED_PICTURES],
    "resnet": [*_PICTURES, *_BYTES],
    "vit": [*_PICTURES, *_BYTES],
}


def _own(model: nn.Module) -> list[Any]:
    """Return synthetic inputs for a model: for the small networks more and smaller pictures, in all as many as data would be."""
    import rpq_convert as rpq

    size = getattr(model, "picture_size", None)
    if size is not None:
        return rpq.own_inputs(model, shape=(3, size, size))
    if not hasattr(model, "config"):
        return rpq.own_inputs(model, samples=512, shape=(1, 28, 28))
    return rpq.own_inputs(model)


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> tuple[int, int]:
    """`settings`: options of `rpq.convert`, and `calibrated`, `own` (inputs), `codebooks` (their dtype), `steps`, `rate`
    and `recode` (of tuning).
    """
    import copy

    import rpq_convert as rpq

    options = {"storage": "bytes"} | settings  # cells of bits alone are those of a fixed rate, in memory too
    steps, calibrated, own = (options.pop(k, 0) for k in ("steps", "calibrated", "own"))
    how = {k: options.pop(k) for k in ("rate", "recode") if k in options}
    base = copy.deepcopy(model) if steps else None
    if codebooks := options.pop("codebooks", None):
        options["rules"] = [{"match": "*", "codebook_dtype": codebooks}]
    if calibrated or own:
        options["calibration"] = _own if own else data.calibration
    report = rpq.convert(model, **options)
    if base is not None:
        batches = data.tuning
        how |= {"loss": data.task.loss, "steps": steps, "autocast": torch.bfloat16}
        rpq.tune(model, base, batches[:-4], held_out=batches[-4:], **how)
    memory = untouched(model)
    rpq.restore(model)
    return memory - (report.held_bytes - report.bytes), memory
