"""Seconds a step and peak memory of every row, one process each, on a machine that does nothing else.

python -m benchmarks.training.cost TASK WIDTH ROW TIMES plain|checkpointing|compiled    # one of them, as JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.training import measuring
from benchmarks.training.rows import ROWS, SHARE, UPDATE_RATE, Row
from benchmarks.training.tasks import CONTEXT, TASKS, Task, loss_of

WARM, COUNT = 4, 15


def lines() -> Iterator[dict[str, Any]]:
    """Yield a line for every task, width and row: plain, with checkpointing, and dense and RPQ compiled (where there is a compiler)."""
    for task in TASKS.values():
        for width in task.widths:
            for row in ROWS:
                if row.pretrained:
                    continue  # the same layers as from random codes
                hows = ["plain", "checkpointing"]
                if row.kind in ("dense", "rpq") and not row.updates and width == task.widths[0]:
                    hows.append("compiled")
                for how in hows:
                    found = measuring.apart(__name__, task.name, str(width), row.name, str(row.times), how)
                    facts = {"task": task.name, "width": width, "row": row.name, "times": row.times}
                    yield {"kind": "cost", **facts, "setting": how, **found}


def one(task: Task, width: int, row: Row, how: str) -> dict[str, Any]:
    """Measure one row on random inputs; the peak is above what the process held before it built the model."""
    import rpq_convert as rpq
    from rpq_convert.running.blocks import recomputed

    torch.manual_seed(0)
    if task.name == "opt":
        ids = torch.randint(96, (task.batch, CONTEXT + 1))
        batch = (ids[:, :-1], ids[:, 1:])
    else:
        batch = (torch.randn(task.batch, 1, 28, 28), torch.randint(10, (task.batch,)))
    before = measuring.resident()
    model = row.build(task, width)
    called = torch.compile(model) if how == "compiled" else model
    step = measuring.trained(model, lambda: loss_of(called, batch))
    updates = rpq.CodeUpdates(model, SHARE, rate=UPDATE_RATE) if row.updates else None

    def whole() -> None:
        if updates is None:
            step()
            return
        with updates.expanded():
            step()
        updates.step()

    with recomputed(model) if how == "checkpointing" else nullcontext():
        measuring.measured(whole, WARM)
        found = measuring.measured(whole, COUNT)
    return {**found, "peak": found["peak"] - before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, wide, kind, times, asked = sys.argv[1:]
    chosen = next(r for r in ROWS if r.name == kind and r.times == int(times))
    print(json.dumps(one(TASKS[name], int(wide), chosen, asked)))
