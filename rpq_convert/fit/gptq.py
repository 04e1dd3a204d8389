"""Error feedback: codes chosen one input position at a time, each position making up for the errors of those before.

With the second moments `H = sum x x^T` of a layer's inputs, what a conversion costs is `tr((W - W') H (W - W')^T)`, not
the error of the weights. As in GPTQ (Frantar et al. 2022; Hassibi and Stork 1992) inputs are taken in order of falling
power; when one is coded, the error that is left is spread over the inputs that are not, by the inverse of their `H`. Cut
along the outputs, the sub-vectors of a step share one input, so the nearest codeword is the exact optimum of the step.
Cut along the inputs, a step takes `dim` inputs at once, weighted by what each alone would cost.

Codebooks are fitted first, weighted by the power of the inputs; then they move to the means of what each codeword was
asked to stand for, and the codes are chosen again (ROUNDS).
"""

from __future__ import annotations

import numpy as np
import torch

from rpq_convert.fit.additive import BEAM, fit_additive
from rpq_convert.fit.loops.beam import encode_sum
from rpq_convert.fit.loops.gptq import code_inputs, code_outputs
from rpq_convert.fit.loops.kmeans import accumulate
from rpq_convert.fit.loops.nearest import CODEWORDS, SIDE, nearest
from rpq_convert.fit.result import Fitted, count_dead

DAMP = 0.01  # of the mean power, added to every input's: what few samples say nothing about stays as it is
LAZY = 128  # inputs whose errors are passed on to all the later ones in one product
WIDE = 4096  # outputs whose errors are measured at a time
NOTHING = np.empty((0, CODEWORDS, 1))
ROUNDS = 1  # of codes after the first that start from moved codebooks


def fit_feedback(
    matrix: torch.Tensor,
    hessian: torch.Tensor,
    *,
    axis: str,
    dim: int,
    books: int,
    stages: int,
    seed: int,
    codebook_dtype: torch.dtype = torch.float32,
    scales: torch.Tensor | None = None,
    rounds: int = ROUNDS,
    start: Fitted | None = None,
) -> Fitted:
    """Fit codebooks and codes so that the error of the layer's output on its calibration inputs is small.

    Args:
        matrix: [n, L], each output already divided by its scale; n are inputs with axis `out`, L with axis `in`.
        hessian: [inputs, inputs], `sum x x^T` over the layer's inputs; or [parts, inputs, inputs] where the matrix is that
            many equal runs of rows, each with inputs of its own (experts, groups of a convolution).
        scales: one per output, or None for ones: what an error in that output is multiplied by.
        rounds: how many times codebooks move and codes are chosen again; the best round is kept, or the
            nearest codewords without feedback, by calibrated error.
        start: an earlier fit, to start from; its codes are then what must be beaten.

    Raises:
        ValueError: as `fit_additive`; a Hessian of another size, not finite, or with a negative diagonal.
    """
    parts = _parts(matrix, hessian, axis, scales, dim=dim, books=books)
    fitted = start or fit_additive(
        matrix, dim=dim, books=books, stages=stages, seed=seed, codebook_dtype=codebook_dtype,
        importance=torch.cat([p.importance for p in parts]),
    )  # fmt: skip
    codebooks = fitted.codebooks
    chosen = codebooks, fitted.codes
    plain = fitted.codes.chunk(len(parts), 2)
    least = sum(p.cost(p.decode(codebooks.float().numpy(), c.numpy())) for p, c in zip(parts, plain))
    for turn in range(rounds + 1):
        moves = np.zeros(codebooks.shape), np.zeros(codebooks.shape)
        found = [p.code(codebooks.float().numpy(), moves if turn < rounds else None) for p in parts]
        if (cost := sum(p.cost(near) for p, (_, near) in zip(parts, found))) < least:
            least, chosen = cost, (codebooks, torch.cat([codes for codes, _ in found], 2))
        if turn < rounds:
            step = np.divide(moves[0], moves[1], out=np.zeros_like(moves[0]), where=moves[1] > 0)
            codebooks = (codebooks.double() + torch.from_numpy(step)).to(codebook_dtype)
    return Fitted(*chosen, count_dead(chosen[1], books))


