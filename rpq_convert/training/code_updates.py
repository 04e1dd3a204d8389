"""Code updates: codes that follow the gradient while codebooks are trained, a few at a time (as in PV-tuning).

A code cannot take a small step. So every weight accumulates its own steps (RMSprop's, on the gradient of the expanded weight) as
an offset from its codeword. Where an offset has grown so long that another codeword is nearer to its end, the code may change, and
what the change gives is taken off the offset. Only the longest offsets change their code at a time (PV-tuning, Malinovskii et al.
2024, arXiv:2405.14852). Codes that change together do not know of each other: 1 % of them at once undo what they gain, where
0.05 % every fourth step take MiniLM at 2 bits from a relative error of 0.206 to 0.183 in 150 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpq_convert.core.rotation import rotate_weight
from rpq_convert.core.spec import CODEWORDS
from rpq_convert.errors import TuneError
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight

RATE = 1e-2  # learning rate of weights, relative to the root mean square of their layer
EVERY = 4  # steps between two code updates
CANDIDATES = 16  # for each code that may change: not every long offset ends nearer to another codeword
MEMORY, EPSILON = 0.95, 1e-12


class CodeUpdates:
    """The offsets that the weights of a model have accumulated, and the code updates that follow from them.

    Products run on expanded weights inside `expanded`, so that these get gradients: a step takes the memory of a dense one, and
    offsets take two float32 numbers for each weight.

    Args:
        model: a converted model.
        share: of a weight's codes that may change at a time.
        every: calls of `step` between two code updates.
        rate: learning rate of weights, relative to the root mean square of their layer; 0.01 by default.

    Raises:
        TuneError: a model without RPQ layers, a share that is not in (0, 1], fewer than 1 call, a rate that is not above 0.

    Example:
        >>> updates = rpq.CodeUpdates(model, share=0.01)
        >>> for x, y in batches:
        ...     optimizer.zero_grad()
        ...     with updates.expanded():
        ...         loss_of(model(x), y).backward()
        ...     optimizer.step()
        ...     updates.step()
    """

    def __init__(self, model: nn.Module, share: float, every: int = EVERY, rate: float | None = None) -> None:
        rate = RATE if rate is None else rate
        if not 0 < share <= 1 or every < 1 or not rate > 0:
            raise TuneError(
                f"share must be above 0 and at most 1, every at least 1 and rate above 0, not {share}, {every} and {rate}"
            )
        self.weights, self.share, self.every, self.rate = coded_weights(model), share, every, rate
        if not self.weights:
            raise TuneError(f"{type(model).__name__} has no RPQ layer; convert it first")
        with torch.no_grad():
            self.sizes = {name: float(rpq().float().square().mean().sqrt()) for name, rpq in self.weights.items()}
        self.offsets: dict[str, Tensor] = {}  # [n, L], as the codes see the weight
        self.squares: dict[str, Tensor] = {}  # running mean of the gradient's square, likewise
        self.steps: dict[str, Tensor] = {}  # how many gradients that is the mean of
        self.calls = 0
        self.seen: list[Tensor] = []  # what `expanded` returned last

    @property
    def codes(self) -> dict[str, Tensor]:
        """The codes as they are now."""
        return {name: rpq.stored_tensor("codes").detach() for name, rpq in self.weights.items()}

    @contextmanager
    def expanded(self) -> Iterator[list[Tensor]]:
        """Let layers multiply by expanded weights, and return those, as long as the block lasts: they get gradients."""
        try:
            for rpq in self.weights.values():
                weight = rpq()
                if weight.requires_grad:
                    weight.retain_grad()
                rpq.caches.keep(weight)
            self.seen = [rpq.caches.expanded for rpq in self.weights.values()]  # type: ignore[misc]
            yield self.seen
        finally:
            for rpq in self.weights.values():
                rpq.caches.drop()

    def step(self, factor: float = 1.0) -> int:
        """Follow the gradients that the last block of `expanded` left; return how many codes changed.

        Args:
            factor: of the learning rate, as a schedule gives it.

        Raises:
            TuneError: no block of `expanded` was left since the last step.
        """
        if not self.seen:
            raise TuneError(
                "run the model and its backward pass inside `with updates.expanded():` before updates.step()"
            )
        self.accumulate([weight.grad for weight in self.seen], factor)
        self.calls += 1
        return self.update() if self.calls % self.every == 0 else 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on: offsets, squares and counts. Codes are the model's."""
        gathered = {"offsets": self.offsets, "squares": self.squares, "steps": self.steps}
        return {"calls": self.calls, "sizes": dict(self.sizes), **{k: dict(v) for k, v in gathered.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            TuneError: it is of another model.
        """
        if state["sizes"].keys() != self.sizes.keys():
            raise TuneError("this state of code updates is of another model: the names of its codes differ")
        self.calls, self.sizes = state["calls"], dict(state["sizes"])
        for name in ("offsets", "squares", "steps"):
            setattr(self, name, {k: v.clone() for k, v in state[name].items()})

    @torch.no_grad()
    def accumulate(self, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Add a step down these gradients of the expanded weights, in the order of `expanded`; `factor` is of the learning rate."""
        self.seen = []  # expanded weights and their gradients are as large as dense ones
        for (name, rpq), gradient in zip(self.weights.items(), gradients, strict=True):
            if gradient is None:
                continue
            g = _coded(rpq, gradient.float())
            offset = self.offsets.setdefault(name, torch.zeros_like(g))
            square = self.squares.setdefault(name, torch.zeros_like(g)).lerp_(g.square(), 1 - MEMORY)
            steps = self.steps.setdefault(name, torch.zeros((), dtype=torch.int64)).add_(1)
            scale = (square / (1 - MEMORY ** int(steps))).sqrt_().add_(EPSILON)
            offset.addcdiv_(g, scale, value=-factor * self.rate * self.sizes[name])

    @torch.no_grad()
    def update(self) -> int:
        """Change the codes of the longest offsets; return how many."""
        return sum(self._update(self.weights[name], offset) for name, offset in self.offsets.items())

    def _update(self, rpq: RPQWeight, offset: Tensor) -> int:
        layout, codes = rpq.layout, rpq.stages_codes()
        tables = rpq.codebooks.float().view(layout.stages, layout.books, CODEWORDS, layout.dim)
        pad = (0, layout.blocks * layout.dim - layout.length)
        length = F.pad(offset.square(), pad).view(layout.n, layout.blocks, layout.dim).sum(-1).flatten()
        limit = math.ceil(self.share * len(length))
        long = length.topk(min(CANDIDATES * limit, len(length))).indices  # sub-vectors, longest offset first
        row, block = long // layout.blocks, long % layout.blocks
        columns = block[:, None] * layout.dim + torch.arange(layout.dim, device=offset.device)
        inside = columns < layout.length
        columns = columns.clamp_max(layout.length - 1)
        scales = rpq.scale_matrix()
        scale = torch.ones((), dtype=torch.float32) if scales is None else scales[row[:, None], columns].float()
        end = torch.where(inside & (scale != 0), offset[row[:, None], columns] / scale, 0.0)  # [sub-vectors, dim]
        book = block * layout.books // layout.blocks
        changed = 0
        for stage in range(layout.stages):
            old = codes[stage][block, row]
            own = tables[stage, book, old.long()]
            new = _nearest(own + end, tables[stage], book)
            some = (new != old).nonzero().flatten()[:limit]
            codes[stage][block[some], row[some]] = new[some]
            end[some] -= tables[stage, book[some], new[some].long()] - own[some]
            changed += len(some)
        kept = torch.where(inside & (scale != 0), end * scale, 0.0)
        offset[row[:, None].expand_as(columns)[inside], columns[inside]] = kept[inside]
        return changed


def coded_weights(model: nn.Module) -> dict[str, RPQWeight]:
    """Return every RPQWeight once, under the name of its codes."""
    found = {id(rpq): rpq for rpq in surgery.layers_of(model).values()}
    return {f"{path}.codes": found[id(m)] for path, m in model.named_modules() if id(m) in found}


def _coded(rpq: RPQWeight, weight: Tensor) -> Tensor:
    """Return a tensor shaped like the weight as the matrix [n, L] that the codes describe."""
    return rpq.view.to_matrix(rotate_weight(weight, rpq.view, rpq.spec.rotation), rpq.spec.axis).contiguous()


def _nearest(points: Tensor, tables: Tensor, book: Tensor) -> Tensor:
    """Return the codes of points [N, dim], each under its book of tables [books, 256, dim]."""
    from rpq_convert.fit.loops.nearest import nearest  # numba: imported on use

    codes = torch.empty(len(points), dtype=torch.uint8, device=points.device)
    for one in book.unique().tolist():
        at = (book == one).nonzero().flatten()
        columns = np.ascontiguousarray(points[at].T.cpu().numpy())
        codes[at] = torch.from_numpy(nearest(columns, None, tables[one].cpu().numpy())).to(codes.device)
    return codes
