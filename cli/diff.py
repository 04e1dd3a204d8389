"""`rpq diff`: converted folders, reports and plans side by side. Reports are read without torch; plans need it for their sizes."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from rpq_convert.errors import SourceError
from rpq_convert.report.schema import read_report
from rpq_convert.storage.records import REPORT
from rpq_convert.storage.room import check_file

from . import options as o
from .app import examples, group
from .checks import named
from .errors import catching
from .show import width
from .talk import say

if TYPE_CHECKING:
    from rpq_convert.report.schema import Report


@group.command(
    epilog=examples(
        "rpq diff opt-125m-2bit opt-125m-4bit opt-125m-8bit",
        "rpq diff opt-125m-4bit opt-125m-tuned --html diff.html",
        "rpq diff plan-4bit.json opt-125m-4bit",
    )
)
@catching
def diff(
    paths: Annotated[
        list[Path],
        Argument(
            metavar="A B …",
            help="Two or more converted folders, reports (rpq audit --json) or plans (rpq plan --json).",
        ),
    ],
    html: Annotated[
        Path | None, Option("--html", metavar="FILE", help="Write the comparison as one HTML file.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Show what differs between converted folders or plans: sizes, quality, errors, options, groups of parameters."""
    if len(paths) < 2:
        raise typer.BadParameter("give two or more folders, reports or plans to compare", param_hint="A B …")
    if html is not None:
        check_file(html, (".html", ".htm"))
    from rpq_convert.report.compare import compare

    found = compare([(str(path), _report(path)) for path in paths])
    if html is not None:
        html.write_text(found.to_html(), "utf8")
        say(f"wrote {html}")
    if json:
        print(found.to_json())
    elif html is None:
        print(found.to_terminal(width()))


def _report(path: Path) -> "Report":
    """Return the report of a converted folder, or what a report or a plan says.

    Raises:
        SourceError: there is none of these.
    """
    if path.is_dir():
        if not (path / REPORT).is_file():
            raise SourceError(
                f"{path} has no {REPORT}: it is no converted folder; give folders that rpq-convert wrote, reports or plans"
            )
        return read_report(path / REPORT)
    if not path.is_file():
        named(path)
        raise SourceError(f"{path} does not exist; give converted folders, reports or plans")
    if not _is_plan(path):
        return read_report(path)
    from rpq_convert.planning.plan import Plan
    from rpq_convert.schemas import kinds
    from rpq_convert.schemas.checking import read_json

    return Plan.from_dict(read_json(path, kinds.PLAN, SourceError), str(path)).report(path.stem)


def _is_plan(path: Path) -> bool:
    try:
        data = jsonlib.loads(path.read_bytes())
    except ValueError:
        return False  # what reads reports says why it is none
    return isinstance(data, dict) and "jobs" in data
