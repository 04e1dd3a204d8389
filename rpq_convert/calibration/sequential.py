"""Calibration: layers are fitted one after another, each to the inputs that the layers converted before it give.

Weight error says little of quality, and statistics of the dense model's inputs mislead (docs/architecture.md), so the walk
is sequential: run the inputs up to a group of weights that multiply one tensor, sum `x x^T` over it, fit those weights with
error feedback (`fit/feedback.py`), put them in, go on. Blocks whose output is the next one's input (the layers of a
transformer, the stages of a convnet) are run one at a time from kept hidden states, so the whole costs a few forward
passes; whatever is not such a chain is run from the model's start.

Beside each block runs its dense twin, from the dense model's hidden states: what it multiplies shows how far the inputs
have drifted, and encode.py makes up for half of that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.calibration.moments import Moments
from rpq_convert.core.results import Statistics
from rpq_convert.errors import CalibrationError
from rpq_convert.layers import surgery
from rpq_convert.planning.plan import Job
from rpq_convert.running.blocks import Arrival, Run, Stop, arrivals, arriving, chains, inside
from rpq_convert.running.call import call, counted
from rpq_convert.running.modes import quiet
from rpq_convert.running.weight_reads import Reading, Watch

Fit = Callable[[Mapping[str, Statistics | None]], None]  # fits jobs, by name, and puts them in
See = Callable[[str, Reading, int], None]
KEPT = 1 << 30  # bytes of what dense blocks multiply that are kept rather than made again for every group of weights


@dataclass
class _Twin:
    """A block as it was before anything in it was converted, and the dense model's samples before it.

    `seen` is, by sample, what its weights multiply, by name, and its output; empty where that is too much to keep.
    """

    path: str
    block: nn.Module
    samples: list[Arrival]
    seen: list[tuple[dict[str, Reading], Tensor]] = field(default_factory=list)

    def run(self, number: int) -> Tensor:
        """Return the block's output on the sample of this number."""
        return self.seen[number][1] if self.seen else self.samples[number].run(self.path, self.block)


@dataclass
class _Trace:
    """What one forward pass showed."""

    groups: list[list[str]] = field(default_factory=list)  # jobs that multiply one tensor, in order of use
    calls: dict[str, int] = field(default_factory=dict)


def calibrate(model: nn.Module, jobs: Sequence[Job], data: Sequence[Any], fit: Fit) -> None:
    """Fit every job, in the order of execution.

    Args:
        model: in memory; `fit` changes it as the walk goes on.
        data: inputs, each a tensor, a tuple of arguments, or a dict of keyword arguments.
        fit: called with job names and their statistics: None for what no operation was seen to multiply by.

    Raises:
        CalibrationError: no data, or none of the jobs' weights was multiplied by anything.
    """
    if len(data) == 0:
        raise CalibrationError("the calibration data is empty; give some texts, images or other inputs")
    with quiet(model), torch.no_grad():
        _Walk(model, jobs, data, fit).run()


