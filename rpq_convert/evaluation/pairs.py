"""Sentence pairs: rank correlation of the cosine of two embeddings with a given score."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.core.results import Evaluation
from rpq_convert.errors import EvaluateError, SourceError
from rpq_convert.inputs.files import read_text, tokenized, tokenizer_of


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two lists of numbers [n]; equal numbers share their mean rank."""
    x, y = _ranks(a), _ranks(b)
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


Say = Callable[[str], None]


def progress_lines(say: Say | None, what: str, total: int) -> Callable[[int], None] | None:
    return None if say is None else lambda done: say(f"{done} of {max(1, total)} {what}")


@torch.inference_mode()
def evaluate_pairs(
    dense: Any, converted: Any, base: str | Path, file: Path, window: int, limit: int | None, say: Say | None
) -> tuple[Evaluation, list[Any]]:
    rows = list(_scored(file))[:limit]
    if len(rows) < 2:
        raise EvaluateError(f"{file} holds {len(rows)} pairs; at least two are needed")
    words, sentences = tokenizer_of(base), [s for a, b, _ in rows for s in (a, b)]
    batches = [dict(batch) for batch in tokenized(words, sentences, window)]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    told = progress_lines(say, "batches", len(batches))
    for done, batch in enumerate(batches, 1):
        for parts, model in zip(found, (dense, converted)):
            parts.append(nn.functional.normalize(Pooled(model)(**batch).float(), dim=-1))
        if told:
            told(done)
    before, after = (torch.cat(parts) for parts in found)  # [2 pairs, width]
    scores = torch.tensor([score for *_, score in rows], dtype=torch.float32)
    likeness = [(e[::2] * e[1::2]).sum(-1) for e in (before, after)]
    metrics = {
        "cosine": float((before * after).sum(-1).mean()),
        "spearman": rank_correlation(likeness[1], scores),
        "base_spearman": rank_correlation(likeness[0], scores),
    }
    return Evaluation("sentence pairs", metrics, len(rows)), batches


def _scored(file: Path) -> Iterator[tuple[str, str, float]]:
    """Yield (sentence, sentence, score) of a csv; a first line whose third field is no number is a heading."""
    for number, row in enumerate(csv.reader(io.StringIO(read_text(file))), 1):
        try:
            a, b, score = row[0], row[1], float(row[2])
        except (IndexError, ValueError):
            if number == 1:
                continue
            raise SourceError(f"{file}, line {number}: not sentence, sentence, score") from None
        yield a, b, score


class Pooled(nn.Module):
    """A text encoder's mean over tokens of its last hidden state: [sentences, width]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (self.model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
