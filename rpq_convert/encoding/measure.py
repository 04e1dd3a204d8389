"""How wrong an encoded weight is: the error of its values, and that of its layer's output on given inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.core.reproducible import total
from rpq_convert.core.rotation import rotate_weight
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import TRAINED, RPQWeight
from rpq_convert.running.digest import describe
from rpq_convert.running.offload import onloaded

ERRORS = ("error", "worst", "output_error", "worst_output")  # what no longer holds where a weight has changed

CHUNK = 1 << 18  # weights decoded at a time
WIDE = 4096  # outputs measured at a time


@torch.no_grad()
def weight_errors(dense: Tensor, rpq: RPQWeight) -> tuple[float, float]:
    """Return `|W - W'|^2 / |W|^2` of the whole, 0 for a zero tensor that decodes to zeros, and of the worst output that is not zero."""
    matrix = rpq.view.to_matrix(rotate_weight(dense, rpq.view, rpq.spec.rotation), rpq.spec.axis)  # [n, L]
    by_rows = rpq.spec.axis == "in"  # rows are outputs
    outputs = matrix.shape[0 if by_rows else 1]
    power, rest = torch.zeros(2, outputs, dtype=torch.float64)
    whole = torch.zeros(2, dtype=torch.float64)
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        part = matrix[start : start + step].double()
        wrong = part - rpq.matrix_rows(start, start + step).cpu()
        for i, (sums, square) in enumerate(((power, part.square_()), (rest, wrong.square_()))):
            whole[i] += total(square)
            if by_rows:
                sums[start : start + step] = total(square, 1)
            else:
                sums += total(square, 0)
    return _share(*whole.tolist()), _worst(power, rest)


@torch.no_grad()
def output_errors(dense: Tensor, decoded: Tensor, rpq: RPQWeight, hessian: Tensor) -> tuple[float, float]:
    """Return `tr(E H E^T) / tr(W H W^T)`, the relative squared error of a layer's output on its inputs, and that of the worst output.

    Args:
        dense, decoded: the weight before and after.
        hessian: `sum x x^T` [inputs, inputs]; or [parts, inputs, inputs], one for each run of outputs (experts, groups of a
            convolution), or of inputs (groups of a transposed convolution).
    """
    before, after = (rpq.view.to_matrix(w.detach().float(), "in") for w in (dense, decoded))  # [outputs, inputs]
    parts = hessian.detach().to("cpu", torch.float32)
    parts = parts if parts.ndim == 3 else parts[None]
    axis = 0 if parts.shape[-1] == before.shape[1] else 1
    pieces = zip(parts, before.chunk(len(parts), axis), after.chunk(len(parts), axis), strict=True)
    found = [_powers(h, w, e) for h, a, b in pieces for w, e in zip(a.split(WIDE), (a - b).split(WIDE), strict=True)]
    power, rest = (torch.cat(sums) for sums in zip(*found))
    return _share(float(power.sum()), float(rest.sum())), _worst(power, rest)


def _powers(hessian: Tensor, *weights: Tensor) -> list[Tensor]:
    """Return `w H w^T` of every row w of each of these matrices [outputs, inputs], in fp64."""
    return [((w @ hessian).double() * w).sum(1).clamp_min(0) for w in weights]  # H is positive but for rounding


def _share(power: float, rest: float) -> float:
    return rest / power if power else (math.inf if rest else 0.0)


def _worst(power: Tensor, rest: Tensor) -> float:
    return float(torch.where(power > 0, rest / power, 0.0).max())


def record_of(rpq: RPQWeight) -> dict[str, Any]:
    """Return what the fit of a weight left with it; no errors, where its codebooks have changed since."""
    record = dict(getattr(rpq, "record", {}))
    if record.pop("mark", None) != mark_of(rpq):
        record = {k: v for k, v in record.items() if k not in ERRORS}
    return record


def set_record(rpq: RPQWeight, record: Mapping[str, Any]) -> None:
    """Leave with a weight what its fit measured, as long as it stays as it is."""
    rpq.record = {**record, "mark": mark_of(rpq)}  # type: ignore[assignment]


def mark_of(rpq: RPQWeight) -> str:
    """Return a digest of the tensors that training changes, as a file keeps them. Code updates change them too."""
    with onloaded(rpq):
        kept = {k: t for k, t in rpq.stored().items() if k in TRAINED}
        return "" if any(t.is_meta for t in kept.values()) else str(describe([kept])["sha256"])


def remeasure(model: nn.Module, base: nn.Module) -> None:
    """Measure the weight errors of a model's layers again, after training; errors of outputs are not known any more."""
    for name, rpq in surgery.layers_of(model).items():
        dense = surgery.parameter_at(base, name)
        if dense is not None and tuple(dense.shape) == rpq.shape:
            with onloaded(rpq):
                error, worst = weight_errors(dense.detach().to("cpu", torch.float32), rpq)
            set_record(
                rpq, record_of(rpq) | {"error": error, "worst": worst, "output_error": None, "worst_output": None}
            )
