"""Tuning: codebooks, scales, norms and biases trained against the dense model, and codes if asked (codes.py).

No fit of single layers gives back what layers lose together. A few hundred steps of distillation do, as every codeword is
shared by thousands of weights and follows the sum of their gradients. Adam steps are relative to the size of each tensor,
so one learning rate serves codebooks, scales and norms. The result is judged on held-out data, at the precision that is stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.core.spec import dtype_of
from rpq_convert.encoding.measure import remeasure
from rpq_convert.errors import TuneError
from rpq_convert.inputs.items import prepare
from rpq_convert.layers import surgery
from rpq_convert.layers.precision import fitting, widened
from rpq_convert.running.blocks import recomputed
from rpq_convert.running.call import call, without_padding
from rpq_convert.running.digest import describe
from rpq_convert.running.modes import quiet
from rpq_convert.training.code_updates import EVERY, CodeUpdates
from rpq_convert.tuning.checkpoint import ANEW, Checkpoint
from rpq_convert.tuning.losses import LOSSES, _main
from rpq_convert.tuning.options import TuneKeywords, TuneOptions
from rpq_convert.tuning.trained import stored_dtypes, trained_values, training

Progress = Callable[[int, float], None]
BETAS, EPSILON = (0.9, 0.99), 1e-12
FLOOR = 1e-2  # size that a step on an all but zero tensor is relative to
WARM = 0.05  # share of the steps in which the learning rate grows
LAST = 0.1  # of the learning rate, at the last step
BACK = 0.25  # of the learning rate is left where steps help no more, or hurt (depthwise convolutions bear a tenth of others')


@dataclass(frozen=True)
class Tuning:
    """What tuning did.

    Args:
        before, after: held-out loss, of the model as it came and as it is now; never more than before.
        best: the step that is kept; 0 where no step was better than none.
        steps: how many were run.
        history: (step, held-out loss) of every evaluation.
    """

    before: float
    after: float
    best: int
    steps: int
    history: tuple[tuple[int, float], ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        return f"held-out loss {self.before:.4g} -> {self.after:.4g} (best of {self.steps} steps: {self.best})"


@keywords(TuneOptions)
def tune(
    model: nn.Module,
    base: nn.Module,
    data: Any,
    *,
    held_out: Any = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[TuneKeywords],
) -> Tuning:
    """Train a converted model's codebooks, scales, norms and biases, in place, to give what its base gives.

    Args:
        model, base: the converted model and the dense one; both run in evaluation mode.
        data: inputs as for `convert(calibration=)`, a batch each; steps take them in an order drawn from the seed.
        held_out: inputs to judge on; by default every tenth of `data`, which is then not trained on.
        tokenizer: as for `convert`.
        checkpoint: a file that is written at every evaluation; a killed run goes on from it, and it is removed at the end.
        progress: called with the step and its loss.
        options: fields of `TuneOptions`: loss, steps, rate, every, patience, seed, autocast, recompute, recode.

    Returns:
        Losses on held-out data; the model keeps the best step, which may be none of them.

    Raises:
        TuneError: no RPQ layer, too little data, a loss that is not finite at the start, or a checkpoint of another run.

    Example:
        >>> print(rpq.tune(model, base, batches, steps=100))
    """
    (asked,) = take(options, TuneOptions)
    items = prepare(data, base, "data", tokenizer=tokenizer)
    if held_out is not None:
        held_out = prepare(held_out, base, "held_out", tokenizer=tokenizer)
    kept = Checkpoint(Path(checkpoint)) if checkpoint else None
    return tune_with(asked, model, base, items, held_out=held_out, checkpoint=kept, progress=progress)


def tune_with(
    options: TuneOptions,
    model: nn.Module,
    base: nn.Module,
    data: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Tune by options that were made before on inputs that are ready; all else is as for `tune`."""
    batches, judged = list(data), None if held_out is None else list(held_out)
    if judged is None:
        judged, batches = batches[::10], [b for i, b in enumerate(batches) if i % 10]
    if not batches or not judged:
        raise TuneError("too little data: at least one batch to train on and one to judge on are needed")
    if not surgery.layers_of(model):
        raise TuneError(f"{type(model).__name__} has no RPQ layer to tune; convert it first")
    again = recomputed(model) if options.recompute else nullcontext()
    with widened(model, torch.float32), again, quiet(model) as mine, quiet(base) as its:
        done = _Run(options, model, base, batches, judged, checkpoint or Checkpoint(), progress, (mine, its)).run()
        if done.best:
            remeasure(model, base)
        return done


