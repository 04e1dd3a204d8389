"""Tuning block by block: each block learns to give what the dense one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.encoding.measure import remeasure
from rpq_convert.errors import TuneError
from rpq_convert.inputs.items import prepare
from rpq_convert.layers import surgery
from rpq_convert.layers.precision import fitting, widened
from rpq_convert.running.blocks import Arrival, arrivals, chains, runs_of
from rpq_convert.running.digest import describe
from rpq_convert.running.modes import quiet
from rpq_convert.running.progress import Progress
from rpq_convert.tuning.checkpoint import Checkpoint
from rpq_convert.tuning.options import BlockKeywords, TuneOptions
from rpq_convert.tuning.tune import Tuning, tune_with


@keywords(TuneOptions, without=("loss",))
def tune_blocks(
    model: nn.Module,
    base: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 50,
    seed: int = 0,
    **options: Unpack[BlockKeywords],
) -> dict[str, Tuning]:
    """Tune block after block, each to give what the dense one gives: from what the tuned blocks before it give.

    A step costs one block, not the model, and nothing of the others is kept for its backward pass. What blocks lose together
    it does not see: `tune` afterwards.

    Args:
        model, base, data, steps, seed: as for `tune`, for every block.
        options: others of `tune`, but loss and checkpoint.

    Returns:
        What tuning did, by the path of the block.

    Raises:
        TuneError: as `tune`; a model in which no block's output is the next one's input.

    Example:
        >>> rpq.tune_blocks(model, base, batches); rpq.tune(model, base, batches)
    """
    (asked,) = take({**options, "loss": "mse", "steps": steps, "seed": seed}, TuneOptions)
    return tune_blocks_with(asked, model, base, prepare(data, base, "data"))


def tune_blocks_with(
    options: TuneOptions, model: nn.Module, base: nn.Module, data: Iterable[Any], *, checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> dict[str, Tuning]:  # fmt: skip
    """Tune block after block by options that were made before; all else is as for `tune_blocks`.

    Args:
        checkpoint: a folder, in which every block has a file, and what decides the run besides its model, data and options.
    """
    items = list(data)
    if len(items) < 2:
        raise TuneError("too little data: at least one batch to train on and one to judge on are needed")
    found: dict[str, Tuning] = {}
    kept = checkpoint or Checkpoint()
    of = str(describe(items)["sha256"]) + kept.of if kept.file else ""
    with widened(model, torch.float32), quiet(model) as mine, quiet(base) as its:
        with torch.no_grad():
            known = chains(model, fitting(items[0], base, model))
        if not known:
            raise TuneError(f"{type(model).__name__} has no chain of blocks; use tune alone")
        coded = [path for chain in known for path in chain if surgery.layers_of(model.get_submodule(path))]

        def told(step: int, loss: float) -> None:
            if progress:
                done, total = len(found) * options.steps + step, len(coded) * options.steps
                progress(f"block {len(found) + 1} of {len(coded)}: loss {loss:.4g}", done, total)

        for chain in known:
            with torch.no_grad():
                wanted = arrivals(base, chain, runs_of(base, items, its))
                samples = arrivals(model, chain, runs_of(model, [fitting(i, base, model) for i in items], mine), wanted)
            for path in chain:
                block, dense = model.get_submodule(path), base.get_submodule(path)
                _advance(wanted, path, dense, its)
                if path in coded:
                    numbers = [(torch.tensor(i),) for i in range(len(items))]
                    mine_alone = _Block(block, path, samples), _Recorded(wanted), numbers
                    part = kept.part(f"block-{len(found):04d}.safetensors", f"{of} {path}")
                    found[path] = tune_with(options, *mine_alone, checkpoint=part, progress=told)
                _advance(samples, path, block, mine)
        remeasure(model, base)
    return found


@torch.no_grad()
def _advance(samples: list[Arrival], path: str, block: nn.Module, restore: Callable[[], None]) -> None:
    for sample in samples:
        restore()
        sample.hidden = sample.run(path, block)


class _Block(nn.Module):
    """One block on the sample of a number."""

    def __init__(self, block: nn.Module, path: str, samples: list[Arrival]) -> None:
        super().__init__()
        self.block, self.path, self.samples = block, path, samples

    def forward(self, number: Tensor) -> Tensor:
        return self.samples[int(number)].run(self.path, self.block)


class _Recorded(nn.Module):
    """What the dense block gave for the sample of a number."""

    def __init__(self, samples: list[Arrival]) -> None:
        super().__init__()
        self.samples = samples

    def forward(self, number: Tensor) -> Tensor:
        return self.samples[int(number)].hidden
