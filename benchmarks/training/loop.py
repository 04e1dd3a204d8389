"""One run: AdamW, a warm-up and a cosine, gradients clipped at 1, the same batches for every model of a task."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import nn

import rpq_convert as rpq
from benchmarks.training import sizes
from benchmarks.training.rows import PRETRAINED, SHARE, UPDATE_RATE, Row, after_training
from benchmarks.training.tasks import Data, Task, batch_of, judge, loss_of

BETAS, DECAY, WARM, LAST = (0.9, 0.99), 0.05, 0.1, 0.01
BROKEN = 20.0  # a loss that no useful run comes back from


def factor(step: int, steps: int) -> float:
    """Return what the learning rate is multiplied by."""
    warm = max(1, int(WARM * steps))
    left = max(0.0, (step - warm) / max(1, steps - warm))
    return min((step + 1) / warm, LAST + (1 - LAST) * (1 + math.cos(math.pi * left)) / 2)


def train(
    task: Task, data: Data, model: nn.Module, rate: float, seed: int, steps: int, *, share: float = 0.0, first: int = 0
) -> float:
    """Train a model in place; return seconds a step, the median.

    Args:
        share: of codes that may change at a time; 0 leaves them. first: number of the first batch.
    """
    groups = rpq.parameter_groups(model, rate, weight_decay=DECAY)
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    begin = [g["lr"] for g in optimizer.param_groups]
    updates = rpq.CodeUpdates(model, share, rate=UPDATE_RATE) if share else None
    model.train()
    times = []
    for step in range(steps):
        start = time.perf_counter()
        now = factor(step, steps)
        for group, lr in zip(optimizer.param_groups, begin, strict=True):
            group["lr"] = lr * now
        optimizer.zero_grad()
        batch = batch_of(task, data, first + step, seed)
        if updates:
            with updates.expanded():
                loss = loss_of(model, batch)
                loss.backward()
        else:
            loss = loss_of(model, batch)
            loss.backward()
        if not math.isfinite(value := float(loss.detach())) or value > BROKEN:
            break
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if updates:
            updates.step(now)
        times.append(time.perf_counter() - start)
    rpq.round_to_stored(model)
    return sorted(times)[len(times) // 2] if times else math.nan


def run(task: Task, data: Data, row: Row, width: int, rate: float, seed: int, steps: int) -> tuple[nn.Module, float]:
    """Build and train one model; return it with the seconds of a step."""
    torch.manual_seed(seed)
    model, first = row.build(task, width), 0
    if row.pretrained:
        first = int(PRETRAINED * steps)
        train(task, data, model, task.rate, seed, first)
        model = row.coded(model, fit="kmeans", seed=seed)
    return model, train(task, data, model, rate, seed, steps - first, share=SHARE if row.updates else 0.0, first=first)


def results(task: Task, data: Data, row: Row, width: int, rate: float, seed: int, steps: int) -> list[dict[str, Any]]:
    """Return what a full run gives on the test part; of a dense run also what it gives once it is made small."""
    model, seconds = run(task, data, row, width, rate, seed, steps)
    facts = {"task": task.name, "width": width, "seed": seed, "steps": steps, "rate": rate}
    found = [
        {
            **facts, "row": row.name, "times": row.times, "bytes": sizes.weight_bytes(model),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "seconds": seconds,
            "validation": judge(task, model, data.validation), task.metric: judge(task, model, data.test),
        }
    ]  # fmt: skip
    if row.kind == "dense":
        for name, times, small, size in after_training(copy.deepcopy(model).eval()):
            found.append(
                {**facts, "row": name, "times": times, "bytes": size, task.metric: judge(task, small, data.test)}
            )
    return found
