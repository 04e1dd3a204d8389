"""Readings of `torch.einsum`: a product of two tensors whose axes are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpq_convert.running.readings import Reading, Vectors, made_of


def _einsum(equation: Any, *operands: Any) -> list[Reading]:
    """Read a product of two operands; either may be the weight. Others, and traces of a weight, have no reading."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or len(tensors) != 2:
        return []
    terms, arrow, out = equation.replace(" ", "").partition("->")
    a, b = (term.replace("...", ".") for term in terms.split(","))
    counts = Counter(a + b)
    out = out.replace("...", ".") if arrow else "".join(sorted(c for c, n in counts.items() if n == 1 or c == "."))
    found = [_reading(tensors[1], b, tensors[0], a, out), _reading(tensors[0], a, tensors[1], b, out)]
    return [reading for reading in found if reading is not None]


def _reading(weight: Tensor, own: str, x: Tensor, other: str, out: str) -> Reading | None:
    """Return what a weight of axes `own` is multiplied by: x, of axes `other`; None where its axes are not plain ones."""
    plain = "." not in own and all(len(set(term)) == len(term) for term in (own, other))
    if not plain or any(c not in other and c not in out for c in own):
        return None
    kinds = ["out" if c not in other else "expert" if c in out else "in" for c in own]
    experts = [c for c, kind in zip(own, kinds) if kind == "expert"]
    if len(experts) > 1:
        return None
    inputs = [c for c, kind in zip(own, kinds) if kind == "in"]

    def vectors() -> Vectors:
        rest = [c for c in other if c not in own and c != "." and c in out]
        order = (
            f"{other}->{''.join(experts)}{'.' if '.' in other and '.' in out else ''}{''.join(rest)}{''.join(inputs)}"
        )
        turned = torch.einsum(order.replace(".", "..."), x)  # axes that stand nowhere else are summed
        width = turned.shape[turned.ndim - len(inputs) :].numel()
        if experts:
            yield from enumerate(part.reshape(-1, width) for part in turned)
        else:
            yield 0, turned.reshape(-1, width)

    axes = tuple("k" if kind == "in" and "in" in kinds[:i] else kind for i, kind in enumerate(kinds))
    return Reading(weight, axes, x, vectors, made_of("einsum", x, other, tuple(experts), tuple(inputs), out))


READERS: dict[Any, Callable[..., list[Reading]]] = {torch.einsum: _einsum}
