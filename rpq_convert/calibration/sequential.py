"""Calibration: layers are fitted one after another, each to the inputs that the layers converted before it give.

Weight error says little of quality, and statistics of the dense model's inputs mislead (docs/architecture.md), so the walk
is sequential. It runs the inputs up to a group of weights that multiply the same vectors, sums `x x^T` over it, and yields the group
with this Hessian. The caller fits these weights with GPTQ error compensation (`fit/gptq.py`), installs them, and asks for the
next group. Blocks whose output is the next one's input (the layers of a transformer, the stages of a convnet) are run one at a
time from kept hidden states, so the whole costs a few forward passes. Everything else is run from the model's start.

A dense twin of each block runs beside it, on the dense model's hidden states. What the twin multiplies shows how far the inputs
have drifted (asymmetric calibration, in `encoding/encode.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.calibration.hessian import Hessian
from rpq_convert.core.results import Statistics
from rpq_convert.errors import CalibrationError
from rpq_convert.layers import surgery
from rpq_convert.planning.plan import Job
from rpq_convert.running.blocks import Arrival, Run, Stop, arrivals, arriving, chains, inside, runs_of
from rpq_convert.running.call import counted
from rpq_convert.running.modes import quiet
from rpq_convert.running.readings import Reading
from rpq_convert.running.state import State
from rpq_convert.running.weight_reads import Watch

Group = tuple[list[Job], dict[str, Statistics | None]]
See = Callable[[str, Reading, int], None]
KEPT = 1 << 30  # bytes of what dense blocks multiply that are kept rather than made again for every group of weights


def walk(
    model: nn.Module, jobs: Sequence[Job], data: Sequence[Any], done: Callable[[Job], bool] = lambda job: False
) -> Generator[Group, None, None]:
    """Yield all jobs in the order of execution, in groups, each with the statistics of what its weights multiply.

    The caller installs a group before it asks for the next, whose inputs depend on it. It closes the iterator when it leaves
    early, and drops a group's statistics before it asks for the next, or the Hessians of two groups are in memory.

    Args:
        model: in memory. Until the iterator ends it is in evaluation mode, without a cache of keys and values.
        data: inputs, each a tensor, a tuple of arguments, or a dict of keyword arguments.
        done: whether an earlier run has fitted a weight. Groups of such are not measured again.

    Yields:
        Jobs, and their statistics by name: None for a weight that no operation multiplied anything by, or whose group is done.

    Raises:
        CalibrationError: no data, or none of the jobs' weights was multiplied by anything.

    Example:
        >>> with closing(walk(model, jobs, data)) as groups:
        ...     for group, statistics in groups:
        ...         install(encode(group, statistics))
        ...         del statistics
    """
    if len(data) == 0:
        raise CalibrationError("the calibration data is empty; give some texts, images or other inputs")
    with quiet(model) as restore:
        yield from _Walk(model, jobs, data, restore, done).groups()


@dataclass
class _Twin:
    """A block as it was before anything in it was converted, and the dense model's samples before it.

    `weights` are those of its jobs, by name. `seen` is, by sample, what they multiply, by name, and the block's output; empty
    where that is too much to keep.
    """

    path: str
    block: nn.Module
    weights: Mapping[str, Tensor]
    samples: list[Arrival]
    state: State
    seen: list[tuple[dict[str, Reading], Tensor]] = field(default_factory=list)

    def output(self, number: int) -> Tensor:
        """Return the block's output on the sample of this number, from the state that it came with."""
        return self.seen[number][1] if self.seen else self.run(self.samples[number])

    def run(self, sample: Arrival) -> Tensor:
        self.state.restore()
        return sample.run(self.path, self.block)


@dataclass
class _Trace:
    """What one forward pass showed."""

    groups: list[list[str]] = field(default_factory=list)  # jobs that multiply the same vectors, in order of use
    calls: dict[str, int] = field(default_factory=dict)


