"""Seconds a step and peak memory of every row, one process each, on a machine that does nothing else.

python -m benchmarks.training.cost TASK WIDTH ROW TIMES CHECKPOINTING    # one of them, as JSON
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
    """Yield a line for every task, width, row, and with and without checkpointing."""
    for task in TASKS.values():
        for width in task.widths:
            for row in ROWS:
                if row.pretrained:
                    continue  # the same layers as from random codes
                for again in ("no", "yes"):
                    asked = (task.name, str(width), row.name, str(row.times), again)
                    found = measuring.apart(__name__, *asked)
                    facts = {"task": task.name, "width": width, "row": row.name, "times": row.times}
                    yield {"kind": "cost", **facts, "setting": f"checkpointing: {again}", **found}


def one(task: Task, width: int, row: Row, again: bool) -> dict[str, Any]:
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
    step = measuring.trained(model, lambda: loss_of(model, batch))
    updates = rpq.CodeUpdates(model, SHARE, rate=UPDATE_RATE) if row.updates else None

    def whole() -> None:
        if updates is None:
            step()
            return
        with updates.expanded():
            step()
        updates.step()

    with recomputed(model) if again else nullcontext():
        measuring.measured(whole, WARM)
        found = measuring.measured(whole, COUNT)
    return {**found, "peak": found["peak"] - before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, wide, kind, times, recompute = sys.argv[1:]
    chosen = next(r for r in ROWS if r.name == kind and r.times == int(times))
    print(json.dumps(one(TASKS[name], int(wide), chosen, recompute == "yes")))