class _Walk:
    def __init__(self, model: nn.Module, jobs: Sequence[Job], data: Sequence[Any], fit: Fit) -> None:
        self.model, self.fit = model, fit
        self.items = data
        self.jobs = {job.name: job for job in jobs if not job.is_random}
        self.random = [job.name for job in jobs if job.is_random]
        self.trace, self.chains = self._trace()
        self.dense: dict[str, list[Arrival]] = {}  # what the dense model's runs bring to chains, by first block

    def run(self) -> None:
        groups = self.trace.groups
        if self.jobs and not groups:
            raise CalibrationError(
                f"no converted weight of {type(self.model).__name__} was multiplied by anything when it ran on the data"
            )
        first = [n for n in self.jobs if not any(n in g for g in groups)]
        tied = [n for n in first if n in self.trace.calls]  # tables that are looked up first and multiplied at the end
        known = self._survey(tied)
        self._fit({name: known.get(name) for name in (*self.random, *first)})
        done: set[str] = set()
        for group in groups:
            if group[0] in done:
                continue
            chain = next((c for c in self.chains if inside(group[0], c)), None)
            if chain is None:
                self._fit_group(group, self._passes())
                done.update(group)
            else:
                own = [g for g in groups if inside(g[0], chain)]
                self._run_chain(chain, own)
                done.update(n for g in own for n in g)

    def _survey(self, tied: Sequence[str]) -> dict[str, Moments]:
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
        return [partial(call, self.model, item) for item in self.items]

    def _watch(self, names: Iterable[str], see: See, twin: _Twin | None = None) -> Watch:
        weights: dict[str, tuple[Tensor, Sequence[str]]] = {}
        for name in names:
            path, root = (name, self.model) if twin is None else (name.removeprefix(twin.path + "."), twin.block)
            module, parameter = surgery.find(root, path)
            weights[name] = module._parameters[parameter], self.jobs[name].weight_view.axes  # type: ignore[assignment]
        return Watch(weights, see)

    def _measure(
        self, names: Sequence[str], runs: Sequence[Run], once: bool, twin: _Twin | None = None
    ) -> dict[str, Moments]:
        """Run every item, adding up what these weights are multiplied by; no further than that where it is `once` each."""
        moments = {name: Moments() for name in names}
        for i, (item, run) in enumerate(zip(self.items, runs, strict=True)):
            dense, left = self._reading(names[0], twin, i) if twin else None, set(names)

            def see(
                name: str,
                reading: Reading,
                part: int,
                item: Any = item,
                dense: Reading | None = dense,
                left: set[str] = left,
            ) -> None:
                if reading.input is None:
                    return
                rows = counted(item, reading.input)
                others = iter(()) if dense is None else dense.vectors()
                for offset, x in reading.vectors():
                    keep = slice(None) if rows is None or len(rows) != len(x) else rows
                    moments[name].add(x[keep], part + offset)
                    if other := next(others, None):
                        moments[name].meet(other[1][keep], x[keep])
                left.discard(name)
                if once and not left:
                    raise Stop

            with suppress(Stop), self._watch(names, see):
                run()
        return moments

    def _look(self, twin: _Twin, names: Sequence[str]) -> None:
        """Run a dense block on all samples, keeping what these weights multiply, unless it is too much or may be written over."""
        for sample in twin.samples:
            found: dict[str, tuple[Reading, Tensor, int | None]] = {}  # with its input and that one's version

            def see(name: str, reading: Reading, part: int, found: Any = found) -> None:
                if (x := reading.input) is not None:
                    found[name] = reading, x, None if x.is_inference() else x._version  # those do not count versions

            with self._watch(names, see, twin):
                output = sample.run(twin.path, twin.block)
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

        with suppress(Stop), self._watch([name], see, twin):
            twin.run(number)
        return found[0] if found else None

    def _fit_group(self, group: list[str], runs: Sequence[Run], twin: _Twin | None = None) -> None:
        first = group[0]
        once, parts = self.trace.calls[first] == 1, "expert" in self.jobs[first].weight_view.axes
        found = self._measure([first], runs, once, twin if once and not parts else None)
        self._fit(dict.fromkeys(group, found[first]))

    def _fit(self, found: Mapping[str, Moments | None]) -> None:
        def statistics(name: str, moments: Moments | None) -> Statistics | None:
            if moments is None:
                return None
            axes, shape = self.jobs[name].weight_view.axes, self.jobs[name].shape
            parts = shape[axes.index("expert")] if "expert" in axes else max(moments.parts, default=0) + 1
            matrix = moments.matrix(parts)
            return None if matrix is None else Statistics(matrix, moments.rows, moments.cross if parts == 1 else None)

        if found:
            self.fit({name: statistics(name, moments) for name, moments in found.items()})

    def _trace(self) -> tuple[_Trace, list[list[str]]]:
        """Run one item, and see what multiplies what, in which order, and the chains of blocks."""
        trace = _Trace()
        inputs: dict[str, list[Tensor]] = {}  # kept, so that identities stay their own

        def see(name: str, reading: Reading, part: int) -> None:
            if reading.input is None:
                lookups.add(name)
            else:
                inputs.setdefault(name, []).append(reading.input)

        lookups: set[str] = set()
        with self._watch(self.jobs, see):
            found = chains(self.model, self.items[0])
        readers: dict[int, list[str]] = {}
        for name, tensors in inputs.items():
            trace.calls[name] = len(tensors)
            if name in lookups:
                continue
            group = readers.get(id(tensors[0])) if len(tensors) == 1 else None
            if group is None:
                trace.groups.append(group := [])
                if len(tensors) == 1:
                    readers[id(tensors[0])] = group
            group.append(name)
        return trace, found

    def _run_chain(self, blocks: list[str], groups: list[list[str]]) -> None:
        """Fit what is inside a chain of blocks, from kept hidden states."""
        dense = self.dense.pop(blocks[0])
        samples = arrivals(self.model, blocks, self._passes(), dense)
        for path in blocks:
            block = self.model.get_submodule(path)
            twin = _Twin(path, copy.deepcopy(block), dense)
            own = [group for group in groups if inside(group[0], [path])]
            self._look(twin, [group[0] for group in own])
            for group in own:
                self._fit_group(group, [partial(sample.run, path, block) for sample in samples], twin)
            for sample in samples:
                sample.hidden = sample.run(path, block)
            for number, sample in enumerate(dense):
                sample.hidden = twin.run(number)
