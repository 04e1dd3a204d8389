"""GPTQ: codes chosen one input at a time, with error compensation by the later inputs.

With the Hessian `H = sum x x^T` of a layer's inputs, a conversion costs `tr((W - W') H (W - W')^T)`, which is not the error of
the weights. As in GPTQ (Frantar et al. 2022, arXiv:2210.17323; Hassibi and Stork 1992) inputs are taken in order of falling
power. When one is coded, its error is spread over the inputs that are not, by the inverse of their `H`. With sub-vectors along
the outputs, those of a step share one input, and the nearest codeword is the exact optimum of the step. With sub-vectors along
the inputs, a step takes `dim` inputs at once, and the search runs in the coordinates in which their joint cost is a distance.

Codebooks are fitted first, weighted by the power of the inputs. Then each codeword moves to the mean of its targets (what was
to be coded, errors of earlier inputs included), and all codes are chosen again (ROUNDS). The best round is kept, or the nearest
codewords without compensation, by calibrated error.
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
BLOCK = 128  # inputs whose errors are spread over all later inputs in one product (GPTQ's block size)
WIDE = 4096  # outputs whose errors are measured at a time
NOTHING = np.empty((0, CODEWORDS, 1))
ROUNDS = 1  # how many times codebooks are updated and codes chosen again


def fit_gptq(
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
    inputs: torch.Tensor | None = None,
    start: Fitted | None = None,
) -> Fitted:
    """Fit codebooks and codes so that the error of the layer's output on its calibration inputs is small.

    Args:
        matrix: [n, L], each output already divided by its scale; n are inputs with axis `out`, L with axis `in`.
        hessian: [inputs, inputs], `sum x x^T` over the layer's inputs, any float dtype; or [parts, inputs, inputs] where
            the matrix is that many equal runs of rows, each with inputs of its own (experts, groups of a convolution).
        scales: one per output, or None for ones: what an error in that output is multiplied by.
        inputs: one per input, or None for ones: what the matrix was divided by and its inputs will be multiplied by.
        start: an earlier fit, to start from; its codes are then what must be beaten.

    Raises:
        ValueError: as `fit_additive`; a Hessian of another size, not finite, or with a negative diagonal.
    """
    parts = _parts(matrix, hessian, axis, scales, inputs, dim=dim, books=books)
    fitted = start or fit_additive(
        matrix, dim=dim, books=books, stages=stages, seed=seed, codebook_dtype=codebook_dtype,
        importance=torch.cat([p.importance for p in parts]),
    )  # fmt: skip
    codebooks = fitted.codebooks
    chosen = codebooks, fitted.codes
    plain = fitted.codes.chunk(len(parts), 2)
    least = sum(p.cost(p.decode(codebooks.float().numpy(), c.numpy())) for p, c in zip(parts, plain))
    for number in range(ROUNDS + 1):
        updates = np.zeros(codebooks.shape), np.zeros(codebooks.shape)
        found = [p.code(codebooks.float().numpy(), updates if number < ROUNDS else None) for p in parts]
        if (cost := sum(p.cost(decoded) for p, (_, decoded) in zip(parts, found))) < least:
            least, chosen = cost, (codebooks, torch.cat([codes for codes, _ in found], 2))
        if number < ROUNDS:
            step = np.divide(updates[0], updates[1], out=np.zeros_like(updates[0]), where=updates[1] > 0)
            codebooks = (codebooks.double() + torch.from_numpy(step)).to(codebook_dtype)
    return Fitted(*chosen, count_dead(chosen[1], books))


def step_sizes(hessian: torch.Tensor) -> torch.Tensor:
    """Return how coarse the steps of each input's weights may be, about 1, so that all cost the same when errors are compensated.

    A step's error costs its square times what later inputs cannot compensate: the pivot of H in the order of coding. Steps in
    inverse proportion to the pivots' roots share rate among inputs in the best way where steps are small (reverse water-filling,
    as in WaterSIC).

    Args:
        hessian: [inputs, inputs], as for `fit_gptq`.
    """
    hessian = hessian.detach().to("cpu", torch.float64)
    power = hessian.diagonal()
    if not bool(power.any()):
        return torch.ones(len(power))
    order = _order(power, 1)
    own = _upper(hessian, power.mean(), order).diagonal().double()
    steps = torch.empty_like(own).index_copy_(0, order, own)
    return (steps / steps.log().mean().exp()).float()


def _parts(
    matrix: torch.Tensor, hessian: torch.Tensor, axis: str, scales: torch.Tensor | None, inputs: torch.Tensor | None = None,
    *, dim: int, books: int,
) -> list[_Part]:  # fmt: skip
    """Return the problems that share codebooks but not inputs."""
    hessians = hessian.detach().to("cpu", torch.float64)
    hessians = hessians[None] if hessians.ndim == 2 else hessians
    rows = matrix.shape[0] // len(hessians)
    width = rows if axis == "out" else matrix.shape[1]
    if hessians.shape[1:] != (width, width):
        raise ValueError(f"statistics of {list(hessian.shape)} for {width} inputs")
    if not bool(torch.isfinite(hessians).all()) or bool((hessians.diagonal(dim1=1, dim2=2) < 0).any()):
        raise ValueError("statistics of the inputs are not finite second moments")
    outputs = rows * matrix.shape[1] // width
    # one for each output of each part, or for outputs that all parts add to (groups of a transposed convolution)
    gains = torch.ones(outputs, dtype=torch.float32) if scales is None else scales.detach().float()
    gains = gains.reshape(-1, outputs).expand(len(hessians), outputs)
    return [
        _Part(part, h, gain, axis, inputs, dim=dim, books=books)
        for part, h, gain in zip(matrix.detach().to("cpu", torch.float32).split(rows), hessians, gains)
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
        self, matrix: torch.Tensor, hessian: torch.Tensor, gain: torch.Tensor, axis: str, inputs: torch.Tensor | None = None,
        *, dim: int, books: int,
    ) -> None:  # fmt: skip
        self.axis, self.dim, self.books, self.gain = axis, dim, books, gain
        self.dense = (matrix if axis == "out" else matrix.T).contiguous()  # [inputs, outputs]
        power = hessian.diagonal()
        if not bool(power.any()):  # the calibration never reached it
            hessian, power = torch.eye(len(power), dtype=torch.float64), torch.ones_like(power)
        mean = power.mean()
        scale = torch.ones_like(power) if inputs is None else inputs.double()
        self.hessian = hessian if inputs is None else hessian * scale * scale[:, None]
        weight = ((power / mean + DAMP) * scale.square()).float()
        self.importance = weight[:, None] if axis == "out" else weight.expand(matrix.shape[0], -1)
        self.order = _order(power, 1 if axis == "out" else dim)
        self.upper = _upper(hessian, mean, self.order)
        if inputs is not None:  # S H S has the factor U S^-1
            self.upper /= inputs[self.order]
        length = matrix.shape[1]
        self.blocks = -(-length // dim)
        self.tail = length - (self.blocks - 1) * dim
        if axis == "out":  # what an error costs, [blocks, dim]; zero where the last sub-vector is padding
            cost = torch.nn.functional.pad(gain.square(), (0, self.blocks * dim - length)).view(self.blocks, dim)
            self.costs = np.ascontiguousarray(cost.numpy())
            self.flat = bool((cost == cost[0, 0]).all())

    def cost(self, decoded: torch.Tensor) -> float:
        """Return the calibrated error of decoded weights [inputs, outputs]."""
        hessian, total = self.hessian.float(), 0.0
        for dense, found, gain in zip(*(m.split(WIDE, -1) for m in (self.dense, decoded, self.gain)), strict=True):
            error = (dense - found) * gain
            total += float(((hessian @ error) * error).double().sum())
        return total

    def decode(self, codebooks: np.ndarray, codes: np.ndarray) -> torch.Tensor:
        """Return the weights [inputs, outputs] of codes [stages, blocks, n]."""
        decoded = [
            _decode(codebooks[:, b * self.books // self.blocks], codes[:, b]) for b in range(self.blocks)
        ]  # each [n, dim]
        matrix = torch.from_numpy(np.concatenate(decoded, 1))
        return matrix[:, : self.dense.shape[1]] if self.axis == "out" else matrix[:, : len(self.dense)].T

    def _book(self, book: int) -> slice:
        """Return the blocks that read a codebook."""
        return slice(-(-book * self.blocks // self.books), -(-(book + 1) * self.blocks // self.books))

    def _outputs(
        self, target: torch.Tensor, here: int, own: torch.Tensor, codebooks: np.ndarray, codes: np.ndarray,
        updates: tuple[np.ndarray, np.ndarray] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Code one input's weights [1, outputs], with sub-vectors along the outputs; return what the codes decode to."""
        outputs, pad = target.shape[1], self.dim - self.tail
        rows = torch.nn.functional.pad(target[0], (0, pad)).view(self.blocks, self.dim).numpy()
        decoded = np.empty_like(rows)
        for book in range(self.books):
            at = self._book(book)
            tables, points, costs = codebooks[:, book], rows[at], self.costs[at]
            found = _encode(points, None if self.flat else costs, tables)
            codes[:, at, here] = found
            decoded[at] = _decode(tables, found)
            if updates is not None:
                _gather(points - decoded[at], costs / float(own) ** 2, found, updates, book)
        return torch.from_numpy(decoded).reshape(1, -1)[:, :outputs]

    def _inputs(
        self, target: torch.Tensor, here: int, own: torch.Tensor, codebooks: np.ndarray, codes: np.ndarray,
        updates: tuple[np.ndarray, np.ndarray] | None,
    ) -> torch.Tensor:  # fmt: skip
        """Code the weights [size, outputs] of neighbouring inputs; their joint cost is a change of coordinates."""
        block, size = here // self.dim, target.shape[0]
        book = block * self.books // self.blocks
        basis = torch.linalg.inv(own.double()).float()  # an error e [1, size] costs |e basis|^2
        tables = codebooks[:, book, :, :size]
        rotated = (torch.from_numpy(np.ascontiguousarray(tables)) @ basis).numpy()
        found = _encode((target.T @ basis).numpy(), None, rotated)
        codes[:, block] = found
        decoded = _decode(tables, found)
        if updates is not None:
            weight = self.gain.square()[:, None].expand(-1, size) / own.diagonal().square()
            _gather(target.T.numpy() - decoded, weight.numpy(), found, updates, book)
        return torch.from_numpy(decoded).T

    def code(
        self, codebooks: np.ndarray, updates: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose all codes under codebooks [stages, books, 256, dim].

        Returns codes [stages, blocks, n] and what they decode to [inputs, outputs]; adds to `moves` what is left of each
        codeword's targets: weighted sums and masses, shaped like the codebooks.
        """
        inputs, outputs = self.dense.shape
        work = self.dense[self.order].clone()  # [inputs, outputs], in order
        decoded = torch.empty_like(work)
        # of one lazy block: errors over the factor's diagonal
        errors = torch.empty(min(BLOCK + self.dim, inputs), outputs, dtype=torch.float32)
        codes = np.empty((len(codebooks), self.blocks, inputs if self.axis == "out" else outputs), np.uint8)
        serve = self._one_stage if len(codebooks) == 1 else self._stages
        start = 0
        while start < inputs:
            far = min(start + BLOCK + self.dim, inputs)
            stop = serve(work, decoded, errors, start, far, codebooks, codes, updates)
            if far < inputs:
                work[far:] -= self.upper[start:stop, far:].T @ errors[: stop - start]
            start = stop
        return torch.from_numpy(codes), torch.empty_like(decoded).index_copy_(0, self.order, decoded)

    def _one_stage(
        self, work: torch.Tensor, decoded: torch.Tensor, errors: torch.Tensor, start: int, far: int, codebooks: np.ndarray,
        codes: np.ndarray, updates: tuple[np.ndarray, np.ndarray] | None,
    ) -> int:  # fmt: skip
        """Code some inputs from `start` on, compiled; return where it stopped."""
        sums = (updates[0][0], updates[1][0]) if updates is not None else (NOTHING, NOTHING)
        matrices = work.numpy(), decoded.numpy(), errors.numpy()
        common = matrices, self.upper.numpy(), self.order.numpy(), (start, far, BLOCK), codebooks[0]
        if self.axis == "in":
            return code_inputs(*common, self.gain.square().numpy(), codes[0], sums, SIDE)
        return code_outputs(*common, self.costs, self.flat, codes[0], sums, SIDE)

    def _stages(
        self, work: torch.Tensor, decoded: torch.Tensor, errors: torch.Tensor, start: int, far: int, codebooks: np.ndarray,
        codes: np.ndarray, updates: tuple[np.ndarray, np.ndarray] | None,
    ) -> int:  # fmt: skip
        """Do the same for any number of stages; for one, this is what the compiled code is tested against."""
        serve = self._outputs if self.axis == "out" else self._inputs
        stop = start
        while stop < len(work) and stop - start < BLOCK:
            here = int(self.order[stop])
            size = 1 if self.axis == "out" else min(self.dim, len(work) - here)
            own = self.upper[stop : stop + size, stop : stop + size]
            target = work[stop : stop + size]  # [size, outputs]
            decoded[stop : stop + size] = found = serve(target, here, own, codebooks, codes, updates)
            left = target - found
            wrong = left / own if size == 1 else torch.linalg.solve_triangular(own.T, left, upper=False)
            errors[stop - start : stop - start + size] = wrong
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
    decoded = tables[0][codes[0]]
    for table, code in zip(tables[1:], codes[1:]):
        decoded = decoded + table[code]
    return decoded


def _gather(
    left: np.ndarray, weights: np.ndarray, codes: np.ndarray, updates: tuple[np.ndarray, np.ndarray], book: int
) -> None:
    """Add what codewords were short of, shared among the stages, to their sums and masses."""
    size = left.shape[1]
    rows = np.ascontiguousarray(left / len(codes), np.float32)
    weights = np.ascontiguousarray(weights, np.float32)
    for stage, code in enumerate(codes):
        part, mass = np.zeros((CODEWORDS, size)), np.zeros((CODEWORDS, size))
        accumulate(rows, weights, code, part, mass)
        updates[0][stage, book, :, :size] += part
        updates[1][stage, book, :, :size] += mass
