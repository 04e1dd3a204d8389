"""Run one tool on one model, in the tool's own environment and process, so that its memory and failures are its own.

    python -m benchmarks.quality.compress TASK_FOLDER TASK PEER SETTINGS_JSON OUT_FOLDER

Writes `weights.safetensors`, the model's tensors after the tool, decoded; and `facts.json`: bytes, those in memory, minutes, peak memory.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.quality.tasks import TASKS


class Data:
    """What a tool may fit on, made when it asks for it."""

    def __init__(self, task: Any, folder: Path) -> None:
        self.task, self.folder = task, folder

    @cached_property
    def calibration(self) -> list[Any]:
        return self.task.calibration(self.folder)

    @cached_property
    def tuning(self) -> list[Any]:
        return self.task.tuning(self.folder)


def main(folder: str, name: str, peer: str, settings: str, out: str) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    task = TASKS[name]
    model = task.load(Path(folder))
    names = set(model.state_dict())
    tool = importlib.import_module(f"benchmarks.quality.peers.{peer}")
    start = time.perf_counter()
    found = tool.compress(model, json.loads(settings), Data(task, Path(folder)))
    minutes = (time.perf_counter() - start) / 60
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB, from Linux's KiB
    tensors = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items() if n in names}
    save_file(tensors, Path(out) / "weights.safetensors")
    size, memory = found if isinstance(found, tuple) else (found, found)
    facts = {"bytes": size, "memory": memory, "minutes": minutes, "peak_mb": peak}
    (Path(out) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
