"""Entropy-constrained quantization: codewords and codes for files in which codes take as many bits as they are rare.

With codes of one byte each, 256 codewords are spread so that none is used in vain. Where codes are entropy-coded, evenly spaced
codewords are nearly the best ones (Gish and Pierce 1968): at the same bits a Gaussian weight has 1.42 * 4^-bits of error, where pairs
of k-means have 2.4 * 4^-bits, and large weights are as exact as small ones. Codewords, decisions and code lengths are then improved in
turn (entropy-constrained Lloyd iterations: Chou, Lookabaugh and Gray 1989): each point takes the codeword with the least sum of
squared error and `price` times its code length. The step between codewords, and the price that belongs to it, are found by
bisection, so that the codes take the bits that there are.

All points are counted in bins first: what follows does not depend on how many there are. Sums are taken in one order and no function
is used that processors round differently, so the result is the same everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpq_convert.core import rans
from rpq_convert.core.elementary import LN2, log2, power
from rpq_convert.core.reproducible import total
from rpq_convert.fit.gptq import fit_gptq
from rpq_convert.fit.loops.nearest import CODEWORDS
from rpq_convert.fit.matrix import Matrix
from rpq_convert.fit.problem import Importance, Problem, fit_distinct, make_problem, round_codebooks
from rpq_convert.fit.result import Fitted, count_dead
from rpq_convert.kernels.rans import encode

BINS = 1 << 16
MIDDLE = 4.0  # root mean squares within which bins are about as narrow as at zero
CHUNK = 1 << 18  # points at a time: what is made of them takes 10 MB
TAIL = 24  # codewords at each end that may lie farther apart, where even steps would need more than there are
PRICE = 2 * LN2 / 12  # of a bit, in squared steps: the slope of error over rate where steps are small
ITERATIONS, BISECTIONS = 12, 18  # of which the last changes the rate by 10^-4 bits
SPARE = 2.5e-4  # bits of a code, about what the coder's states lose
TRIES = 5
LEAST = 1e-9  # weight of a point without importance, beside the largest of 1


def fit_ecvq(
    matrix: Tensor | Matrix,
    *,
    dim: int,
    books: int,
    stages: int,
    seed: int,
    codebook_dtype: torch.dtype = torch.float32,
    importance: Importance = None,
    rate: float | None = None,
) -> Fitted:
    """Fit one codebook of single weights whose codes take at most `rate` bits each when they are entropy-coded.

    Args:
        matrix: [n, L].
        importance: broadcasts to [n, L]; what an error's square counts. It moves codewords, not the choice between them.
        rate: bits per code in a stream of `core/rans.py`, whose counts and states are counted in.

    Raises:
        ValueError: another layout than dim 1, one codebook and one stage; or no rate.
    """
    if (dim, books, stages) != (1, 1, 1):
        raise ValueError(f"ecvq fits single weights with one codebook, not dim {dim}, {books} books, {stages} stages")
    if rate is None:
        raise ValueError("ecvq needs a rate: the bits of a code")
    problem = make_problem(matrix, importance, dim=dim, books=books, stages=stages)
    n, length = problem.matrix.shape
    codes = np.zeros((1, length, n), np.uint8)
    table = fit_distinct(problem, 0, codes[0])
    if table is None or excess(codes, rate) > 0:
        line, asked = Line.of(problem), rate - 8 * rans.overhead(n * length) / (n * length)
        for _ in range(TRIES):
            asked -= SPARE
            table, thresholds = line.fit(asked)
            _choose(problem, thresholds, codes[0])
            if (over := excess(codes, rate)) <= 0:  # else bins were not as good as points
                break
            asked -= over
        else:
            codes[:] = 0
    assert table is not None
    rounded, _ = round_codebooks(table[None, None], problem, codebook_dtype)
    out = torch.from_numpy(codes)
    return Fitted(rounded, out, count_dead(out, books))


def fit_ecvq_to_inputs(matrix: Tensor, hessian: Tensor, *, rate: float, **options: Any) -> Fitted:
    """Do the same with GPTQ's error compensation; arguments as for `fit_gptq`.

    Compensation makes weights that are still to be coded a little larger, and so their codes: the rate is approached from above.
    """
    how = {name: options.pop(name, None) for name in ("axis", "scales", "inputs")}
    asked = rate
    for _ in range(TRIES):
        plain = fit_ecvq(matrix, rate=asked, **options)
        found = fit_gptq(matrix, hessian, start=plain, **how, **options)
        if (over := excess(found.codes.numpy(), rate)) <= 0:
            return found
        asked -= 1.05 * over + SPARE  # a little more than it needs: a third try takes longer than the bits are worth
    return plain


def excess(codes: np.ndarray, rate: float) -> float:
    """Return by how many bits a code is longer than a stream of this rate has room for; at most 0 where the stream holds them."""
    used = len(encode(torch.from_numpy(codes))[0])
    return 8 * (used - rans.stream_bytes(rate, codes.size)) / codes.size


def _choose(problem: Problem, thresholds: np.ndarray, codes: np.ndarray) -> None:
    """Write the codes [L, n] of all points: how many thresholds lie below each."""
    limits = torch.from_numpy(thresholds.astype(np.float32))
    step = max(1, CHUNK // problem.matrix.shape[1])
    for start in range(0, len(problem.matrix), step):
        part = (problem.matrix.rows(start, start + step) * problem.scale).contiguous()
        codes[:, start : start + step] = torch.bucketize(part, limits, out_int32=True).to(torch.uint8).numpy().T


class Line:
    """Points on a line, counted in bins in ascending order.

    Args:
        number, mass, first: [bins], how many points a bin has, what they weigh, and the sum of value times weight.
    """

    def __init__(self, number: np.ndarray, mass: np.ndarray, first: np.ndarray) -> None:
        self.values = first / mass
        self.count = int(number.sum())
        self.sums = np.stack([np.concatenate([[0.0], np.cumsum(a)]) for a in (number, mass, first)])

    @classmethod
    def of(cls, problem: Problem) -> Line:
        """Count the points of a problem, scaled as its codewords are."""
        step = max(1, CHUNK // problem.matrix.shape[1])
        starts = range(0, len(problem.matrix), step)
        parts = (problem.matrix.rows(i, i + step) for i in starts)
        square = sum(float(total(part.double().square())) for part in parts) / problem.matrix.values.numel()
        middle = MIDDLE * problem.scale * 2.0 ** round(float(log2(square)) / 2) if square > 0 else 1.0
        sums = np.zeros((3, BINS))
        for i in starts:
            part = problem.matrix.rows(i, i + step)
            points = (part * problem.scale).reshape(-1)
            place = points / (points.abs() + middle)  # from -1 to 1
            at = ((place + 1) * (BINS // 2)).long().clamp_(0, BINS - 1)
            mass = torch.ones_like(points)
            if problem.importance is not None:
                mass = problem.importance[i : i + len(part)].reshape(-1) + LEAST
            for counted, weights in zip(sums, (None, mass.double(), (mass * points).double())):
                counted += torch.bincount(at, weights, BINS).numpy()
        used = sums[0] > 0
        return cls(*sums[:, used])

    def fit(self, rate: float) -> tuple[np.ndarray, np.ndarray]:
        """Return codewords [256, 1] fp32 and at most 255 thresholds: the least error whose codes take at most `rate` bits."""
        low, high = (float(v) for v in self.values[[0, -1]])
        reach = max(high - low, 1e-30)
        best = np.inf, self.sums[2:, -1] / self.sums[1, -1], np.empty(0)  # error, one codeword for all, thresholds
        for start in (self.even, self.dense):
            if start == self.dense and len(best[1]) < CODEWORDS - 2 * TAIL:
                break  # even steps reach all points: nothing is better
            few, many = reach / 2**24, 2 * reach  # steps that take too many bits, and too few
            for _ in range(BISECTIONS):
                step = float(np.sqrt(few * many))
                words, thresholds, bits, error = self.lloyd(start(step, low, high), PRICE * step * step)
                if bits <= rate:
                    many = step
                    best = min(best, (error, words, thresholds), key=lambda found: found[0])
                else:
                    few = step
        table = np.full((CODEWORDS, 1), best[1][-1], np.float32)
        table[: len(best[1]), 0] = best[1]
        return table, best[2]

    def even(self, step: float, low: float, high: float) -> np.ndarray:
        """Return even codewords; where there are too few for all points, those far from the median lie farther apart."""
        lowest, highest = np.floor(low / step), np.ceil(high / step)
        if highest - lowest < CODEWORDS:
            return step * np.arange(lowest, highest + 1)
        middle = float(self.values[np.searchsorted(self.sums[0], self.count / 2) - 1])
        reach = step * (CODEWORDS - 2 * TAIL - 1) / 2
        far = np.arange(1, TAIL + 1) / TAIL
        tails = [
            middle + side * reach * power(abs(end - middle) / reach, far)
            for side, end in ((-1, low), (1, high))
            if (end - middle) * side > reach
        ]
        return np.sort(np.concatenate([middle + np.linspace(-reach, reach, CODEWORDS - 2 * TAIL), *tails]))

    def dense(self, step: float, low: float, high: float) -> np.ndarray:
        """Return codewords as close as points are dense, to the power of 1/3 (Panter and Dite 1951): the best of one length."""
        share = power(np.diff(self.sums[0])[1:], 1 / 3) * power(np.diff(self.values), 2 / 3)
        level = np.concatenate([[0.0], np.cumsum(share)])
        return np.unique(np.interp((np.arange(CODEWORDS) + 0.5) / CODEWORDS * level[-1], level, self.values))

    def lloyd(self, words: np.ndarray, price: float) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Improve codewords in ascending order for a price of a bit, in squared error.

        Returns codewords, thresholds between them, bits of a code, and the weighted squared error less that of the bins.
        """
        lengths = np.zeros(len(words))
        for _ in range(ITERATIONS):
            gaps = np.diff(words)
            thresholds = (words[1:] + words[:-1]) / 2 + price * np.diff(lengths) / (2 * gaps)
            thresholds = np.maximum.accumulate(thresholds)
            edges = np.concatenate([[0], np.searchsorted(self.values, thresholds), [len(self.values)]])
            number, mass, first = np.diff(self.sums[:, edges], axis=1)
            used = number > 0
            number, mass, first = number[used], mass[used], first[used]
            words = first / mass
            thresholds = thresholds[np.flatnonzero(used)[1:] - 1]
            lengths = log2(self.count / number)
        counts = np.zeros(rans.SYMBOLS)
        counts[: len(number)] = number
        bits = rans.code_bits(counts, rans.frequencies_of(counts)) / self.count
        return words, thresholds, bits, -float((first * words).sum())
