"""What one step hands to the next: statistics of inputs, the encoded parameter, the outcome of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from rpq_convert.report.quality import UNITS

# What a fit measures: fields of Encoded, of a report's rows and of the facts that pieces and layers keep.
MEASURED = ("error", "dead", "seconds", "inputs", "worst", "output_error", "worst_output")


@dataclass(frozen=True)
class Statistics:
    """What a weight was multiplied by in calibration.

    Args:
        hessian: `sum x x^T` [inputs, inputs], or [parts, inputs, inputs]: experts, or groups of a convolution.
        inputs: how many input vectors that is a sum over.
        cross: the cross-moment `sum d x^T` [inputs, inputs], where d is what the dense model's weight multiplies in place of x.
    """

    hessian: Tensor
    inputs: int
    cross: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """The stored tensors of one parameter, and what its fit measured.

    Args:
        name: the job's name.
        tensors: `codebooks`, `codes` and perhaps `scales`, as the job's spec shapes them.
        error: relative squared error of the weights, `|W - W'|^2 / |W|^2`; None for random codebooks.
        dead: codewords that no code uses.
        seconds: wall time of the fit.
        zero_row: a padding row that decodes to zeros.
        inputs: how many input vectors it was calibrated on; None where it was fitted to the weights alone.
        worst: the weight error of the worst output.
        output_error: relative squared error of the layer's output on the calibration inputs, `tr(E H E^T) / tr(W H W^T)` with
            `E = W - W'`; None without calibration.
        worst_output: that of the worst output.
    """

    name: str
    tensors: Mapping[str, Tensor]
    error: float | None = None
    dead: int = 0
    seconds: float = 0.0
    zero_row: int | None = None
    inputs: int | None = None
    worst: float | None = None
    output_error: float | None = None
    worst_output: float | None = None

    @property
    def measured(self) -> dict[str, Any]:
        """What the fit measured, by name."""
        return {name: getattr(self, name) for name in MEASURED}


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Args:
        kind: `language model`, `outputs` or `sentence pairs`.
        metrics: name -> value; see `evaluate`.
        samples: tokens that were predicted, outputs that were compared, or pairs that were ranked.
        layers: parameter path -> relative squared error of its layer's output on the base's inputs.
    """

    kind: str
    metrics: Mapping[str, float]
    samples: int
    layers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        width = max(map(len, self.metrics))
        lines = [f"{self.kind}, {self.samples:,} {UNITS[self.kind]}"]
        lines += [f"  {name:<{width}}  {value:.4f}" for name, value in self.metrics.items()]
        worst = sorted(self.layers.items(), key=lambda item: -item[1])[:5]
        return "\n".join([*lines, *(f"  layer {name}: output error {error:.2g}" for name, error in worst)])
