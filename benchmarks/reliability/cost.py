"""What reproducible fits cost: CPU seconds of one thread, beside fits that are not."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import rpq_convert as rpq

WIDTH, RUNS = 1536, 3
FITS: dict[str, dict[str, Any]] = {
    "4 bits, entropy-coded": {"bits": 4},
    **{f"preset {name}": {"preset": name} for name in ("2bit", "4bit", "5bit", "8bit")},
}


def reproducible() -> None:
    """Print the seconds of both, and their ratio, for a square matrix of normal numbers."""
    torch.set_num_threads(1)
    for name, options in FITS.items():
        plain, same = (_seconds({**options, "reproducible": asked}) for asked in (False, True))
        print(f"{name}: {plain:.2f} s, reproducible {same:.2f} s, {same / plain:.1f} times as long", flush=True)


def _seconds(options: dict[str, Any]) -> float:
    """Return the least of some runs; the first may compile."""
    torch.manual_seed(0)
    weight, taken = torch.randn(WIDTH, WIDTH), []
    for _ in range(RUNS):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
        model[0].weight.data.copy_(weight)
        began = time.process_time()
        rpq.convert(model, executor="serial", progress=False, **options)
        taken.append(time.process_time() - began)
    return min(taken)
