"""The entanglement study: how many codebooks, how long sub-vectors, which layers; random codes that stay as they are drawn.

Every weight of a codebook moves with all others that have its codeword. What that costs is measured by what a model learns, and seen
in its expanded weights: their effective rank, sub-vectors that are equal to another one of their layer, codewords that no code names,
and how far the codebooks' gradients of different batches agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import rpq_convert as rpq
from benchmarks.training import loop, sizes
from benchmarks.training.tasks import Data, Task, batch_of, judge, loss_of
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight

# An OPT stays at the loss of pairs of characters for the first hundreds
STEPS = {"vit": 400, "opt": 1_000, "resnet": 400}
RATES = {"vit": 1e-3, "opt": 2e-3, "resnet": 3e-3}  # of dense weights; codebooks take `parameter_groups`' multiple
KINDS = {  # patterns of parameters, one kind of layer each
    "vit": ("*to_qkv*", "*to_out*", "*net.[14]*", "to_patch*"),
    "opt": ("*.[qkv]_proj*", "*out_proj*", "*fc[12]*", "*embed*"),
    "resnet": ("?.weight", "*conv[12]*"),
}
BATCHES = 12  # that gradients are compared over


def settings() -> Iterator[dict[str, Any]]:
    """Yield what is measured: the number of codebooks at one length, the length at one number, the seed's rule, one kind of layer."""
    for books in (1, 4, 16, "blocks", 2, 8):
        yield {"books": books, "dim": 8}
    yield {"codebooks": "heads"}
    for dim in (2, 4, 16, 64, 32, 128):
        yield {"books": 4, "dim": dim}
    yield {"axis": "in", "books": 4, "dim": 8}
    yield {"scales": "float16", "books": 4, "dim": 8}
    for dim in (2, 4, 16, 32, 64, 128):
        yield {"books": "blocks", "dim": dim}


def named(setting: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in setting.items())


def coded(model: nn.Module, setting: dict[str, Any], match: str = "*") -> nn.Module:
    """Convert a model to random codes, in place; a number of codebooks above a weight's blocks is that of its blocks."""
    if "codebooks" in setting:
        rpq.convert(model, codebooks=setting["codebooks"], fit="random", grow=True, executor="serial")
        return model
    how = {"axis": "out", "codebook_dtype": "float16", "scales": "none", **setting, "grow": True}
    wanted = how.pop("books")
    jobs = rpq.plan(model, rules=[{"match": match, **how, "books": 1}, {"match": "*", "skip": True}]).jobs
    rules = []
    for job in jobs:
        blocks = job.spec.blocks(job.weight_view, job.shape)
        rules.append({"match": job.name, **how, "books": blocks if wanted == "blocks" else min(wanted, blocks)})
    rpq.convert(model, rules=[*rules, {"match": "*", "skip": True}], fit="random", executor="serial")
    return model


def effective_rank(matrix: Tensor) -> float:
    """Return exp of the entropy of singular values over their sum (Roy and Vetterli 2007), as a share of the full rank."""
    s = torch.linalg.svdvals(matrix.float())
    p = s / s.sum().clamp_min(1e-30)
    return float(torch.exp(-(p * p.clamp_min(1e-30).log()).sum())) / min(matrix.shape)


def codes_of(weight: RPQWeight) -> tuple[float, float]:
    """Return the shares of sub-vectors that equal another one of their layer, and of codewords that no code names."""
    layout, codes = weight.layout, weight.stages_codes()[0].long()  # [blocks, n]
    book = torch.arange(layout.blocks) * layout.books // layout.blocks
    named_by = book[:, None] * 256 + codes
    counts = torch.bincount(named_by.flatten(), minlength=layout.books * 256)
    return float(counts[counts > 1].sum()) / named_by.numel(), float((counts == 0).float().mean())


def alignment(task: Task, data: Data, model: nn.Module, seed: int = 7) -> float:
    """Return the mean cosine between gradients of different batches, of what was converted (of a dense model, its matrices)."""
    inside = {id(p) for w in surgery.layers_of(model).values() for p in w.parameters()}
    trained = [p for p in model.parameters() if id(p) in inside] or [p for p in model.parameters() if p.ndim > 1]
    model.train()
    total = torch.zeros(sum(p.numel() for p in trained))
    for step in range(BATCHES):
        grads = torch.autograd.grad(loss_of(model, batch_of(task, data, step, seed)), trained)
        flat = torch.cat([g.flatten() for g in grads])
        total += flat / flat.norm().clamp_min(1e-30)
    return float((total.square().sum() - BATCHES) / (BATCHES * (BATCHES - 1)))


def measure(
    task: Task, data: Data, width: int, setting: dict[str, Any] | None, match: str, seed: int
) -> dict[str, Any]:
    """Train one setting (None: dense) and return what it learned and what its weights look like."""
    torch.manual_seed(seed)
    model = task.build(width)
    if setting is not None:
        coded(model, setting, match)
    before = alignment(task, data, model)
    loop.train(task, data, model, RATES[task.name], seed, STEPS[task.name])
    found: dict[str, Any] = {
        "bytes": sizes.weight_bytes(model), "trained": sum(p.numel() for p in model.parameters()), "alignment before": before,
        "alignment after": alignment(task, data, model), task.metric: judge(task, model, data.validation),
    }  # fmt: skip
    weights = list({id(w): w for w in surgery.layers_of(model).values()}.values())
    with torch.no_grad():
        matrices = [w().flatten(1) for w in weights] or [
            p.detach().flatten(1) for p in model.parameters() if p.ndim > 1
        ]
    found["rank"] = sum(effective_rank(m) for m in matrices) / len(matrices)
    if weights:
        shares = [codes_of(w) for w in weights]
        found["duplicates"], found["dead"] = (sum(s) / len(shares) for s in zip(*shares))
    return found
