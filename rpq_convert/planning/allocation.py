"""Allocation: one option for every item, the least loss within a budget of bytes. Knows nothing of models.

A multiple-choice knapsack, solved near enough to exactly that a test compares it with brute force:

1. Lagrange: at a price per byte every item chooses for itself; the price at which the budget is just met gives both a
   solution (what is left is spent greedily) and a bound that no solution beats. With hundreds of items they nearly meet.
2. Dynamic programming over the options that could still beat that solution: states (bytes, excess over the bound), each
   item in turn, dominated ones dropped. Exact until more than STATES are left; then the best one of each byte range stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

STATES = 4096
Option = tuple[int, float]  # bytes, loss


@dataclass(frozen=True)
class Allocation:
    """A choice and what it costs.

    Args:
        choice: the number of the option of every item.
        nbytes, loss: their sums.
        bound: no choice within the budget has less loss than this.
    """

    choice: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float


def allocate(items: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """Choose one option per item with the least total loss and at most `budget` bytes; equal inputs, equal choice.

    Raises:
        ValueError: the smallest options together exceed the budget.
    """
    fronts = [_front(options) for options in items]
    least = sum(items[i][front[0]][0] for i, front in enumerate(fronts))
    if least > budget:
        raise ValueError(f"the smallest options take {least:,} bytes, the budget is {budget:,}")
    if not items:
        return Allocation((), 0, 0.0, 0.0)
    greedy, price = _lagrange(items, fronts, budget)
    base = sum(min(items[i][o][1] + price * items[i][o][0] for o in front) for i, front in enumerate(fronts))
    bound = base - price * budget
    choice = _improve(items, fronts, budget, greedy, price, bound) or greedy
    nbytes, loss = _totals(items, choice)
    return Allocation(tuple(choice), nbytes, loss, min(bound, loss))


def _totals(items: Sequence[Sequence[Option]], choice: Sequence[int]) -> tuple[int, float]:
    picked = [items[i][o] for i, o in enumerate(choice)]
    return sum(p[0] for p in picked), float(sum(p[1] for p in picked))


def _front(options: Sequence[Option]) -> list[int]:
    """Return the options that no other one beats in both, by bytes."""
    kept: list[int] = []
    for o in sorted(range(len(options)), key=lambda o: (options[o], o)):
        if not kept or options[o][1] < options[kept[-1]][1]:
            kept.append(o)
    return kept


def _hull(options: Sequence[Option], front: Sequence[int]) -> list[int]:
    """Return the front's lower convex hull: the options that some price per byte prefers."""
    kept: list[int] = []
    for o in front:
        while len(kept) > 1 and _gain(options, kept[-1], o) >= _gain(options, kept[-2], kept[-1]):
            kept.pop()
        kept.append(o)
    return kept


def _gain(options: Sequence[Option], a: int, b: int) -> float:
    """Return the loss that a byte saves on the way from option a to the larger b."""
    return (options[a][1] - options[b][1]) / (options[b][0] - options[a][0])


def _lagrange(
    items: Sequence[Sequence[Option]], fronts: Sequence[Sequence[int]], budget: int
) -> tuple[list[int], float]:
    """Return a greedy choice and the price at which the budget is met."""
    hulls = [_hull(options, front) for options, front in zip(items, fronts)]
    steps = sorted(
        (-_gain(items[i], a, b), i, k) for i, hull in enumerate(hulls) for k, (a, b) in enumerate(pairwise(hull))
    )
    choice = [hull[0] for hull in hulls]
    left = budget - _totals(items, choice)[0]
    price = 0.0
    for gain, i, k in steps:
        if choice[i] != hulls[i][k]:
            continue  # an earlier step of this item did not fit
        more = items[i][hulls[i][k + 1]][0] - items[i][choice[i]][0]
        if more <= left:
            choice[i], left = hulls[i][k + 1], left - more
        elif price == 0.0:
            price = -gain
    while True:  # what is left: the best step that fits, also to options inside the hull
        best = max(
            (
                (_gain(items[i], choice[i], o), -i, o)
                for i, front in enumerate(fronts)
                for o in front
                if 0 < items[i][o][0] - items[i][choice[i]][0] <= left
            ),
            default=None,
        )
        if best is None:
            return choice, price
        left -= items[-best[1]][best[2]][0] - items[-best[1]][choice[-best[1]]][0]
        choice[-best[1]] = best[2]


def _improve(
    items: Sequence[Sequence[Option]],
    fronts: Sequence[Sequence[int]],
    budget: int,
    known: Sequence[int],
    price: float,
    bound: float,
) -> list[int] | None:
    """Return a choice with less loss than the known one, or None where the dynamic program finds none."""
    gap = _totals(items, known)[1] - bound
    order = sorted(range(len(items)), key=lambda i: -items[i][fronts[i][-1]][0])  # small items last: they fill gaps
    smallest = [items[i][fronts[i][0]][0] for i in range(len(items))]
    rest = sum(smallest)  # the least that the items to come will take
    nbytes, excess = np.zeros(1, np.int64), np.zeros(1)
    layers: list[tuple[np.ndarray, np.ndarray]] = []  # per item: the state it came from, the option taken
    for i in order:
        rest -= smallest[i]
        reduced = [items[i][o][1] + price * items[i][o][0] for o in fronts[i]]
        core = [(o, r - min(reduced)) for o, r in zip(fronts[i], reduced) if r - min(reduced) <= gap]
        more = np.array([items[i][o][0] for o, _ in core], np.int64)
        cost = np.array([r for _, r in core])
        sums, costs = (nbytes[:, None] + more).ravel(), (excess[:, None] + cost).ravel()
        keep = np.flatnonzero((sums + rest <= budget) & (costs <= gap))
        if not keep.size:
            return None
        keep = keep[_undominated(sums[keep], costs[keep] - price * sums[keep])]
        layers.append((keep // len(core), np.array([o for o, _ in core])[keep % len(core)]))
        nbytes, excess = sums[keep], costs[keep]
    state = int(np.argmin(excess - price * nbytes))
    choice = list(known)
    for i, (parents, options) in zip(reversed(order), reversed(layers)):
        choice[i], state = int(options[state]), int(parents[state])
    return choice if _totals(items, choice)[1] < _totals(items, known)[1] else None


def _undominated(nbytes: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the states that none beats in both, by bytes; of more than STATES the best of each range of bytes."""
    order = np.lexsort((loss, nbytes))
    best = np.minimum.accumulate(loss[order])
    first = np.r_[True, best[1:] < best[:-1]]
    order = order[first]  # bytes grow, loss falls
    if order.size <= STATES:
        return order
    low, high = int(nbytes[order[0]]), int(nbytes[order[-1]])
    ranges = (nbytes[order] - low) * STATES // (high - low + 1)
    return order[np.r_[ranges[1:] != ranges[:-1], True]]  # the last of a range has its least loss
