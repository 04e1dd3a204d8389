"""Which runs there are, and what they gave: lines of docs/training.jsonl, one for each run; a run that has one is not run again."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import entanglement, loop
from benchmarks.training.rows import ROWS, Row
from benchmarks.training.tasks import TASKS, Task, data_of, judge

RESULTS = Path(__file__).parents[2] / "docs" / "training.jsonl"
SEEDS = (0, 1, 2)
FIRST = 5  # rows that get their other seeds first: dense, RPQ, a smaller dense model
TUNED = 0.25  # share of the steps that learning rates are chosen by
STEP = 10**0.5  # between learning rates
# What tells one line from another
FACTS = ("kind", "task", "width", "row", "times", "rate", "seed", "setting", "match")
Line = dict[str, Any]


def lines() -> list[Line]:
    """Return what was measured, the last line of each run."""
    text = RESULTS.read_text("utf8") if RESULTS.is_file() else ""
    return list({_key(line): line for line in map(json.loads, text.splitlines())}.values())


def _key(line: Line) -> str:
    return json.dumps([line.get(fact) for fact in FACTS])


def add(line: Line) -> None:
    print({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}, flush=True)
    with RESULTS.open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")


def run(what: str, tasks: Sequence[Task], pictures: Path | None, text: Path | None, jobs: int, wide: bool) -> None:
    """Run what is not there yet, in processes of one thread: "rows", or the "entanglement" study."""
    work: list[tuple[Any, ...]] = []
    if what == "entanglement":
        work = [(_entangled, t.name, s, m) for t in tasks for s, m in _settings(t)]
    else:
        for at in range(2 if wide else 1):
            work += [
                (_chain, t.name, t.widths[at], row, seeds)
                for seeds, rows in (((0, 1), ROWS[:FIRST]), (SEEDS, ROWS[:FIRST]), (SEEDS, ROWS))
                for t in tasks
                for row in rows
            ]
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_single) as pool:
        for done in [pool.submit(one[0], pictures, text, *one[1:]) for one in work]:
            done.result()


def _single() -> None:
    torch.set_num_threads(1)


def _settings(task: Task) -> Iterator[tuple[dict[str, Any] | None, str]]:
    yield None, "*"
    for setting in entanglement.settings():
        yield setting, "*"
    for match in entanglement.KINDS[task.name]:
        yield {"books": 4, "dim": 8}, match


def _entangled(pictures: Path | None, text: Path | None, name: str, setting: dict[str, Any] | None, match: str) -> None:
    task = TASKS[name]
    line: Line = {"kind": "entanglement", "task": name, "width": task.widths[0], "seed": 0, "match": match}
    line["setting"] = entanglement.named(setting) if setting else "dense"
    if _key(line) not in {_key(known) for known in lines()}:
        found = entanglement.measure(task, data_of(name, pictures, text), task.widths[0], setting, match, 0)
        add({**line, **found})


def _chain(pictures: Path | None, text: Path | None, name: str, width: int, row: Row, seeds: tuple[int, ...]) -> None:
    """Choose the learning rate of a row by short runs, then by whole ones of the first seed, and run its other seeds."""
    task = TASKS[name]
    data = data_of(name, pictures, text)

    def whole(rate: float, seed: int) -> float:
        line: Line = {"kind": "run", "task": name, "width": width, "row": row.name, "times": row.times, "seed": seed}
        line["rate"] = rate
        known = [k for k in lines() if _key(k) == _key(line) and "validation" in k]
        if not known:
            known = [{"kind": "run", **found} for found in loop.results(task, data, row, width, rate, seed, task.steps)]
            for found in known:
                add(found)
        return task.better * float(known[0]["validation"])

    best = _rate(task, width, row, data)
    while whole(lower := float(f"{best / STEP:.2g}"), SEEDS[0]) > whole(best, SEEDS[0]):
        best = lower  # short runs want larger steps than long ones
    for seed in seeds:
        whole(best, seed)


def _rate(task: Task, width: int, row: Row, data: Any) -> float:
    """Return the best learning rate by short runs on the validation part: neighbours are tried until both are worse."""
    steps, seen = round(TUNED * task.steps), {}

    def tried(power: int) -> float:
        if power not in seen:
            rate = float(f"{task.rate * STEP**power:.3g}")
            facts = {"task": task.name, "width": width, "row": row.name, "times": row.times}
            line: Line = {"kind": "rate", **facts, "rate": rate, "seed": 0}
            known = [k for k in lines() if _key(k) == _key(line)]
            if not known:
                model, _ = loop.run(task, data, row, width, rate, 0, steps)
                found = judge(task, model, data.validation)
                add(line | {"steps": steps, task.metric: found if math.isfinite(found) else None})
            value = known[0][task.metric] if known else found
            seen[power] = task.better * value if value is not None and math.isfinite(value) else -math.inf
        return seen[power]

    best = max((0, 1), key=tried)
    step = 1 if best == 1 else -1
    while tried(best + step) > tried(best):
        best += step
    return float(f"{task.rate * STEP**best:.3g}")
