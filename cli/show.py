"""What people see: results on stdout, progress on stderr."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from rpq_convert.showing import duration, printable

from .talk import event, is_quiet, say

if TYPE_CHECKING:
    from rpq_convert.planning.plan import Plan
    from rpq_convert.report.schema import Report

Tell = Callable[[str, float, float], None]  # what is done now, how much of it all is done, and how much it all is
EVERY = 5.0  # seconds between two lines of progress at least, where no terminal shows a bar


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
    """Yield what is told of progress: a bar on a terminal, elsewhere a line every few seconds; nothing with `--quiet`."""
    pace = pace or Pace()
    if is_quiet():
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bar(pace) as tell:
            yield tell
    else:
        yield _lines(pace)


def _lines(pace: Pace) -> Tell:
    said = monotonic()

    def tell(what: str, done: float, total: float) -> None:
        nonlocal said
        if monotonic() - said >= EVERY:
            said = monotonic()
            left = pace.left(done, total)
            share = f"{100 * done / total:.0f} %" if total else ""
            say(": ".join(filter(None, [what, ", ".join(filter(None, [share, left]))])))

    return tell


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
    """Yield the callback of a conversion: a bar weighted by parameters on a terminal, a line per fit in a log.

    Args:
        sizes: parameters of every weight that will be fitted; empty where it is not known before.
    """
    pace, done, number, total = Pace(), 0, 0, sum(sizes.values())
    with progress(pace) as tell:

        def callback(job: Any, encoded: Any) -> None:
            nonlocal done, number
            number, done = number + 1, done + sizes.get(job.name, 0)
            if encoded is None:  # fitted by an earlier run: no speed is learnt from it
                pace.skip(done)
                facts = "done before"
            else:
                of, error = (
                    ("weight", encoded.error) if encoded.output_error is None else ("output", encoded.output_error)
                )
                facts = ("" if error is None else f"{of} error {error:.2g}, ") + f"{encoded.seconds:.1f} s"
                event("fit", job.name, seconds=encoded.seconds, error=encoded.error, bytes=sum(job.nbytes.values()))
            if sys.stderr.isatty():
                tell(job.name[-40:], done, total)
            else:
                facts = ", ".join(filter(None, [facts, pace.left(done, total)]))
                say(f"[{number}{f'/{len(sizes)}' if sizes else ''}] {job.name}: {facts}")

        yield callback
