"""Evaluate: a converted model against the model that it was made from.

For language models: perplexity of both, the divergence of their predictions, how often they agree on the next token. For any
other module: what its outputs' shape gives a meaning to (outputs.py), and accuracy where labels are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpq_convert.core.keywords import keywords
from rpq_convert.core.results import Evaluation
from rpq_convert.errors import EvaluateError
from rpq_convert.evaluation.outputs import Comparison
from rpq_convert.inputs.items import prepare
from rpq_convert.layers.precision import fitting
from rpq_convert.running.call import call
from rpq_convert.running.state import kept

Progress = Callable[[int], None]


@keywords()
@torch.inference_mode()
def evaluate(
    base: nn.Module,
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    window: int = 512,
    batch: int = 4,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a converted model with its base.

    Args:
        base, model: both in eval mode.
        data: token ids [n] int64, for language models; else inputs as for `rpq.convert(calibration=)`. In a dict, `labels`
            [outputs] int64 are the right classes; the models do not see them.
        tokenizer: as for `rpq.convert`.
        window, batch: tokens of one window, each predicted on its own, and windows at a time.
        progress: called with the number of windows or inputs done.

    Returns:
        For ids: `perplexity`, `base_perplexity`, `ratio`, `kl` (nats per token, base to model), `top1_agreement`.
        Else, by the output: `relative_error` (squared distance over the base's square) and `cosine` (mean over vectors, or over
        whole pictures); `top1_agreement` of logits and of [samples, classes]; with labels, `accuracy` and `base_accuracy` as
        well; for one number a sample `mean_difference` and, where the numbers differ, `correlation` in the place of cosine; for
        whole numbers `agreement` alone. Tokens that an `attention_mask` leaves out do not count.

    Raises:
        EvaluateError: no data, outputs of different shapes, or labels that do not fit them. CalibrationError: as `rpq.convert`.

    Example:
        >>> rpq.evaluate(base, model, tokenizer(text, return_tensors="pt").input_ids[0]).metrics["kl"]
    """
    if isinstance(data, Tensor) and data.ndim == 1 and not data.is_floating_point():
        return _language(base, model, data, window, batch, progress)
    return _outputs(base, model, prepare(data, base, "data", tokenizer=tokenizer, labels=True), progress)


def _language(
    base: nn.Module, model: nn.Module, ids: Tensor, window: int, batch: int, progress: Progress | None
) -> Evaluation:
    if len(ids) < 2:
        raise EvaluateError(f"{len(ids)} tokens are too few to predict one; give a longer text")
    window = min(window, len(ids))
    windows = ids[: len(ids) // window * window].view(-1, window)
    sums = dict.fromkeys(("base", "model", "kl", "agree"), 0.0)
    count = 0
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        logits, other = (m(input_ids=part, use_cache=False).logits[:, :-1].float() for m in (base, model))
        if logits.shape != other.shape:
            raise EvaluateError(f"the base predicts {list(logits.shape)}, the model {list(other.shape)}")
        wanted = part[:, 1:].flatten()
        p, q = (F.log_softmax(x.flatten(0, 1), -1) for x in (logits, other))
        sums["base"] += F.nll_loss(p, wanted, reduction="sum").item()
        sums["model"] += F.nll_loss(q, wanted, reduction="sum").item()
        sums["kl"] += F.kl_div(q, p, log_target=True, reduction="sum").item()
        sums["agree"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += wanted.numel()
        if progress:
            progress(min(start + batch, len(windows)))
    before, after = math.exp(sums["base"] / count), math.exp(min(700.0, sums["model"] / count))
    metrics = {
        "perplexity": after, "base_perplexity": before, "ratio": after / before, "kl": sums["kl"] / count,
        "top1_agreement": sums["agree"] / count,
    }  # fmt: skip
    return Evaluation("language model", metrics, count)


def _outputs(base: nn.Module, model: nn.Module, data: Iterable[Any], progress: Progress | None) -> Evaluation:
    found = Comparison()
    with kept(base, model) as restore:
        for done, item in enumerate(data, 1):
            labels = item["labels"] if isinstance(item, Mapping) and "labels" in item else None
            item = item if labels is None else {k: v for k, v in item.items() if k != "labels"}
            restore()
            found.add(call(base, item), call(model, fitting(item, base, model)), item, labels)
            if progress:
                progress(done)
    return Evaluation("outputs", found.metrics(), found.count)
