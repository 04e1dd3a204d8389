"""Sensitivity: how much the model's output suffers for each parameter's error, measured by running it.

To second order the expected damage of small independent errors e is 1/2 sum F e^2, where F, the Fisher information's
diagonal, is the mean square of the gradients of log p(y) for y drawn from the model itself: one backward pass serves every
parameter. e is what a quick fit leaves (2 bits, dim 4), not noise of its size: k-means errs most on large weights, and on
SmolLM2's embedding these matter 2.3 times as much as its average weight, on a value projection half as much.

For outputs that are no logits, F is the mean square of the gradients of random signs times the output (Hutchinson 1989),
over the output's energy. Not used: noise in one layer at a time, which takes a pass per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpq_convert import layers, planning
from rpq_convert.calling import call, first_tensor
from rpq_convert.encode import build
from rpq_convert.planning import Job
from rpq_convert.rules import PlanError
from rpq_convert.walk import walk
from rpq_convert.weight import RPQWeight

PROBE = (4, 1)  # dim and stages of the quick fit
SEQUENCES, TOKENS = 8, 128  # of the text that a model writes for itself
IMAGES = 8
STEPS = 8  # per octave, to which results are rounded: threads and machines add up in other orders
LEAST = 0.01  # of the average weight's: what never met its input is not worth nothing


def sensitivities(
    model: nn.Module, data: Iterable[Any] | None = None, *, seed: int = 0, **options: Any
) -> dict[str, float]:
    """Measure the loss per unit of relative squared error of every parameter that can be converted.

    Args:
        model: dense, in memory; it is the same afterwards.
        data: inputs such as the model will see (each a tensor, a tuple, or a dict of keyword arguments); a few suffice.
            By default a language model writes its own text, other transformers models get random tokens or pixels.
        seed: decides the drawn numbers.
        options: those of `rpq.plan` that say what is converted: rules, include, exclude, …

    Returns:
        Parameter name -> nats per prediction (outputs with logits) or relative squared output error, per unit of relative
        squared weight error; rounded to eighths of an octave.

    Raises:
        PlanError: no data, and none that could be made up for this model.

    Example:
        >>> rpq.convert(model, target_size="50MB", sensitivity=rpq.sensitivities(model, batches))
    """
    from rpq_convert.conversion import run_jobs

    generator = torch.Generator().manual_seed(seed)
    with _still(model):
        items = list(data) if data is not None else made_up(model, generator)
        if not items:
            raise PlanError(f"nothing to run {type(model).__name__} on; give data, or sensitivity='shape'")
        dim, stages = PROBE
        plan = planning.make_plan(walk(model), dim=dim, stages=stages, seed=seed, **options)
        jobs = {j.name: j for j in plan.jobs if j.fit != "random"}
        places = {n: layers.find(model, n) for n in jobs}
        parameters = {n: module._parameters[name] for n, (module, name) in places.items()}
        source = {n: p.detach() for n, p in parameters.items() if p is not None}
        fits = {e.name: (e, build(jobs[e.name], e.tensors, e.zero_row, torch.float32)) for e in run_jobs(jobs.values(), source)}
        sums = dict.fromkeys(jobs, 0.0)
        count = 0.0
        with _gradients(model, {n: p for n, p in parameters.items() if p is not None}, fits, sums):
            for item in items:
                count += _backward(model, item, generator)
    found = {n: sums[n] / count / fits[n][0].error for n in jobs if fits[n][0].error and sums[n] > 0}
    weights = {n: math.prod(jobs[n].shape) for n in found}
    least = LEAST * sum(found.values()) / max(1, sum(weights.values()))
    return {n: 2.0 ** (round(STEPS * math.log2(max(v, least * weights[n]))) / STEPS) for n, v in found.items()}
