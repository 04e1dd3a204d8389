"""Outputs compared: which figures mean something follows from an output's shape.

| output | figures |
|---|---|
| logits, or [samples, classes] | cosine, relative error, agreement of the largest; accuracy with labels |
| vectors [samples, ..., width], such as hidden states | cosine, relative error |
| pictures [samples, channels, height, width] and larger | cosine of whole ones, relative error |
| one number for a sample or a step, or a single one | mean difference, relative error, correlation where numbers differ |
| whole numbers or truth values | agreement |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.errors import EvaluateError
from rpq_convert.running.call import counted, first_tensor

IGNORED = -100  # the label of an output that has none, as in torch's losses
CLASSES, VECTORS, PICTURES, NUMBERS, CHOICES = "classes", "vectors", "pictures", "numbers", "choices"


def main_output(output: Any) -> Tensor:
    found = first_tensor(output)
    if found is None:
        raise EvaluateError(f"{type(output).__name__} holds no tensor to compare")
    return found


def kind_of(output: Any, item: Any) -> str:
    """Return what a model's output is, by its shape and that of the input it was made from."""
    main, logits = main_output(output), getattr(output, "logits", None)
    if not (main.is_floating_point() or main.is_complex()):
        return CHOICES
    if main.ndim == 0 or main.shape[-1] == 1 or (main.ndim == 1 and _samples(item) in (None, len(main))):
        return NUMBERS
    if logits is not None and main is logits:
        return CLASSES
    if main.ndim >= 4:
        return PICTURES
    unnamed = not isinstance(output, Mapping)  # transformers' output without logits is hidden states or embeddings
    return CLASSES if unnamed and main.ndim > 1 and not main.is_complex() else VECTORS


def _samples(item: Any) -> int | None:
    """Return how many samples an input holds; 0 for a single one without an axis for them, None where no tensor says."""
    first = first_tensor(item)
    return None if first is None else len(first) if first.ndim > 1 else 0


class Comparison:
    """Sums over outputs of the base and of the model."""

    def __init__(self) -> None:
        self.kind: str | None = None
        self.sums = dict.fromkeys(("cosine", "rest", "power", "agree", "distance", "a", "b", "aa", "bb", "ab"), 0.0)
        self.count = self.labelled = 0
        self.right = [0, 0]  # answers of the base, of the model

    def add(self, base: Any, model: Any, item: Any, labels: Tensor | None) -> None:
        """Add what both gave for one input.

        Raises:
            EvaluateError: shapes that differ, or labels that do not fit.
        """
        a, b = main_output(base), main_output(model)
        if a.shape != b.shape:
            raise EvaluateError(f"the base's output is {list(a.shape)}, the model's {list(b.shape)}")
        self.kind = self.kind or kind_of(base, item)
        if labels is not None and self.kind in (VECTORS, PICTURES):
            self.kind = CLASSES
        if labels is not None and self.kind != CLASSES:
            raise EvaluateError(
                f"labels need an output with one number for each class, not {list(a.shape)}; leave them out"
            )
        rows = counted(item, a)
        a, b = (self._vectors(x, rows) for x in (a, b))
        if not a.numel():
            return
        if self.kind == CHOICES:
            self.sums["agree"] += float((a == b).sum())
            self.count += a.numel()
            return
        answers = a, b
        a, b = _comparable(a, b)
        self.sums["rest"] += float((a - b).double().square().sum())
        self.sums["power"] += float(a.double().square().sum())
        if self.kind == NUMBERS:
            self._add_numbers(a.double().flatten(), b.double().flatten())
            return
        self.sums["cosine"] += F.cosine_similarity(a, b, dim=-1).sum().item()
        self.count += len(a)
        if self.kind == CLASSES:
            best = [x.argmax(-1) for x in answers]
            self.sums["agree"] += (best[0] == best[1]).sum().item()
            if labels is not None:
                self._add_labels(best, labels, rows)

    def _vectors(self, output: Tensor, rows: Tensor | None) -> Tensor:
        """Return an output's vectors [n, width], without those of padding."""
        if rows is not None:
            output = output.flatten(0, 1)[rows]
        elif self.kind == PICTURES:
            return output.flatten(1)
        elif self.kind == CLASSES and output.ndim >= 4:
            output = output.movedim(1, -1)  # classes of pixels
        return output.reshape(-1, output.shape[-1] if output.ndim else 1)

    def _add_numbers(self, a: Tensor, b: Tensor) -> None:
        self.count += a.numel()
        self.sums["distance"] += float((a - b).abs().sum())
        for name, value in {"a": a, "b": b, "aa": a * a, "bb": b * b, "ab": a * b}.items():
            self.sums[name] += float(value.sum())

    def _add_labels(self, answers: Sequence[Tensor], labels: Tensor, rows: Tensor | None) -> None:
        labels = labels.flatten().to(answers[0].device)
        labels = labels if rows is None or len(labels) != len(rows) else labels[rows]
        if len(labels) != len(answers[0]):
            raise EvaluateError(f"{len(labels)} labels for {len(answers[0])} outputs")
        known = labels != IGNORED
        self.labelled += int(known.sum())
        for i, found in enumerate(answers):
            self.right[i] += int((found == labels)[known].sum())

    def metrics(self) -> dict[str, float]:
        """Return the figures that mean something for what was compared.

        Raises:
            EvaluateError: nothing was.
        """
        if not self.count:
            raise EvaluateError("no data to compare outputs on")
        s, n = self.sums, self.count
        if self.kind == CHOICES:
            return {"agreement": s["agree"] / n}
        error = s["rest"] / s["power"] if s["power"] else (math.inf if s["rest"] else 0.0)
        if self.kind == NUMBERS:
            return {"mean_difference": s["distance"] / n, "relative_error": error} | self._correlation()
        found = {"cosine": s["cosine"] / n, "relative_error": error}
        if self.kind == CLASSES:
            found["top1_agreement"] = s["agree"] / n
        if self.labelled:
            found |= {"accuracy": self.right[1] / self.labelled, "base_accuracy": self.right[0] / self.labelled}
        return found

    def _correlation(self) -> dict[str, float]:
        s, n = self.sums, self.count
        spread = [n * s["aa"] - s["a"] ** 2, n * s["bb"] - s["b"] ** 2]
        if min(spread) <= 1e-12 * n * max(s["aa"], s["bb"]):  # they are all the same
            return {}
        return {"correlation": (n * s["ab"] - s["a"] * s["b"]) / math.sqrt(spread[0] * spread[1])}


def _comparable(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs as real numbers; infinite ones that both have alike (masked logits) count as equal."""
    if a.is_complex():
        a, b = (torch.view_as_real(x).flatten(-2) for x in (a, b))
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    alike = (a == b) & ~torch.isfinite(a)
    return (a.masked_fill(alike, 0), b.masked_fill(alike, 0)) if bool(alike.any()) else (a, b)
