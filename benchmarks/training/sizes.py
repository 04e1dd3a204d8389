"""Bytes of weights in a file, and the models of each kind that have a given number of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rpq_convert as rpq
from benchmarks.training.tasks import Task
from rpq_convert.layers import surgery

KINDS = (nn.Linear, nn.Conv2d)  # and embeddings, which low-rank models keep dense
LEAST = 4096  # weights of a matrix that is worth converting


def weight_bytes(model: nn.Module) -> int:
    """Return bytes of all parameters as files hold them: codes, codebooks at their stored precision, what is dense at its own."""
    found = list(surgery.layers_of(model).values())
    inside = {id(p) for w in found for p in w.parameters()}
    coded = 0
    for w in {id(w): w for w in found}.values():
        for dtype, shape in w.spec.tensors(w.view, w.shape).values():
            coded += torch.empty(shape, dtype=dtype, device="meta").nbytes
    return coded + sum(p.nbytes for p in model.parameters() if id(p) not in inside)


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """Return the largest number that fits, by halving."""
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def width_for(task: Task, target: int) -> int:
    """Return the largest width whose dense model has no more bytes than the target."""
    width = task.step
    while weight_bytes(task.build(width + task.step)) <= target:
        width += task.step
    return width


def rules_for(model: nn.Module, target: int, dim: int) -> list[dict[str, Any]]:
    """Return rules by which a converted model has no more bytes than the target: sub-vectors of one length, codebooks by size.

    Raises:
        ValueError: one codebook for each weight is too much.
    """
    how = {"dim": dim, "codebook_dtype": "float16", "scales": "none", "grow": True}
    jobs = {j.name: j for j in rpq.plan(model, rules=[{"match": "*", "books": 1, **how}]).jobs}
    book = 256 * dim * 2  # bytes
    jobs = {n: j for n, j in jobs.items() if 2 * (j.nbytes["codes"] + book) <= j.dense_bytes}
    rest = weight_bytes(model) - sum(j.dense_bytes for j in jobs.values())

    def books(share: float) -> dict[str, int]:
        most = {n: j.spec.blocks(j.weight_view, j.shape) for n, j in jobs.items()}
        return {n: max(1, min(most[n], int(j.dense_bytes / 4 * share / book))) for n, j in jobs.items()}

    def size(share: float) -> int:
        return rest + sum(j.nbytes["codes"] for j in jobs.values()) + book * sum(books(share).values())

    if size(0) > target:
        raise ValueError(f"dim {dim}: {size(0)} bytes at the least, {target} wanted")
    share = _largest(lambda s: size(s) <= target, 0, 4)
    return [*({"match": n, "books": k, **how} for n, k in books(share).items()), {"match": "*", "skip": True}]


class LowRank(nn.Sequential):
    """A layer as two: `rank` numbers lie between them. It begins as the best approximation of what the layer began with."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        bias = layer.bias is not None
        first: nn.Module
        second: nn.Module
        if isinstance(layer, nn.Linear):
            first = nn.Linear(layer.in_features, rank, bias=False)
            second = nn.Linear(rank, layer.out_features, bias=bias)
        else:
            first = nn.Conv2d(
                layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False  # type: ignore[arg-type]
            )  # fmt: skip
            second = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
        super().__init__(first, second)
        with torch.no_grad():
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            root = s[:rank].sqrt()
            first.weight.copy_((root[:, None] * v[:rank]).view_as(first.weight))  # type: ignore[operator, arg-type]
            second.weight.copy_((u[:, :rank] * root).view_as(second.weight))  # type: ignore[operator, arg-type]
            if bias:
                second.bias.copy_(layer.bias)  # type: ignore[operator]


def low_rank(model: nn.Module, target: int) -> nn.Module:
    """Return the model with low-rank layers, in place, as many ranks everywhere for a weight as the target allows."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # tied heads
    found = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, KINDS) and m.weight.numel() >= LEAST and id(m.weight) not in tables
    }

    def ranks(share: float) -> dict[str, int]:
        sizes = {n: m.weight.flatten(1).shape for n, m in found.items()}
        return {n: max(1, min(int(a * b * share / (a + b)), min(a, b))) for n, (a, b) in sizes.items()}

    rest = weight_bytes(model) - sum(m.weight.nbytes for m in found.values())

    def size(share: float) -> int:
        return rest + sum(4 * r * sum(found[n].weight.flatten(1).shape) for n, r in ranks(share).items())

    share = _largest(lambda s: size(s) <= target, 0, 1)
    for name, rank in ranks(share).items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, LowRank(found[name], rank))  # type: ignore[arg-type]
    return model


def bits_for(model: nn.Module, target: int) -> float:
    """Return the largest number of bits, entropy-coded, whose files have no more bytes of weights than the target."""
    buffers = sum(b.nbytes for b in model.buffers())
    for bits in range(28, 8, -1):
        if rpq.plan(model, bits=bits / 4).tensor_bytes - buffers <= target:
            return bits / 4
    raise ValueError(f"no number of bits has {target} bytes")
