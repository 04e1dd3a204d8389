"""What people see: results on stdout, talk and progress on stderr."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from rpq_convert.showing import printable

if TYPE_CHECKING:
    from rpq_convert.planning.plan import Plan
    from rpq_convert.report.schema import Report


def say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        say(f"warning: {warning}")


def show_report(report: "Report", *, json: bool) -> None:
    """Print a report whose plan's warnings have been said on stderr."""
    if json:
        print(report.to_json())
    else:
        print(replace(report, warnings=()).to_terminal(width()))


def width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


@contextmanager
def progress(plan: "Plan", *, quiet: bool) -> Iterator[Callable[[Any, Any], None] | None]:
    """Yield the callback of a conversion: a bar weighted by parameters on a terminal, a line per fit in a log."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(plan) as callback:
            yield callback
    else:
        yield fits(len(plan.jobs))


def fits(total: int | None = None) -> Callable[[Any, Any], None]:
    """Return a callback that says a line per fit."""
    done, all_of = 0, "" if total is None else f"/{total}"

    def callback(job: Any, encoded: Any) -> None:
        nonlocal done
        done += 1
        if encoded is None:
            facts = "done before"
        else:
            of, error = ("weight", encoded.error) if encoded.output_error is None else ("output", encoded.output_error)
            facts = ("" if error is None else f"{of} error {error:.2g}, ") + f"{encoded.seconds:.1f} s"
        say(f"[{done}{all_of}] {job.name}: {facts}")

    return callback


@contextmanager
def _bar(plan: "Plan") -> Iterator[Callable[[Any, Any], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.fields[name]}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # One fit can take minutes: rich's speed window of 30 s would forget every one before the next.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=24 * 3600)
    done = 0

    with bar:
        task = bar.add_task("", total=sum(prod(j.shape) for j in plan.jobs), name="reading")

        def callback(job: Any, encoded: Any) -> None:
            nonlocal done
            done += prod(job.shape)
            if encoded is None:  # fitted by an earlier run: no speed is learnt from it
                bar.reset(task, completed=done, name="resumed")
            else:
                bar.update(task, completed=done, name=printable(job.name[-40:]))

        yield callback
