"""Sensitivity: how much each parameter's error changes the model's output, measured by running it.

To second order the expected loss from small independent errors e is 1/2 sum F e^2, where F, the Fisher information's
diagonal, is the mean square of the gradients of log p(y) for y drawn from the model itself: one backward pass serves every
parameter. e is what a quick fit leaves (2 bits, dim 4; 3 bits where codes are entropy-coded), not noise of its size: k-means errs most
on large weights, and on SmolLM2's embedding these matter 2.3 times as much as its average weight, on a value projection half as much.

For outputs that are no logits, F is the mean square of the gradients of random signs times the output (Hutchinson 1989),
over the output's energy. Not used: noise in one layer at a time, which takes a pass per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.encoding.encode import build, encode
from rpq_convert.errors import NothingToRun, PlanError
from rpq_convert.inputs.items import Calibration, prepare
from rpq_convert.inputs.synthetic import SEQUENCES, probe_inputs
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning import planner
from rpq_convert.planning.options import MEASURED, PlanKeywords, PlanOptions
from rpq_convert.planning.plan import Job
from rpq_convert.planning.slots import walk
from rpq_convert.running.call import call, first_tensor, without_padding
from rpq_convert.running.modes import quiet

PROBE, CODED_PROBE = {"dim": 4, "stages": 1}, {"bits": 3.0}  # sizes of the quick fit
STEPS = 8  # per octave, to which results are rounded: threads and machines add up in other orders
LARGEST = 8 * 10**9  # bytes of a model that is loaded whole to be measured without being asked
Progress = Callable[[int, int], None]
T = TypeVar("T")
LEAST = 0.01  # of the average weight's, at least: a weight that no input reached still counts
# The share of the loss from a layer's errors that calibration leaves; tables that are only looked up gain nothing by it. MiniLM at
# 2 bits loses .30 of its mean cosine without and .18 with it, SmolLM2 at 4 bits .61 and .085 nats.
CALIBRATED = 0.5


@keywords(PlanOptions)
def sensitivities(
    model: nn.Module,
    data: Calibration | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[PlanKeywords],
) -> dict[str, float]:
    """Measure the loss per unit of relative squared error of every parameter that can be converted.

    Args:
        model: dense, in memory; it is the same afterwards.
        data: inputs such as the model will see, as for `rpq.convert(calibration=)`; a few suffice.
            By default synthetic inputs: a language model writes its own text, others get random tokens or smooth noise.
        progress: called with the number of weights and inputs done, and of all.
        options: those of `rpq.plan` that say what is converted (rules, include, exclude, …), `seed`, and `storage="rans"` for the errors
            of entropy-coded weights.

    Returns:
        Parameter name -> nats per prediction (outputs with logits) or relative squared output error, per unit of relative
        squared weight error; rounded to eighths of an octave.

    Raises:
        PlanError: no data, and no synthetic inputs for this model.

    Example:
        >>> rpq.convert(model, target_size="50MB", sensitivity=rpq.sensitivities(model, batches))
    """
    size = CODED_PROBE if options.get("storage") == "rans" else PROBE
    (asked,) = take({**options, **size}, PlanOptions)
    generator = torch.Generator().manual_seed(asked.seed)
    with quiet(model) as restore:
        items = probe_inputs(model, generator) if data is None else prepare(data, model, "data")
        if not items:
            raise NothingToRun(f"there is nothing to run {type(model).__name__} on: give data, or sensitivity='shape'")
        plan = planner.make_plan(walk(model), asked)
        jobs = [j for j in plan.jobs if not j.is_random]
        told = _counter(progress, len(jobs) + len(items))
        probes = {j.name: probe for j in told(jobs) if (probe := _probe(model, j)) is not None}
        sums = dict.fromkeys(probes, 0.0)
        with _collecting(model, probes, sums):
            count = sum(_backward(model, item, generator, restore) for item in told(items))
    found = {n: sums[n] / count / probe.error for n, probe in probes.items() if probe.error}
    weights = {n: math.prod(probes[n].weight.shape) for n in found}
    least = LEAST * sum(found.values()) / max(1, sum(weights.values()))
    rounded = {n: max(value, least * weights[n]) for n, value in found.items()}
    return {n: 2.0 ** (round(STEPS * math.log2(v)) / STEPS) for n, v in rounded.items() if v > 0}


def _counter(progress: Progress | None, total: int) -> Callable[[Iterable[T]], Iterator[T]]:
    """Return what walks through a part of all things and tells after each how many are done."""
    done = 0

    def walk_through(things: Iterable[T]) -> Iterator[T]:
        nonlocal done
        for thing in things:
            yield thing
            done += 1
            if progress:
                progress(done, total)

    return walk_through


@dataclass(frozen=True)
class Probe:
    """A parameter, its quick fit and that fit's relative squared error."""

    parameter: nn.Parameter
    weight: RPQWeight
    error: float | None


