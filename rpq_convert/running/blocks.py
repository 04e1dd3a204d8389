"""Blocks: the layers of a transformer or the stages of a convnet, each of which takes the output of the one before.

Such a chain is found by watching, not by names: the members of a `ModuleList` or a `Sequential` that ran once each, in order, the
output of one being the very tensor that the next was given. Its blocks can then be run one at a time from kept hidden states
(calibration, tuning block by block), and what is inside them recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from rpq_convert.running.call import call, first_tensor

Run = Callable[[], Any]


class Stop(Exception):
    """Raised inside a forward pass that has shown what it was run for."""


@dataclass
class Arrival:
    """What one sample brings to a chain: the first block's input, and every block's other arguments."""

    hidden: Tensor
    rest: dict[str, tuple[tuple[Any, ...], Mapping[str, Any]]]

    def run(self, path: str, block: nn.Module) -> Tensor:
        """Return a block's output on the hidden state."""
        args, kwargs = self.rest[path]
        output = first_tensor(block(self.hidden.clone(), *args, **kwargs))  # some blocks write to their input
        assert output is not None  # `chains` saw one
        return output


def lists(model: nn.Module) -> dict[str, list[str]]:
    """Return the paths of all lists of modules, each with its members'."""
    return {
        path: [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    }


def inside(path: str, blocks: Sequence[str]) -> bool:
    return any(path == b or path.startswith(b + ".") for b in blocks)


def chains(model: nn.Module, item: Any) -> list[list[str]]:
    """Run a model on one input and return its outermost chains, as paths of blocks."""
    known = lists(model)
    flow: dict[str, list[tuple[Any, Any]]] = {}  # block -> (input, output) of every call
    with ExitStack() as stack:
        for block in {b for blocks in known.values() for b in blocks}:

            def flows(module: nn.Module, args: Any, output: Any, block: str = block) -> None:
                flow.setdefault(block, []).append((args[0] if args else None, first_tensor(output)))

            stack.callback(model.get_submodule(block).register_forward_hook(flows).remove)
        call(model, item)
    found: list[list[str]] = []
    for path, blocks in known.items():
        runs = [flow.get(b, []) for b in blocks]
        if any(len(r) != 1 for r in runs) or any(inside(path, outer) for outer in found):
            continue
        if all(a[0][1] is b[0][0] for a, b in pairwise(runs)) and isinstance(runs[0][0][0], Tensor):
            found.append(blocks)
    return found


def runs_of(model: nn.Module, items: Sequence[Any], restore: Callable[[], None]) -> list[Run]:
    """Return a run of a model on every item, each from the state that the model was given in."""

    def run(item: Any) -> Any:
        restore()
        return call(model, item)

    return [partial(run, item) for item in items]


@contextmanager
def arriving(model: nn.Module, blocks: Sequence[str], stop: str | None = None) -> Iterator[list[Arrival]]:
    """Note what every run of a model brings to a chain, as long as the block lasts; `Stop` is raised before the block `stop`."""
    found: list[Arrival] = []
    with ExitStack() as stack:
        for block in blocks:

            def keep(module: nn.Module, args: Any, kwargs: Any, block: str = block) -> None:
                if block == blocks[0]:
                    found.append(Arrival(args[0].clone(), {}))
                found[-1].rest[block] = args[1:], dict(kwargs)
                if block == stop:
                    raise Stop

            stack.callback(model.get_submodule(block).register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield found


def arrivals(
    model: nn.Module, blocks: Sequence[str], runs: Sequence[Run], like: Sequence[Arrival] | None = None
) -> list[Arrival]:
    """Run every sample up to the last block of a chain, and return what arrives at it.

    Args:
        like: what the same samples brought in the model that this one was made from. Where the first sample brings the same
            arguments again (masks, positions), the others' are taken from there, and run to the first block only.
    """
    found: list[Arrival] = []
    known: Sequence[Arrival] = ()
    for number, run in enumerate(runs):
        with arriving(model, blocks, blocks[0 if known else -1]) as one, suppress(Stop):
            run()
        if known:
            one[0].rest = known[number].rest
        found += one
        if number == 0 and like and _same(found[0].rest, like[0].rest):
            known = like
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two trees of arguments hold the same values; objects of other kinds must be the very same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all()))
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


def _called(block: nn.Module) -> Iterator[nn.Module]:
    """Yield a block; where it is a bare list (vit-pytorch's pairs of attention and feed-forward), whose forward nobody calls, its members."""
    if type(block).forward is nn.Module.forward:
        for member in block.children():
            yield from _called(member)
    else:
        yield block


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Let blocks keep only their input for the backward pass, and run once more in it, as long as the block lasts."""
    from torch.utils.checkpoint import checkpoint

    known = lists(model)
    outer = [
        b for path, blocks in known.items() if not any(inside(path, other) for other in known.values()) for b in blocks
    ]
    changed = [m for path in outer for m in _called(model.get_submodule(path))]
    try:
        for module in changed:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)
