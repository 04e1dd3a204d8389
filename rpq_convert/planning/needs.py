"""Needs: the memory and the disk that a conversion takes, told by its plan before anything is read.

Weights are read, fitted and written one by one, so the memory follows from the largest of them and from how many are fitted at once, not
from the model. The figures are what `benchmarks/scale.py` measures, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rpq_convert.errors import PlanError
from rpq_convert.planning.plan import Job, Plan

BASE = 700 << 20  # Python, torch, transformers and compiled kernels
FIT, DRAW = 300 << 20, 64 << 20  # samples and blocks of one fit, at most; of random codes
LITTLE, EACH = 20 << 20, 32  # the same of small weights: some bytes, and bytes a weight
COPIES = 3  # of codes: as they are found, as they are stored, on their way to the file
CODED = 5  # bytes beside, for each code that is entropy-coded
WIDE = 16  # bytes of a weight that is rotated, or whose outliers are kept apart: float32 copies
SPREAD, LARGEST = 4, 1 << 26  # bytes of a weight of which random codes take the spread, up to so many weights


def fit_bytes(job: Job, *, drawn: bool = False) -> int:
    """Return about how much memory the fit of one weight takes while it runs, the weight itself included.

    Args:
        drawn: no weight is read.
    """
    numbers, spec = math.prod(job.shape), job.spec
    parts = {
        part: math.prod(shape) * d.itemsize for part, (d, shape) in spec.tensors(job.weight_view, job.shape).items()
    }
    codes = parts.pop("codes")
    found = COPIES * codes + 2 * sum(parts.values())
    work = LITTLE + EACH * numbers
    if drawn:
        return found + min(DRAW, work)
    found += job.dense_bytes
    if job.is_random:
        return found + min(DRAW, work) + SPREAD * min(numbers, LARGEST)
    if spec.rate is not None:
        found += CODED * codes
    return found + min(FIT, work) + (WIDE * numbers if spec.rotation or spec.outliers else 0)


def memory(plan: Plan, workers: int, *, drawn: bool = False) -> int:
    """Return about the most memory that a conversion without calibration takes, with so many fits at once."""
    largest = sorted((fit_bytes(job, drawn=drawn) for job in plan.jobs), reverse=True)[:workers]
    dense = 2 * max((s.nbytes for s in plan.skips), default=0)
    return BASE + max(sum(largest), dense)


def check_memory(jobs: Sequence[Job], left: int | None, *, drawn: bool = False) -> None:
    """Refuse weights of which a single one does not fit into the memory that is left.

    Args:
        left: bytes; None where nobody knows.

    Raises:
        PlanError: which weight, and what helps.
    """
    if left is None or not jobs:
        return
    needed, job = max(((fit_bytes(j, drawn=drawn), j) for j in jobs), key=lambda found: found[0])
    if needed > left:
        raise PlanError(
            f"{job.name} {list(job.shape)} needs about {gigabytes(needed)} of memory while it is fitted, and {gigabytes(left)} are left; "
            f"give more memory, or leave it dense (exclude={job.name!r})"
        )


def described(plan: Plan, workers: int, disk: int, *, drawn: bool = False) -> str:
    """Return in words what a conversion needs.

    Args:
        disk: bytes that are written.
    """
    most, least = (gigabytes(memory(plan, n, drawn=drawn)) for n in (workers, 1))
    several = f" with {workers} fits at once ({least} with one)" if workers > 1 else ""
    return f"needs about {most} of memory{several} and {gigabytes(disk)} of disk while it is made"


def gigabytes(n: int) -> str:
    """Return a size in GB of 10**9 bytes; a small one in MB."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
