"""Asked: what a conversion was asked for, held together before it begins. Free of torch, so that commands can ask at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from rpq_convert.conversion.options import BEST, EFFORTS, FAST, GOOD
from rpq_convert.core.options import one_of
from rpq_convert.errors import PlanError
from rpq_convert.planning.options import PlanOptions

NOT_CALIBRATED = "reproducible serves fits to weights alone: calibration runs the model, which processors round in other ways; leave one of them out"
EXECUTORS = ("serial", "threads", "processes", "ray")


def check_asked(
    options: PlanOptions,
    *,
    calibrated: bool,
    effort: str | None = None,
    tokenizer: Any = None,
    executor: str = "threads",
    workers: int | None = None,
) -> None:
    """Refuse settings of a conversion that contradict each other, or that would do nothing.

    Args:
        calibrated: whether data is given. effort: of `QualityOptions`. The others: as for `rpq.convert`.

    Raises:
        PlanError: which settings.
    """
    check_executor(executor, workers)
    options.check_used()
    if calibrated and options.fit == "random":
        raise PlanError(
            "calibration serves a fit, and fit='random' draws codebooks without looking at weights; leave one out"
        )
    if effort is not None:
        one_of("effort", effort, EFFORTS, PlanError)
    if options.reproducible and (calibrated or effort in (GOOD, BEST)):
        raise PlanError(NOT_CALIBRATED)
    if effort == FAST and calibrated:
        raise PlanError(
            "effort fast fits to the weights alone, so data to calibrate on would do nothing; leave one out"
        )
    if effort in (GOOD, BEST) and options.fit == "random":
        raise PlanError(f"effort {effort} calibrates, and fit='random' looks at no weights; leave one out")
    if tokenizer is not None and not calibrated:
        raise PlanError("tokenizer reads the texts of calibration; give calibration as well")


def check_executor(executor: str, workers: int | None) -> None:
    """Refuse an executor that there is not, and workers that it does not have.

    Raises:
        PlanError: which.
    """
    one_of("executor", executor, EXECUTORS, PlanError)
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise PlanError(f"workers must be a whole number of at least 1, not {workers!r}")
    if executor == "serial" and workers not in (None, 1):
        raise PlanError(f"the serial executor has one worker, not {workers}; leave out workers or take threads")


def check_address(address: str | None, executor: str) -> None:
    """Refuse the address of a cluster that would not be used.

    Raises:
        PlanError: there is one.
    """
    if address is not None and executor != "ray":
        raise PlanError(
            "address names a Ray cluster, so it would do nothing without executor ray; leave it out or take that"
        )


def check_plan_alone(plan: Any, options: Iterable[str], *, calibrated: bool = False) -> None:
    """Refuse options of a plan beside a plan that was made before, and data that it cannot be calibrated on.

    Raises:
        PlanError: which options would do nothing.
    """
    if plan is not None and calibrated and any(job.reproducible for job in plan.jobs):
        raise PlanError(NOT_CALIBRATED)
    own = {f.name for f in fields(PlanOptions)}
    if plan is not None and (beside := [name for name in options if name in own]):
        raise PlanError(
            f"a plan decides everything, so {', '.join(beside)} would do nothing; give options to rpq.plan instead"
        )
