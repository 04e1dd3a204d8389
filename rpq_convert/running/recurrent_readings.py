"""Readings of recurrent layers: one operation of torch runs all layers, directions and steps, and reads all of their weights.

What a weight multiplies is inside: the output of the layer below, the hidden state of the step before. `_Call` runs the layers one
at a time to make it, with torch's own operation, and only for the weights that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.running.readings import Reading, _linear

AXES = ("out", "in")


class _Call:
    """One call of a recurrent operation, its steps one after another: rows [all steps of all sequences, features].

    Args:
        operation: `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`.
        data: rows, step by step. sizes: sequences that reach each step, never growing.
        state: what steps begin from: (hidden state, …), each [layers * directions, sequences, features].
        weights: of each layer and direction, in torch's order.
    """

    def __init__(
        self, operation: Any, data: Tensor, sizes: Tensor, state: Sequence[Tensor], weights: list[list[Tensor]],
        has_biases: bool, directions: int,
    ) -> None:  # fmt: skip
        self.operation, self.data, self.sizes, self.state, self.weights = operation, data, sizes, state, weights
        self.has_biases, self.directions = has_biases, directions
        self.outputs: dict[int, Tensor] = {}  # by layer and direction

    @cached_property
    def steps(self) -> list[int]:
        return self.sizes.tolist()

    @cached_property
    def backwards(self) -> Tensor:
        """Return for every row the one that takes its place where sequences run backwards; its own inverse."""
        sizes = self.sizes
        begins = sizes.cumsum(0) - sizes
        step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        sequence = torch.arange(int(sizes.sum())) - begins[step]
        lengths = (sizes[:, None] > torch.arange(int(sizes[0]))).sum(0)
        return (begins[lengths[sequence] - 1 - step] + sequence).to(self.data.device)

    def turned(self, rows: Tensor, place: int) -> Tensor:
        """Return rows in the order in which this direction runs, or back from it."""
        return rows[self.backwards] if place % self.directions else rows

    def inputs(self, place: int) -> Tensor:
        """Return what a layer is given, in the order of the sequences."""
        layer = place // self.directions
        if layer == 0:
            return self.data
        below = range((layer - 1) * self.directions, layer * self.directions)
        return torch.cat([self.output(p) for p in below], -1)

    def output(self, place: int) -> Tensor:
        if place not in self.outputs:
            begin = [s[place : place + 1].contiguous() for s in self.state]
            rows = self.turned(self.inputs(place), place)
            rest = (self.weights[place], self.has_biases, 1, 0.0, False, False)
            found = self.operation(rows, self.sizes, begin if len(begin) > 1 else begin[0], *rest)[0]
            self.outputs[place] = self.turned(found, place)
        return self.outputs[place]

    def before(self, place: int) -> Tensor:
        """Return the hidden state that each step begins from, in the order in which the direction runs."""
        parts = [self.state[0][place, : self.steps[0]]]
        previous = self.turned(self.output(place), place).split(self.steps)
        parts += [rows[:size] for rows, size in zip(previous, self.steps[1:])]
        return torch.cat(parts)

    def hidden(self, place: int) -> Tensor:
        return self.turned(self.before(place), place)

    def unprojected(self, place: int) -> Tensor:
        """Return an LSTM's hidden state before its projection."""
        w_ih, w_hh, *biases = self.weights[place][:-1]
        b_ih, b_hh = biases or (None, None)
        gates = F.linear(self.turned(self.inputs(place), place), w_ih, b_ih)
        gates = gates + F.linear(self.before(place), w_hh, b_hh)
        cell, found = self.state[1][place], []
        for rows in gates.split(self.steps):
            i, f, g, o = rows.chunk(4, -1)
            cell = f.sigmoid() * cell[: len(rows)] + i.sigmoid() * g.tanh()
            found.append(o.sigmoid() * cell.tanh())
        return self.turned(torch.cat(found), place)


def _layers(operation: Any, states: int, *args: Any) -> list[Reading]:
    """Read a whole recurrent layer: of padded sequences (input, state, weights, …) or packed ones (data, sizes, state, …)."""
    packed = isinstance(args[3], (tuple, list))
    input, sizes, state, flat, has_biases, layers, _, _, both = args[:9] if packed else (args[0], None, *args[1:8])
    batch_first = not packed and args[8]
    data = input
    if sizes is None:
        steps = input.transpose(0, 1) if batch_first else input  # [steps, sequences, features]
        data, sizes = steps.flatten(0, 1), torch.full((steps.shape[0],), steps.shape[1])
    directions = 2 if both else 1
    each = len(flat) // (layers * directions)
    weights = [list(flat[i : i + each]) for i in range(0, len(flat), each)]
    begin = [state] if isinstance(state, Tensor) else list(state)
    done = _Call(operation, data, sizes, begin, weights, has_biases, directions)

    def vectors(make: Callable[[], Tensor]) -> Any:
        rows = make()
        if batch_first:
            rows = rows.view(input.shape[1], input.shape[0], -1).transpose(0, 1).flatten(0, 1)
        return iter([(0, rows)])

    found = []
    for place, own in enumerate(weights):
        kinds: list[tuple[Tensor, Callable[[], Tensor], Any]] = []
        kinds.append((own[0], partial(done.inputs, place), (done, place // directions)))
        kinds.append((own[1], partial(done.hidden, place), (done, place, "hidden")))
        if each in (3, 5):
            kinds.append((own[-1], partial(done.unprojected, place), (done, place, "unprojected")))
        found += [Reading(weight, AXES, input, partial(vectors, make), source) for weight, make, source in kinds]
    return found


def _cell(input: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, *biases: Any) -> list[Reading]:
    hidden = state if isinstance(state, Tensor) else state[0]
    return [*_linear(input, w_ih), *_linear(hidden, w_hh)]


READERS: dict[Any, Callable[..., list[Reading]]] = {
    torch.lstm: partial(_layers, torch.lstm, 2),
    **{f: partial(_layers, f, 1) for f in (torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
}
