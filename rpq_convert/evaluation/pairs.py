"""Sentence pairs: rank correlation of a model's score, such as the cosine of two embeddings, with a given one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.core.results import Evaluation
from rpq_convert.errors import EvaluateError
from rpq_convert.evaluation.pooling import Pooled
from rpq_convert.inputs.files import tokenized, tokenizer_of
from rpq_convert.inputs.tables import scored_pairs
from rpq_convert.running.progress import Progress, counted
from rpq_convert.running.state import kept


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two lists of numbers [n]; equal numbers share their mean rank."""
    x, y = _ranks(a), _ranks(b)
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


@torch.inference_mode()
def evaluate_pairs(
    dense: Any, converted: Any, base: str | Path, file: Path, window: int, limit: int | None, progress: Progress | None
) -> tuple[Evaluation, list[Any]]:
    """Rank scored pairs by both models: by the cosine of two embeddings, pooled as the base's folder says, or by a cross-encoder.

    Raises:
        EvaluateError: too few pairs, or a classifier of more classes than a score.
    """
    rows = scored_pairs(file)[:limit]
    if len(rows) < 2:
        raise EvaluateError(f"{file} holds {len(rows)} pairs; at least two are needed")
    scores = torch.tensor([score for *_, score in rows], dtype=torch.float32)
    words = tokenizer_of(base)
    crosses = type(dense).__name__.endswith("ForSequenceClassification")
    if crosses and dense.config.num_labels != 1:
        raise EvaluateError(f"{base} gives {dense.config.num_labels} classes; a cross-encoder of pairs gives one score")
    texts: list[Any] = [(a, b) for a, b, _ in rows] if crosses else [s for a, b, _ in rows for s in (a, b)]
    batches = [dict(batch) for batch in tokenized(words, texts, window)]
    models = [m if crosses else Pooled(m, base) for m in (dense, converted)]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    told = counted(progress, "batches", len(batches))
    with kept(dense, converted):
        for done, batch in enumerate(batches, 1):
            for parts, model in zip(found, models):
                output = model(**batch)
                parts.append((output.logits[:, 0] if crosses else output).float())
            if told:
                told(done)
    before, after = (torch.cat(parts) for parts in found)
    if crosses:
        metrics = {"mean_difference": float((before - after).abs().mean())}
        likeness = [before, after]
    else:
        before, after = (nn.functional.normalize(e, dim=-1) for e in (before, after))  # [2 pairs, width]
        metrics = {"cosine": float((before * after).sum(-1).mean())}
        likeness = [(e[::2] * e[1::2]).sum(-1) for e in (before, after)]
    metrics |= {
        "spearman": rank_correlation(likeness[1], scores),
        "base_spearman": rank_correlation(likeness[0], scores),
    }
    return Evaluation("sentence pairs", metrics, len(rows)), batches
