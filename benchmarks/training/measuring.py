"""One measurement in a process of its own: seconds, and the peak of its memory as the operating system counts it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def resident() -> int:
    """Return the bytes that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Run a step `count` times; return the median of its seconds and the peak of the process."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {
        "seconds": sorted(times)[len(times) // 2],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def apart(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments` and return the JSON that it prints last; what went wrong in place of figures."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [""]
        return {"failed": "killed: out of memory" if done.returncode == -9 else told[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def trained(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return one step of AdamW."""
    import rpq_convert as rpq

    optimizer = torch.optim.AdamW(rpq.parameter_groups(model, 1e-3, weight_decay=0.05))
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step