class _Run:
    def __init__(
        self,
        options: TuneOptions,
        model: nn.Module,
        base: nn.Module,
        batches: Sequence[Any],
        judged: Sequence[Any],
        checkpoint: Checkpoint,
        progress: Progress | None,
        restore: Sequence[Callable[[], None]],
    ) -> None:
        self.restore = restore
        self.options, self.model, self.base, self.batches, self.judged = options, model, base, batches, judged
        self.progress = progress
        self.checkpoint = checkpoint
        self.values = trained_values(model)
        self.stored = stored_dtypes(model, self.values)
        self.updates = CodeUpdates(model, options.recode) if options.recode else None
        self.loss = LOSSES[options.loss] if isinstance(options.loss, str) else options.loss
        o = options
        self.autocast = None if o.autocast is None else dtype_of(o.autocast)
        facts = [describe(batches), describe(judged), str(o.loss), o.steps, o.rate, o.interval, o.seed]
        facts += [str(self.autocast)]
        facts += [o.recode, BACK, o.patience]
        shapes = {name: [str(p.dtype), *p.shape] for name, p in self.values.items()}
        begins = {**self.values, **(self.updates.codes if self.updates else {})}
        start = {n: hashlib.sha256(p.detach().cpu().float().numpy().tobytes()).hexdigest() for n, p in begins.items()}
        self.mark = hashlib.sha256(
            json.dumps([facts, shapes, start, *([checkpoint.of] if checkpoint.of else [])]).encode()
        ).hexdigest()

    def run(self) -> Tuning:
        with training(self.model, self.values):
            sizes = {n: max(float(p.detach().square().mean().sqrt()), FLOOR) for n, p in self.values.items()}
            state = self._resume() or _State(self._copy(), {}, {}, 0, 0, [])
            if not state.history:
                state.history.append((0, before := self._judge()))
                if not math.isfinite(before):
                    raise TuneError(f"the loss of the model as it came is {before}")
                state.best = self._copy()
            while self._goes_on(state):
                found = self._step(state, sizes)
                state.step += 1
                if self.progress:
                    self.progress(state.step, found)
                if state.step % self.options.interval == 0 or state.step == self.options.steps:
                    judged = self._judge()
                    state.since += 1
                    if judged < min(value for _, value in state.history):
                        state.best, state.best_step, state.since = self._copy(), state.step, 0
                    elif not judged <= state.history[0][1] or state.since >= self.options.patience:
                        if state.since >= self.options.patience and state.share == 1:
                            state.since = 0
                        self._go_back(state)
                    state.history.append((state.step, judged))
                    self._save(state)
                if self._goes_on(state) and self.checkpoint.is_over():
                    self._save(state)
                    raise self.checkpoint.stop(state.step, self.options.steps)
            self._put(state.best)
        self.checkpoint.clear()
        after = min(value for _, value in state.history)
        return Tuning(state.history[0][1], after, state.best_step, state.step, tuple(state.history))

    def _goes_on(self, state: _State) -> bool:
        return state.step < self.options.steps and state.since < self.options.patience

    def _all(self) -> dict[str, Tensor]:
        """Return everything that tuning changes."""
        return {**self.values, **(self.updates.codes if self.updates else {})}

    def _copy(self) -> dict[str, Tensor]:
        """Return what is tuned as it would be stored."""
        return {n: p.detach().to(self.stored.get(n, p.dtype)).to(p.dtype, copy=True) for n, p in self._all().items()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self._all().items():
            p.copy_(values[name])

    def _go_back(self, state: _State) -> None:
        """Return to the best step, with nothing accumulated and a smaller learning rate."""
        self._put(state.best)
        for gathered in (state.mean, state.square, *self._gathered().values()):
            gathered.clear()
        state.share, state.began = state.share * BACK, state.step

    def _order(self, step: int) -> int:
        """Return the batch of a step: an order of its own for every pass over the data."""
        turn, at = divmod(step, len(self.batches))
        g = torch.Generator().manual_seed(self.options.seed * 1_000_003 + turn)
        return int(torch.randperm(len(self.batches), generator=g)[at])

    def _compare(self, item: Any) -> Tensor:
        device = next(iter(self.values.values())).device.type
        for restore in self.restore:  # recurrent state would hold on to the graph of the step before
            restore()
        with torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            with torch.no_grad():
                wanted = call(self.base, item)
            output = call(self.model, fitting(item, self.base, self.model))
        if self.loss is None:
            self.loss = LOSSES["kl" if getattr(output, "logits", None) is not None else "mse"]
        if self.loss in LOSSES.values():
            output, wanted = (without_padding(item, _main(x)) for x in (output, wanted))
        return self.loss(output, wanted)

    def _step(self, state: _State, sizes: dict[str, float]) -> float:
        expanded: AbstractContextManager[list[Tensor]] = self.updates.expanded() if self.updates else nullcontext([])
        with expanded as weights:
            loss = self._compare(self.batches[self._order(state.step)])
            gradients = torch.autograd.grad(loss, [*self.values.values(), *weights], allow_unused=True)
        found = dict(zip(self.values, gradients))
        if not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
            return float(loss.detach())  # a batch that overflows changes nothing
        warm = max(1, round(WARM * self.options.steps))
        left = max(0.0, (state.step - warm) / max(1, self.options.steps - warm))
        factor = state.share * min((state.step + 1) / warm, LAST + (1 - LAST) * (1 + math.cos(math.pi * left)) / 2)
        with torch.no_grad():
            for name, g in found.items():
                if g is None:
                    continue
                mean = state.mean.setdefault(name, torch.zeros_like(g)).lerp_(g, 1 - BETAS[0])
                square = state.square.setdefault(name, torch.zeros_like(g)).lerp_(g.square(), 1 - BETAS[1])
                t = state.step + 1 - state.began
                step = mean / (1 - BETAS[0] ** t) / ((square / (1 - BETAS[1] ** t)).sqrt() + EPSILON)
                self.values[name].sub_(step, alpha=self.options.rate * factor * sizes[name])
        if self.updates:
            self.updates.accumulate(gradients[len(self.values) :], factor)
            if (state.step + 1) % EVERY == 0:
                self.updates.update()
        return float(loss.detach())

    @torch.no_grad()
    def _judge(self) -> float:
        """Return the held-out loss at the precision that is stored."""
        exact = {n: p.detach().clone() for n, p in self.values.items()}
        for name, p in self.values.items():
            p.copy_(p.to(self.stored[name]))
        try:
            return sum(float(self._compare(item)) for item in self.judged) / len(self.judged)
        finally:
            for name, value in exact.items():
                self.values[name].copy_(value)

    def _save(self, state: _State) -> None:
        now = {n: p.detach() for n, p in self._all().items()}
        groups = {"now": now, "best": state.best, "mean": state.mean, "square": state.square, **self._gathered()}
        plain = ("step", "best_step", "history", "since", "share", "began")
        self.checkpoint.write({"mark": self.mark, **{name: getattr(state, name) for name in plain}}, groups)

    def _gathered(self) -> dict[str, dict[str, Tensor]]:
        u = self.updates
        return {"pull": u.offsets, "pull_square": u.squares, "pull_steps": u.steps} if u else {}

    def _resume(self) -> _State | None:
        found = self.checkpoint.read(self.mark)
        if found is None:
            return None
        facts, tensors = found
        groups: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "mean": {}, "square": {}, **self._gathered()}
        everything = self._all()
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            alike = name in everything and (
                group not in ("now", "best", "mean", "square") or tensor.shape == everything[name].shape
            )
            if group not in groups or not alike:
                raise TuneError(f"{self.checkpoint.file}: {key} {list(tensor.shape)} is no tensor of this run{ANEW}")
            groups[group][name] = tensor.to(everything[name].device)
        with torch.no_grad():
            for name, value in groups["now"].items():
                everything[name].copy_(value)
        history = [(int(step), float(value)) for step, value in facts["history"]]
        gathered = groups["best"], groups["mean"], groups["square"]
        return _State(
            *gathered, facts["step"], facts["best_step"], history, facts["since"], facts["share"], facts["began"]
        )


@dataclass
class _State:
    best: dict[str, Tensor]
    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    step: int
    best_step: int
    history: list[tuple[int, float]]
    since: int = 0  # evaluations without a new best
    share: float = 1.0  # of the learning rate
    began: int = 0  # the step from which mean and square gather
