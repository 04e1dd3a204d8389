"""Jobs: each reads one tensor and encodes it, in an executor.

Both conversions run them; they differ in where tensors come from and where results go:
source (name -> tensor) -> encode(job, tensor) in an executor -> install in the model | write a piece of the folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from rpq_convert.checkpoint.opening import either
from rpq_convert.conversion.asked import check_executor
from rpq_convert.conversion.executors import run
from rpq_convert.core.results import Encoded, Statistics
from rpq_convert.encoding.encode import encode
from rpq_convert.planning import needs
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.running.memory import available
from rpq_convert.storage.pieces import Pieces
from rpq_convert.storage.room import most_bytes

SPARE = 0.9  # of the memory that is left, for fits


def _encode(item: tuple[Job, Tensor, float | None, Statistics | None, Mapping[str, Tensor] | None]) -> Encoded:
    job, tensor, std, statistics, start = item
    return encode(job, tensor, std=std, statistics=statistics, start=start)


def run_jobs(
    jobs: Iterable[Job],
    source: Mapping[str, Tensor],
    *,
    executor: str = "threads",
    workers: int | None = None,
    std: float | None = None,
    statistics: Mapping[str, Statistics | None] | None = None,
    start: Mapping[str, Mapping[str, Tensor]] | None = None,
    pieces: Pieces | None = None,
) -> Iterator[Encoded]:
    """Encode every job, in order of completion; at most `workers` tensors are in memory, and as many as it has room for.

    Args:
        pieces: where results belong. A cluster whose machines see that folder writes them there; such results come without tensors.

    Raises:
        PlanError: an executor that there is not, workers that it does not have, or a weight that memory has no room for.
    """
    check_executor(executor, workers)
    if executor == "ray":
        from rpq_convert.conversion.cluster import Run

        on_cluster = Run(
            source, std=std, pieces=pieces, statistics=statistics or {}, start=start or {}, workers=workers
        )
        yield from on_cluster.results(jobs)
        return

    def item(job: Job) -> tuple[Any, ...]:
        tensor = either(source, (job.name, *job.aliases)).detach().to(getattr(torch, job.dtype))
        return job, tensor, std, (statistics or {}).get(job.name), (start or {}).get(job.name)

    first, second = tee(jobs)
    own = needs.BASE if executor == "processes" else 0  # of a process that another one fits in
    sizes = (needs.fit_bytes(job) + own for job in second)
    left = available()
    room = math.inf if left is None else SPARE * left
    yield from run(
        _encode, map(item, first), executor=executor, workers=workers or default_workers(), sizes=sizes, room=room
    )


def default_workers() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def needed(plan: Plan, workers: int | None = None, *, drawn: bool = False) -> str:
    """Return in words what memory and disk a conversion to a folder needs."""
    return needs.described(plan, workers or default_workers(), most_bytes(plan), drawn=drawn)