def _parts(
    matrix: torch.Tensor, hessian: torch.Tensor, axis: str, scales: torch.Tensor | None, *, dim: int, books: int
) -> list[_Part]:
    """Return the problems that share codebooks but not inputs."""
    moments = hessian.detach().to("cpu", torch.float64)
    moments = moments[None] if moments.ndim == 2 else moments
    rows = matrix.shape[0] // len(moments)
    inputs = rows if axis == "out" else matrix.shape[1]
    if moments.shape[1:] != (inputs, inputs):
        raise ValueError(f"statistics of {list(hessian.shape)} for {inputs} inputs")
    if not bool(torch.isfinite(moments).all()) or bool((moments.diagonal(dim1=1, dim2=2) < 0).any()):
        raise ValueError("statistics of the inputs are not finite second moments")
    outputs = rows * matrix.shape[1] // inputs
    gains = torch.ones(len(moments), outputs) if scales is None else scales.detach().float().reshape(len(moments), -1)
    return [
        _Part(part, h, gain, axis, dim=dim, books=books)
        for part, h, gain in zip(matrix.detach().to("cpu", torch.float32).split(rows), moments, gains)
    ]


def _order(power: torch.Tensor, step: int) -> torch.Tensor:
    """Return the inputs in groups of `step`, the group with the most power first."""
    padded = torch.nn.functional.pad(power, (0, -len(power) % step)).view(-1, step).sum(1)
    groups = torch.argsort(padded, descending=True, stable=True)
    index = (groups[:, None] * step + torch.arange(step)).flatten()
    return index[index < len(power)]


