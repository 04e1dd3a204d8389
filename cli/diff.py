"""`rpq diff`: converted folders, reports and plans side by side. Reports are read without torch; plans
need it for their sizes."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from rpq_convert.errors import SourceError
from rpq_convert.report.schema import read_report
from rpq_convert.storage.options import HubOptions
from rpq_convert.storage.records import REPORT
from rpq_convert.storage.room import check_file
from rpq_convert.storage.sources import did_you_mean, is_remote, located

from . import options as o
from .app import examples, group
from .checks import named, token_unused
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
        "rpq diff me/opt-125m-4bit https://huggingface.co/me/opt-125m-rpq/tree/2bit",
    )
)
@catching
@o.with_options
def diff(
    paths: Annotated[
        list[str],
        Argument(
            metavar="A B …",
            help="Two or more converted folders, ids of their repositories, reports (rpq audit --json) or plans (rpq plan --json).",
        ),
    ],
    source: HubOptions,
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

    token_unused(source, *paths)
    if all(Path(p).exists() for p in paths):
        located(paths[0], source)  # refuses a revision
    found = compare([_report(path, source) for path in paths])
    if html is not None:
        html.write_text(found.to_html(), "utf8")
        say(f"wrote {html}")
    if json:
        print(found.to_json())
    elif html is None:
        print(found.to_terminal(width()))


def _report(given: str, options: HubOptions) -> tuple[str, "Report"]:
    """Return a name, and the report of a converted folder or repository, or what a report or a plan says.

    Args:
        options: of the hub; a revision is that of repositories whose address has none.

    Raises:
        SourceError: there is none of these. HubError: what the hub refuses.
    """
    if not Path(given).exists():
        place, asked = located(given, options)
        named(place)
        if not is_remote(place):
            hint = did_you_mean(given) or "; give converted folders, ids of their repositories, reports or plans"
            raise SourceError(f"{given} does not exist{hint}")
        from rpq_convert.checkpoint.verifying import audit

        name = f"{place}@{asked.revision}" if asked.revision else str(place)
        return name, audit(place, **asked.hub)
    return given, _local(Path(given))


def _local(path: Path) -> "Report":
    if path.is_dir():
        if not (path / REPORT).is_file():
            raise SourceError(
                f"{path} has no {REPORT}: it is no converted folder; give folders that rpq-convert wrote, reports or plans"
            )
        return read_report(path / REPORT)
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
