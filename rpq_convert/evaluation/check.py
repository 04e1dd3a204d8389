"""The check after a conversion: the base against the converted model, on few inputs, within a budget of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.core.results import Evaluation
from rpq_convert.errors import EvaluateError
from rpq_convert.evaluation.evaluate import evaluate
from rpq_convert.inputs.synthetic import own_inputs, writes_text
from rpq_convert.running.modes import quiet

SEED = 1  # of the check's synthetic inputs; a calibration has others (seed 0)
SAMPLES, WINDOW = 8, 128  # texts that a language model writes, and their tokens
OTHERS = 32  # samples of as many tokens for other models; or pictures
LEAST = 16  # tokens of a text below which perplexity says little
SHARE = 0.5  # of the budget that writing a text may take


def quick_check(base: nn.Module, model: nn.Module, data: Sequence[Any] | None = None, *, seconds: float) -> Evaluation:
    """Compare a converted model with its base on as many inputs as the budget allows.

    Args:
        data: inputs that are ready; None for synthetic ones. A language model is judged by its predictions of them.
        seconds: the budget. What one input takes is measured first.

    Returns:
        As `evaluate`.

    Raises:
        CalibrationError: synthetic inputs of this model cannot be made. EvaluateError: as `evaluate`, or one input takes too long.
    """
    ends = time.monotonic() + seconds
    with quiet(base), quiet(model):
        items = list(data) if data is not None else _made(base, ends)
        run = _runner(base, model, items)
        for _ in range(2):  # kernels are compiled the first time
            began = time.monotonic()
            found = run(1)
            took = time.monotonic() - began
            many = int(min(len(items), (ends - time.monotonic()) / max(took, 1e-3)))
            if not 1 < many < len(items):
                break
        return run(many) if many > 1 else found


def _runner(base: nn.Module, model: nn.Module, items: Sequence[Any]) -> Callable[[int], Evaluation]:
    """Return what evaluates both on the first so many items."""
    if not items:
        raise EvaluateError("no data to compare the model with its base on")
    if writes_text(base) and all(_is_text(item) for item in items):
        window = min(item["input_ids"].shape[1] for item in items)
        rows = [item["input_ids"][:, :window] for item in items]
        return lambda many: evaluate(base, model, torch.cat(rows[:many]).flatten(), window=window)
    return lambda many: evaluate(base, model, items[:many])


def _is_text(item: Any) -> bool:
    return isinstance(item, Mapping) and set(item) == {"input_ids"} and item["input_ids"].ndim == 2


def _made(base: Any, ends: float) -> list[Any]:
    """Return synthetic inputs that can be made and run in time."""
    if not writes_text(base):
        return own_inputs(base, samples=OTHERS, window=WINDOW, seed=SEED)
    step = _step(base)
    left = ends - time.monotonic()
    window = int(min(WINDOW, SHARE * left / max(step, 1e-6)))
    if window < LEAST:
        raise EvaluateError(
            f"a token takes the base {step:.1f} s; give at least {step * LEAST / SHARE:.0f} s to write a text"
        )
    made = own_inputs(base, samples=SAMPLES, window=window, seed=SEED)
    return [{"input_ids": row} for item in made for row in item["input_ids"].split(2)]


@torch.no_grad()
def _step(base: Any) -> float:
    """Return the seconds that a language model takes to write a token of each text, the second time."""
    ids: Tensor = torch.zeros(SAMPLES, 1, dtype=torch.int64, device=next(base.parameters()).device)
    for _ in range(2):
        began = time.monotonic()
        base(input_ids=ids)
    return time.monotonic() - began