def _upper(hessian: torch.Tensor, mean: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, inputs in order, fp32.

    With the inputs backwards H = L L^T, so forwards H = R R^T, R upper, and H^-1 = U^T U with U the inverse of R.
    """
    last = order.flip(0)
    damped = hessian[last][:, last]
    share = DAMP
    while True:
        damped.diagonal().add_(share * mean)
        factor, fails = torch.linalg.cholesky_ex(damped)
        if not int(fails):
            break
        share *= 10
    one = torch.eye(len(factor), dtype=factor.dtype)
    return torch.linalg.solve_triangular(factor.flip(0, 1), one, upper=True).float().contiguous()


class _Part:
    """One matrix of inputs by outputs, and how dearly its errors are paid for."""

    def __init__(
        self, matrix: torch.Tensor, hessian: torch.Tensor, gain: torch.Tensor, axis: str, *, dim: int, books: int
    ) -> None:
        self.axis, self.dim, self.books, self.gain = axis, dim, books, gain
        self.dense = (matrix if axis == "out" else matrix.T).contiguous()  # [inputs, outputs]
        power = hessian.diagonal()
        if not bool(power.any()):  # the calibration never reached it
            hessian, power = torch.eye(len(power), dtype=torch.float64), torch.ones_like(power)
        self.hessian, mean = hessian, power.mean()
        weight = (power / mean + DAMP).float()
        self.importance = weight[:, None] if axis == "out" else weight.expand(matrix.shape[0], -1)
        self.order = _order(power, 1 if axis == "out" else dim)
        self.upper = _upper(hessian, mean, self.order)
        length = matrix.shape[1]
        self.blocks = -(-length // dim)
        self.tail = length - (self.blocks - 1) * dim
        if axis == "out":  # what an error costs, [blocks, dim]; zero where the last sub-vector is padding
            cost = torch.nn.functional.pad(gain.square(), (0, self.blocks * dim - length)).view(self.blocks, dim)
            self.costs = np.ascontiguousarray(cost.numpy())
            self.flat = bool((cost == cost[0, 0]).all())

    def cost(self, near: torch.Tensor) -> float:
        """Return the calibrated error of decoded weights [inputs, outputs]."""
        hessian, total = self.hessian.float(), 0.0
        for dense, found, gain in zip(*(m.split(WIDE, -1) for m in (self.dense, near, self.gain)), strict=True):
            error = (dense - found) * gain
            total += float(((hessian @ error) * error).double().sum())
        return total

    def decode(self, codebooks: np.ndarray, codes: np.ndarray) -> torch.Tensor:
        """Return the weights [inputs, outputs] of codes [stages, blocks, n]."""
        near = [
            _decode(codebooks[:, b * self.books // self.blocks], codes[:, b]) for b in range(self.blocks)
        ]  # each [n, dim]
        matrix = torch.from_numpy(np.concatenate(near, 1))
        return matrix[:, : self.dense.shape[1]] if self.axis == "out" else matrix[:, : len(self.dense)].T

    def _book(self, book: int) -> slice:
        """Return the blocks that read a codebook."""
        return slice(-(-book * self.blocks // self.books), -(-(book + 1) * self.blocks // self.books))

    def _outputs(
        self, target: torch.Tensor, here: int, own: torch.Tensor, codebooks: np.ndarray, codes: np.ndarray,
        moves: tuple[np.ndarray, np.ndarray] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Code one input's weights [1, outputs], cut along the outputs; return what the codes decode to."""
        outputs, pad = target.shape[1], self.dim - self.tail
        rows = torch.nn.functional.pad(target[0], (0, pad)).view(self.blocks, self.dim).numpy()
        near = np.empty_like(rows)
        for book in range(self.books):
            at = self._book(book)
            tables, points, costs = codebooks[:, book], rows[at], self.costs[at]
            found = _encode(points, None if self.flat else costs, tables)
            codes[:, at, here] = found
            near[at] = _decode(tables, found)
            if moves is not None:
                _gather(points - near[at], costs / float(own) ** 2, found, moves, book)
        return torch.from_numpy(near).reshape(1, -1)[:, :outputs]

    def _inputs(
        self, target: torch.Tensor, here: int, own: torch.Tensor, codebooks: np.ndarray, codes: np.ndarray,
        moves: tuple[np.ndarray, np.ndarray] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Code the weights [size, outputs] of neighbouring inputs; their joint cost is a change of coordinates."""
        block, size = here // self.dim, target.shape[0]
        book = block * self.books // self.blocks
        turn = torch.linalg.inv(own.double()).float()  # cost of an error e [1, size] is |e turn|^2
        tables = codebooks[:, book, :, :size]
        turned = (torch.from_numpy(np.ascontiguousarray(tables)) @ turn).numpy()
        found = _encode((target.T @ turn).numpy(), None, turned)
        codes[:, block] = found
        near = _decode(tables, found)
        if moves is not None:
            weight = self.gain.square()[:, None].expand(-1, size) / own.diagonal().square()
            _gather(target.T.numpy() - near, weight.numpy(), found, moves, book)
        return torch.from_numpy(near).T

    def code(
        self, codebooks: np.ndarray, moves: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose all codes under codebooks [stages, books, 256, dim].

        Returns codes [stages, blocks, n] and what they decode to [inputs, outputs]; adds to `moves` what is left of each
        codeword's targets: weighted sums and masses, shaped like the codebooks.
        """
        inputs, outputs = self.dense.shape
        work = self.dense[self.order].clone()  # [inputs, outputs], in order
        near = torch.empty_like(work)
        rest = torch.empty(
            min(LAZY + self.dim, inputs), outputs
        )  # of one lazy block: errors over the factor's diagonal
        codes = np.empty((len(codebooks), self.blocks, inputs if self.axis == "out" else outputs), np.uint8)
        serve = self._one_stage if len(codebooks) == 1 else self._stages
        start = 0
        while start < inputs:
            far = min(start + LAZY + self.dim, inputs)
            stop = serve(work, near, rest, start, far, codebooks, codes, moves)
            if far < inputs:
                work[far:] -= self.upper[start:stop, far:].T @ rest[: stop - start]
            start = stop
        return torch.from_numpy(codes), torch.empty_like(near).index_copy_(0, self.order, near)

    def _one_stage(
        self, work: torch.Tensor, near: torch.Tensor, rest: torch.Tensor, start: int, far: int, codebooks: np.ndarray,
        codes: np.ndarray, moves: tuple[np.ndarray, np.ndarray] | None,
    ) -> int:  # fmt: skip
        """Code some inputs from `start` on, compiled; return where it stopped."""
        sums, mass = (moves[0][0], moves[1][0]) if moves is not None else (NOTHING, NOTHING)
        common = (work.numpy(), near.numpy(), self.upper.numpy(), self.order.numpy(), start, far, LAZY, codebooks[0])
        if self.axis == "in":
            return code_inputs(*common, self.gain.square().numpy(), codes[0], rest.numpy(), sums, mass, SIDE)
        return code_outputs(*common, self.costs, self.flat, codes[0], rest.numpy(), sums, mass, SIDE)

    def _stages(
        self, work: torch.Tensor, near: torch.Tensor, rest: torch.Tensor, start: int, far: int, codebooks: np.ndarray,
        codes: np.ndarray, moves: tuple[np.ndarray, np.ndarray] | None,
    ) -> int:  # fmt: skip
        """Do the same for any number of stages; for one, this is what the compiled code is tested against."""
        serve = self._outputs if self.axis == "out" else self._inputs
        stop = start
        while stop < len(work) and stop - start < LAZY:
            here = int(self.order[stop])
            size = 1 if self.axis == "out" else min(self.dim, len(work) - here)
            own = self.upper[stop : stop + size, stop : stop + size]
            target = work[stop : stop + size]  # [size, outputs]
            near[stop : stop + size] = found = serve(target, here, own, codebooks, codes, moves)
            left = target - found
            wrong = left / own if size == 1 else torch.linalg.solve_triangular(own.T, left, upper=False)
            rest[stop - start : stop - start + size] = wrong
            if stop + size < far:
                work[stop + size : far] -= self.upper[stop : stop + size, stop + size : far].T @ wrong
            stop += size
        return stop


def _encode(rows: np.ndarray, weights: np.ndarray | None, tables: np.ndarray) -> np.ndarray:
    """Return codes [stages, N] of points [N, r] under tables [stages, 256, r]."""
    if len(tables) > 1:
        return encode_sum(np.ascontiguousarray(rows), weights, np.ascontiguousarray(tables), BEAM)
    columns = np.ascontiguousarray(rows.T)
    return nearest(columns, None if weights is None else np.ascontiguousarray(weights.T), tables[0])[None]


def _decode(tables: np.ndarray, codes: np.ndarray) -> np.ndarray:
    near = tables[0][codes[0]]
    for table, code in zip(tables[1:], codes[1:]):
        near = near + table[code]
    return near


def _gather(
    left: np.ndarray, weights: np.ndarray, codes: np.ndarray, moves: tuple[np.ndarray, np.ndarray], book: int
) -> None:
    """Add what codewords were short of, shared among the stages, to their sums and masses."""
    size = left.shape[1]
    rows = np.ascontiguousarray(left / len(codes), np.float32)
    weights = np.ascontiguousarray(weights, np.float32)
    for stage, code in enumerate(codes):
        part, mass = np.zeros((CODEWORDS, size)), np.zeros((CODEWORDS, size))
        accumulate(rows, weights, code, part, mass)
        moves[0][stage, book, :, :size] += part
        moves[1][stage, book, :, :size] += mass
