"""The standard deviation of a weight that has not been trained: its config's, or that of torch's own initialisation of its layer."""

from __future__ import annotations

import math
from typing import Any

from rpq_convert.planning.plan import Job

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}  # matrices of a recurrent layer, stacked in one weight


def default_std(job: Job) -> float:
    """Return the standard deviation that torch's own initialisation of this layer would give its weight."""
    view = job.weight_view
    if "Embedding" in job.layer:
        return 1.0
    inputs = [s for s, a in zip(job.shape, view.axes) if a not in ("out", "expert")]
    if job.layer == "Conv1D":  # transformers draws it at 0.02, whatever its size
        return 0.02
    if job.layer == "Bilinear":
        return 1 / math.sqrt(3 * job.shape[1])
    if job.layer == "MultiheadAttention":  # xavier_uniform
        return math.sqrt(2 / sum(job.shape))
    if job.layer.removesuffix("Cell") in GATES and "_hr" not in job.name:  # drawn by the hidden width, stored per gate
        return math.sqrt(GATES[job.layer.removesuffix("Cell")] / (3 * job.shape[0]))
    if view.axes[0] == "in":  # transposed convolutions: torch counts the second stored axis as fan-in
        return 1 / math.sqrt(3 * math.prod(job.shape[1:]))
    return 1 / math.sqrt(3 * math.prod(inputs))


def configured_std(model: Any) -> float | None:
    """Return the standard deviation that a model's config gives new weights; None where it has none."""
    config = getattr(model, "config", None)  # OPT and a few others call it init_std
    return next((v for n in ("initializer_range", "init_std") if (v := getattr(config, n, None))), None)
