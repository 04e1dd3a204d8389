"""What people see: results on stdout, progress on stderr."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

from rpq_convert.report.text import short
from rpq_convert.showing import duration, printable

from .talk import detail, event, is_quiet, say

if TYPE_CHECKING:
    from rpq_convert.core.results import Encoded
    from rpq_convert.planning.plan import Plan
    from rpq_convert.report.schema import Report

Tell = Callable[[str, float, float], None]  # what is done now, how much of it all is done, and how much it all is
EVERY = 30.0  # seconds between two lines of progress, where no terminal shows a bar
TICK = 1.0  # seconds between two looks at whether a line is due
COLUMNS = 60  # of such a line, at most


def show_report(report: "Report", *, json: bool) -> None:
    """Print a report whose plan's warnings have been said on stderr."""
    if json:
        print(report.to_json())
    else:
        print(replace(report, warnings=()).to_terminal(width()))


def width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def chosen(plan: "Plan") -> str:
    """Return what a plan chose, for `--verbose`: each kind of layout with the number of its weights, and what decided it."""
    kinds = Counter((job.spec.describe(), job.rule) for job in plan.jobs)
    lines = [f"{count} weights ({by}): {spec}" for (spec, by), count in kinds.most_common()]
    return "; ".join([*lines, f"{len(plan.skips)} tensors stay dense"])


class Pace:
    """How fast work goes, by what was done since it began; what an earlier run had done says nothing of that."""

    def __init__(self) -> None:
        self.began, self.before = monotonic(), 0.0

    def skip(self, done: float) -> None:
        self.began, self.before = monotonic(), done

    def left(self, done: float, total: float) -> str:
        """Return how long the rest takes, such as `about 40 s left`; empty where nothing tells."""
        if not self.before < done < total:
            return ""
        rest = (monotonic() - self.began) / (done - self.before) * (total - done)
        return f"about {duration(rest)} left"


@contextmanager
def progress(pace: Pace | None = None) -> Iterator[Tell]:
    """Yield what is told of progress: a bar on a terminal, elsewhere a line every half minute; nothing with `--quiet`."""
    pace = pace or Pace()
    if is_quiet():
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bar(pace) as tell:
            yield tell
    else:
        with _lines(pace) as tell:
            yield tell


@contextmanager
def _lines(pace: Pace) -> Iterator[Tell]:
    """Say a line from time to time, also while nothing is told: one fit may take minutes."""
    said, now = monotonic(), ("", 0.0, 0.0)
    lock, ended = Lock(), Event()

    def say_now() -> None:
        nonlocal said
        with lock:
            if now[0] and monotonic() - said >= EVERY:
                said = monotonic()
                say(status(*now, pace.left(*now[1:])))

    def tell(what: str, done: float, total: float) -> None:
        nonlocal now
        now = (what, done, total)
        say_now()

    def watch() -> None:
        while not ended.wait(TICK):
            say_now()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield tell
    finally:
        ended.set()
        watcher.join()


def status(what: str, done: float, total: float, left: str) -> str:
    """Return a line of progress, its beginning shortened to fit 60 columns; what counts by itself needs no percents."""
    counts = " of " in what
    share = f"{100 * done / total:.0f} %" if total and not counts else ""
    end = ", ".join(filter(None, [share, left]))
    return (", " if counts else ": ").join(filter(None, [short(what, COLUMNS - len(end) - 2), end]))


@contextmanager
def _bar(pace: Pace) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    narrow = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=narrow), BarColumn(max(8, min(40, width() - 50))),
        TaskProgressColumn(), TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=None, left="")

        def tell(what: str, done: float, total: float) -> None:
            bar.update(
                task, completed=done, total=total or None, description=printable(what), left=pace.left(done, total)
            )

        yield tell


@contextmanager
def fitting(sizes: Mapping[str, int]) -> Iterator[Callable[[Any, Any], None]]:
    """Yield the callback of a conversion: a bar weighted by bytes on a terminal, elsewhere lines of what is done.

    Args:
        sizes: bytes of every weight that will be fitted, as it is dense; empty where it is not known before.
    """
    pace, done, number, before, total = Pace(), 0, 0, 0, sum(sizes.values())

    def so_far() -> str:
        counts = f"{number} of {len(sizes)} weights" if sizes else f"{number} weights"
        return ", ".join(filter(None, [counts, out_of(done, total)]))

    with progress(pace) as tell:
        if not sys.stderr.isatty():
            tell(so_far(), 0, total)

        def callback(job: Any, encoded: Any) -> None:
            nonlocal done, number, before
            number, done = number + 1, done + sizes.get(job.name, 0)
            of = {"bytes": sum(job.nbytes.values())}
            if encoded is None:  # fitted by an earlier run: no speed is learnt from it
                pace.skip(done)
                before += 1
                facts = "done before"
                event("done before", job.name, **of)
            else:
                facts = f"{fit_error(encoded)}{encoded.seconds:.1f} s"
                errors = {"error": encoded.error, "output_error": encoded.output_error}
                event("fit", job.name, seconds=encoded.seconds, **errors, **of)
            detail(f"[{number}{f'/{len(sizes)}' if sizes else ''}] {job.name}: {facts}")
            tell(job.name[-40:] if sys.stderr.isatty() else so_far(), done, total)

        yield callback
    if before:
        say(f"{before} of {number} weights were there already, from a run that was stopped")


def fit_error(encoded: "Encoded") -> str:
    """Return the error of a fit as the beginning of a line: that of outputs where inputs were given."""
    of, error = ("weight", encoded.error) if encoded.output_error is None else ("output", encoded.output_error)
    return "" if error is None else f"{of} error {error:.2g}, "


def sending(what: str, done: float, total: float) -> None:
    """Say of a folder that is sent to an address which file is next."""
    say(f"{what}, {out_of(done, total)} are there")


def out_of(done: float, total: float) -> str:
    """Return bytes of bytes in the unit of the whole: `1.2 of 4.0 GB`; empty where there are none."""
    scale, unit = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / scale:.1f} of {total / scale:.1f} {unit}" if total else ""
