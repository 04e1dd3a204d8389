"""What was measured of known models (`configs/quality.json`, written by `benchmarks/preset_quality.py`): what presets keep, what helps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

FAST, SELF, DATA, TUNED = (
    "fast",
    "self",
    "data",
    "tuned",
)  # weights alone; synthetic inputs; given data; data and tuning


@dataclass(frozen=True)
class Measured:
    """One conversion of a known model.

    Args:
        model, bits, effort: what was converted, to how many code bits per weight, and how.
        value: a multiple of the base's perplexity (SmolLM2), the mean cosine of sentences (MiniLM), or the share of pictures that get
            the base's class (ViT).
        minutes: of one thread, on a shared machine. smaller: than float32, as a factor.
        coded: whether codes are entropy-coded in files; else they are as small in memory.
    """

    model: str
    bits: float
    effort: str
    value: float
    minutes: float
    smaller: float
    coded: bool = False


@cache
def _read() -> dict[str, Any]:
    return json.loads((resources.files("rpq_convert.configs") / "quality.json").read_text("utf8"))  # type: ignore[no-any-return]


def models() -> dict[str, dict[str, Any]]:
    """Return the known models: key -> `name`, `metric`, `parameters`."""
    return _read()["models"]  # type: ignore[no-any-return]


@cache
def rows() -> tuple[Measured, ...]:
    return tuple(Measured(**row) for row in _read()["rows"])


def row(model: str, bits: float, effort: str, *, coded: bool | None = None) -> Measured | None:
    """Return what was measured at these bits; None where it was not.

    Args:
        coded: whether codes are entropy-coded; None: whichever `--bits` means.
    """
    found = [r for r in rows() if (r.model, r.bits, r.effort) == (model, bits, effort) and coded in (None, r.coded)]
    return max(found, key=lambda r: r.coded, default=None)


def summary(model: str = "smollm2") -> str:
    """Return what is left of a known model, a word per size: calibrated on synthetic inputs, or the weights alone where that is not known."""
    sizes = sorted({r.bits for r in rows() if r.model == model}, reverse=True)
    found = {bits: row(model, bits, SELF) or row(model, bits, FAST) for bits in sizes}
    return ", ".join(f"{bits:g} bits {r.value:.2f}x ({r.smaller:.1f}x smaller)" for bits, r in found.items() if r)


def nearest(model: str, bits: float) -> float:
    """Return the measured bits of a model that are nearest to these."""
    return min((r.bits for r in rows() if r.model == model), key=lambda known: abs(known - bits))
