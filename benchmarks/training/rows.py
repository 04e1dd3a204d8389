"""Rows: what is trained, all of the same bytes: a smaller dense model, a low-rank one, and RPQ in three ways; and dense, whole.

A trained dense model is also made small after training, by rounding to int8, by k-means in the very layout of the RPQ rows, and by
the default of `rpq.convert`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import rpq_convert as rpq
from benchmarks.training import sizes
from benchmarks.training.tasks import Task

DIM = {4: 4, 8: 8}  # times smaller -> sub-vector length
PRETRAINED = 0.1  # share of the steps that a dense model is trained for before its weights are coded
SHARE, UPDATE_RATE = (
    0.02,
    0.05,
)  # of `rpq.CodeUpdates`: from random codes offsets must grow longer than they do in tuning


@dataclass(frozen=True)
class Row:
    """How one row trains.

    Args:
        kind: "dense", "smaller", "low-rank" or "rpq". times: how many times fewer bytes than dense.
        updates: codes follow their gradients. pretrained: codes and codebooks are k-means of a dense model that was trained a little.
    """

    kind: str
    times: int = 1
    updates: bool = False
    pretrained: bool = False

    @property
    def name(self) -> str:
        text = {"dense": "dense", "smaller": "smaller dense", "low-rank": "low rank", "rpq": "RPQ, random codes"}[
            self.kind
        ]
        text = "RPQ, k-means of a dense start" if self.pretrained else text
        return text + (", code updates" if self.updates else "")

    def build(self, task: Task, width: int) -> nn.Module:
        """Return the model that training starts with (a dense one where the row is pretrained)."""
        dense = task.build(width)
        target = sizes.weight_bytes(dense) // self.times
        if self.kind == "smaller":
            return task.build(sizes.width_for(task, target))
        if self.kind == "low-rank":
            return sizes.low_rank(dense, target)
        if self.kind == "rpq" and not self.pretrained:
            return self.coded(dense, fit="random")
        return dense

    def coded(self, dense: nn.Module, fit: str, seed: int = 0) -> nn.Module:
        """Return the dense model as RPQ, in place, with the row's bytes."""
        target = sizes.weight_bytes(dense) // self.times
        rules = sizes.rules_for(dense, target, DIM[self.times])
        rpq.convert(dense, rules=rules, fit=fit, seed=seed, executor="serial")
        return dense


TIMES = (4, 8)
ROWS = [
    Row("dense"),
    *(Row("rpq", t) for t in TIMES),
    *(Row("smaller", t) for t in TIMES),
    *(Row("rpq", t, pretrained=True) for t in TIMES),
    *(Row("rpq", t, updates=True) for t in TIMES),
    *(Row("low-rank", t) for t in TIMES),
]


def int8(model: nn.Module) -> int:
    """Round every matrix to int8 with a scale per row, in place; return bytes of all weights."""
    size = sizes.weight_bytes(model)
    for p in model.parameters():
        if p.ndim > 1 and p.numel() >= sizes.LEAST:
            rows = p.data.flatten(1)
            scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            p.data.copy_(((rows / scale).round() * scale).view_as(p))
            size -= 3 * p.numel() - scale.nbytes
    return size


def kmeans(model: nn.Module, times: int) -> int:
    Row("rpq", times).coded(model, fit="kmeans")
    return sizes.weight_bytes(model)


def default(model: nn.Module, times: int) -> int:
    bits = sizes.bits_for(model, sizes.weight_bytes(model) // times)
    size = rpq.plan(model, bits=bits).tensor_bytes - sum(b.nbytes for b in model.buffers())
    rpq.convert(model, bits=bits, executor="serial")
    return size


AFTER: dict[tuple[str, int], Callable[[nn.Module], int]] = {
    ("dense, then int8", 4): int8,
    ("dense, then k-means", 4): lambda m: kmeans(m, 4),
    ("dense, then k-means", 8): lambda m: kmeans(m, 8),
    ("dense, then rpq.convert(bits=...)", 4): lambda m: default(m, 4),
    ("dense, then rpq.convert(bits=...)", 8): lambda m: default(m, 8),
}


def after_training(model: nn.Module) -> list[tuple[str, int, nn.Module, int]]:
    """Return (name, times smaller, the model made small, its bytes) for every way to make a trained one small."""
    found = []
    for (name, times), make in AFTER.items():
        small = copy.deepcopy(model)
        with torch.no_grad():
            size = make(small)
        found.append((name, times, small, size))
    return found