def _probe(model: nn.Module, job: Job) -> Probe | None:
    module, name = surgery.find(model, job.name)
    parameter = module._parameters[name]
    if parameter is None or parameter.is_meta:
        return None
    encoded = encode(job, parameter.detach())
    return Probe(parameter, build(job, encoded.tensors, encoded.zero_row, dtype=torch.float32), encoded.error)


@contextmanager
def _collecting(model: nn.Module, probes: Mapping[str, Probe], sums: dict[str, float]) -> Iterator[None]:
    """Add up gradient^2 x error^2 of every parameter as its gradient appears, and drop the gradient."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                error = probes[name].weight().to(parameter.device) - parameter.float()
                sums[name] += float(error.mul_(parameter.grad.float()).square_().sum(dtype=torch.float64))
            parameter.grad = None

        return hook

    with ExitStack() as stack:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        for name, probe in probes.items():
            probe.parameter.requires_grad_(True)
            probe.parameter.grad = None
            stack.callback(probe.parameter.register_post_accumulate_grad_hook(collect(name)).remove)
        try:
            yield
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient


def _backward(model: nn.Module, item: Any, generator: torch.Generator, restore: Callable[[], None]) -> float:
    """Run one input forward and a random question backward; return by what the squared gradients are to be divided."""
    restore()  # what an earlier run left may hold on to its graph
    with torch.enable_grad():
        output = call(model, item)
        logits = getattr(output, "logits", None)
        main = first_tensor(output) if logits is None else logits
        if main is None or not main.requires_grad:
            raise PlanError(f"the output of {type(model).__name__} has no tensor that depends on its weights")
        main = without_padding(item, main)
        if logits is not None:
            rows = main.flatten(0, -2).float()  # [predictions, classes]
            drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            F.cross_entropy(rows, drawn.to(rows.device), reduction="sum").backward()
            return 2.0 * len(rows)
        signs = torch.randint(0, 2, main.shape, generator=generator).to(main.device) * 2.0 - 1.0
        (main.float() * signs).sum().backward()
        return float(main.detach().double().square().sum())


def needs_sensitivities(options: PlanOptions) -> bool:
    """Return whether the plan for these options needs measured sensitivities."""
    return options.measures


def measure_for(
    options: PlanOptions,
    model: Callable[[], nn.Module],
    data: Calibration | None = None,
    progress: Progress | None = None,
) -> PlanOptions:
    """Return a plan's options with measured sensitivities, where this model can be run."""
    found = measured(options, model, data, progress)
    if found is None and options.sensitivity == MEASURED:
        raise NothingToRun(
            "this model cannot be measured here: it has no weights, or nothing to run it on; leave sensitivity out"
        )
    return options if found is None else replace(options, sensitivity=found)


def measured(
    options: PlanOptions,
    model: Callable[[], nn.Module],
    data: Calibration | None = None,
    progress: Progress | None = None,
) -> dict[str, float] | None:
    """Return what a model that these options convert is sensitive to; None where it cannot be run, or is too large to load."""
    ready = model()
    size = sum(p.numel() * p.element_size() for p in ready.parameters())
    if size > LARGEST or any(p.is_meta for p in ready.parameters()):
        return None
    inputs = None if data is None else prepare(data, ready, "calibration")
    what = {name: getattr(options, name) for name in ("rules", "include", "exclude", "seed", "axis")}
    what |= {"storage": "rans"} if options.coded else {"fit": options.fit}
    try:
        found = sensitivities(ready, inputs and inputs[:SEQUENCES], progress=progress, **what)
    except NothingToRun:
        return None
    if data is not None:  # they will be calibrated on it
        tables = {s.name for s in walk(ready) if s.looked_up}
        found = {name: value * (1 if name in tables else CALIBRATED) for name, value in found.items()}
    return found