def _weights(root: nn.Module, paths: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the dense parameters under these paths, by the names that the paths stand for."""
    found = {name: surgery.find(root, path) for name, path in paths.items()}
    return {name: module._parameters[parameter] for name, (module, parameter) in found.items()}  # type: ignore[misc]


class _Walk:
    def __init__(
        self, model: nn.Module, jobs: Sequence[Job], data: Sequence[Any], restore: Callable[[], None], done: Callable[[Job], bool]
    ) -> None:  # fmt: skip
        self.model, self.items, self.restore, self.done = model, data, restore, done
        self.all = {job.name: job for job in jobs}
        self.jobs = {job.name: job for job in jobs if not job.is_random}
        self.weights = _weights(model, {name: name for name in self.jobs})
        self.trace, self.chains = self._trace()
        self.dense: dict[str, list[Arrival]] = {}  # what the dense model's runs bring to chains, by first block

    def groups(self) -> Iterator[Group]:
        groups = self.trace.groups
        if self.jobs and not groups:
            raise CalibrationError(
                f"no converted weight of {type(self.model).__name__} was multiplied by anything when it ran on the data; "
                "convert it without data"
            )
        first = [n for n in self.jobs if not any(n in g for g in groups)]
        tied = [
            n for n in first if n in self.trace.calls and not self.done(self.all[n])
        ]  # tables that are looked up first and multiplied at the end
        known = self._survey(tied)
        if names := [*(n for n in self.all if n not in self.jobs), *first]:
            yield self._group(names, {name: known.get(name) for name in names})
        del known
        done: set[str] = set()
        for group in groups:
            if group[0] in done:
                continue
            chain = next((c for c in self.chains if inside(group[0], c)), None)
            own = [group] if chain is None else [g for g in groups if inside(g[0], chain)]
            yield from self._measured(group, self._passes()) if chain is None else self._run_chain(chain, own)
            done.update(n for g in own for n in g)

    @torch.no_grad()
    def _survey(self, tied: Sequence[str]) -> dict[str, Hessian]:
        """Run the dense model: note what arrives at its chains, and measure these tables in the same runs."""
        with ExitStack() as stack:
            found = {chain[0]: stack.enter_context(arriving(self.model, chain)) for chain in self.chains if tied}
            once = all(self.trace.calls[n] == 1 for n in tied)
            known = self._measure(tied, self._passes(), once) if tied else {}
        for chain in self.chains:
            samples = found.get(chain[0], [])
            whole = len(samples) == len(self.items) and all(set(s.rest) == set(chain) for s in samples)
            self.dense[chain[0]] = samples if whole else arrivals(self.model, chain, self._passes())
        return known

    def _passes(self) -> list[Run]:
        return runs_of(self.model, self.items, self.restore)

    def _watch(self, weights: Mapping[str, Tensor], see: See) -> Watch:
        return Watch({name: (weight, self.jobs[name].weight_view.axes) for name, weight in weights.items()}, see)

    def _measured(self, group: list[str], runs: Sequence[Run], twin: _Twin | None = None) -> Iterator[Group]:
        """Yield a group of weights that multiply the same vectors, with its statistics."""
        first = group[0]
        if all(self.done(self.all[name]) for name in group):
            yield self._group(group, dict.fromkeys(group))
            return
        once, parts = self.trace.calls[first] == 1, "expert" in self.jobs[first].weight_view.axes
        found = self._measure([first], runs, once, twin if once and not parts else None)
        yield self._group(group, dict.fromkeys(group, found[first]))

    def _group(self, names: Sequence[str], found: Mapping[str, Hessian | None]) -> Group:
        def statistics(name: str, hessian: Hessian | None) -> Statistics | None:
            if hessian is None:
                return None
            axes, shape = self.jobs[name].weight_view.axes, self.jobs[name].shape
            parts = shape[axes.index("expert")] if "expert" in axes else max(hessian.parts, default=0) + 1
            matrix = hessian.matrix(parts)
            return None if matrix is None else Statistics(matrix, hessian.rows, hessian.cross if parts == 1 else None)

        return [self.all[name] for name in names], {name: statistics(name, found[name]) for name in names}

    @torch.no_grad()
    def _measure(
        self, names: Sequence[str], runs: Sequence[Run], once: bool, twin: _Twin | None = None
    ) -> dict[str, Hessian]:
        """Run every item, adding up what these weights multiply; no further than that where each is read `once`."""
        found = {name: Hessian() for name in names}
        for number, run in enumerate(runs):
            self._add_run(found, number, run, once, self._reading(names[0], twin, number) if twin else None)
        return found

    def _add_run(self, found: Mapping[str, Hessian], number: int, run: Run, once: bool, dense: Reading | None) -> None:
        """Run one item, adding up what these weights multiply, and the cross-moment with what the dense one multiplies."""
        item, left = self.items[number], set(found)

        def see(name: str, reading: Reading, part: int) -> None:
            if reading.input is None:
                return
            rows = counted(item, reading.input)
            others = iter(()) if dense is None else dense.vectors()
            for offset, x in reading.vectors():
                keep = slice(None) if rows is None or len(rows) != len(x) else rows
                found[name].add(x[keep], part + offset)
                if other := next(others, None):
                    found[name].add_cross(other[1][keep], x[keep])
            left.discard(name)
            if once and not left:
                raise Stop

        with suppress(Stop), self._watch({name: self.weights[name] for name in found}, see):
            run()

    def _look(self, twin: _Twin) -> None:
        """Run a dense block on all samples, keeping what its weights multiply, unless it is too much or may be written over."""
        for sample in twin.samples:
            found: dict[str, tuple[Reading, Tensor, int | None]] = {}  # with its input and that one's version

            def see(name: str, reading: Reading, part: int, found: Any = found) -> None:
                if (x := reading.input) is not None:
                    found[name] = reading, x, None if x.is_inference() else x._version  # those do not count versions

            with self._watch(twin.weights, see):
                output = twin.run(sample)
            size = output.nbytes + sum(x.nbytes for _, x, _ in found.values())
            kept = size * len(twin.samples) <= KEPT
            if not kept or any(version is None or x._version != version for _, x, version in found.values()):
                twin.seen.clear()
                return
            twin.seen.append(({name: reading for name, (reading, _, _) in found.items()}, output))

    def _reading(self, name: str, twin: _Twin, number: int) -> Reading | None:
        """Return what the dense model multiplies by a weight that it reads once, on the item of this number."""
        if twin.seen:
            return twin.seen[number][0].get(name)
        found: list[Reading] = []

        def see(name: str, reading: Reading, part: int) -> None:
            found.append(reading)
            raise Stop

        with suppress(Stop), self._watch({name: twin.weights[name]}, see):
            twin.run(twin.samples[number])
        return found[0] if found else None

    @torch.no_grad()
    def _trace(self) -> tuple[_Trace, list[list[str]]]:
        """Run one item, and see what multiplies what, in which order, and the chains of blocks."""
        trace = _Trace()
        found: dict[str, list[Reading]] = {}  # kept, so that identities stay their own

        def see(name: str, reading: Reading, part: int) -> None:
            if reading.input is None:
                lookups.add(name)
            else:
                found.setdefault(name, []).append(reading)

        lookups: set[str] = set()
        with self._watch(self.weights, see):
            blocks = chains(self.model, self.items[0])
        readers: dict[Hashable, list[str]] = {}
        for name, readings in found.items():
            trace.calls[name] = len(readings)
            if name in lookups:
                continue
            group = readers.get(readings[0].source) if len(readings) == 1 else None
            if group is None:
                trace.groups.append(group := [])
                if len(readings) == 1:
                    readers[readings[0].source] = group
            group.append(name)
        return trace, blocks

    def _run_chain(self, blocks: list[str], groups: list[list[str]]) -> Iterator[Group]:
        """Yield what is inside a chain of blocks, measured from kept hidden states."""
        dense = self.dense.pop(blocks[0])
        with torch.no_grad():
            samples = arrivals(self.model, blocks, self._passes(), dense)
        for path in blocks:
            block = self.model.get_submodule(path)
            own = [group for group in groups if inside(group[0], [path])]
            self.restore()
            twin = self._twin(path, block, dense, own)
            state = State(block)

            def run(sample: Arrival, path: str = path, block: nn.Module = block, state: State = state) -> Tensor:
                state.restore()
                return sample.run(path, block)

            for group in own:
                yield from self._measured(group, [partial(run, sample) for sample in samples], twin)
            with torch.no_grad():
                for sample in samples:
                    sample.hidden = run(sample)
                for number, sample in enumerate(dense):
                    sample.hidden = twin.output(number)

    @torch.no_grad()
    def _twin(self, path: str, block: nn.Module, samples: list[Arrival], groups: Sequence[Sequence[str]]) -> _Twin:
        """Return a block's dense twin, before anything in the block is converted; it runs on all samples."""
        dense = copy.deepcopy(block)
        firsts = {group[0]: group[0].removeprefix(path + ".") for group in groups}
        twin = _Twin(path, dense, _weights(dense, firsts), samples, State(dense))
        self._look(twin)
        return twin
