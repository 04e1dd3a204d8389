"""Jobs: each reads one tensor and encodes it, in an executor.

Both conversions run them; they differ in where tensors come from and where results go:
source (name -> tensor) -> encode(job, tensor) in an executor -> install in the model | write a piece of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rpq_convert.checkpoint.opening import either
from rpq_convert.conversion.asked import check_executor
from rpq_convert.conversion.executors import run
from rpq_convert.core.results import Encoded, Statistics
from rpq_convert.encoding.encode import encode
from rpq_convert.planning.plan import Job


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
) -> Iterator[Encoded]:
    """Encode every job, in order of completion; at most `workers` tensors are in memory.

    Raises:
        PlanError: an executor that there is not, or workers that it does not have.
    """
    check_executor(executor, workers)

    def item(job: Job) -> tuple[Any, ...]:
        tensor = either(source, (job.name, *job.aliases)).detach().to(getattr(torch, job.dtype))
        return job, tensor, std, (statistics or {}).get(job.name), (start or {}).get(job.name)

    items = map(item, jobs)
    yield from run(_encode, items, executor=executor, workers=workers or default_workers())


def default_workers() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
