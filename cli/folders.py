"""The commands for a converted folder: its audit, tuning, checks, the way back."""

import json as jsonlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from rpq_convert.conversion.options import TimeOptions
from rpq_convert.showing import printable
from rpq_convert.storage.addresses import destination
from rpq_convert.storage.options import HubOptions, SourceOptions
from rpq_convert.storage.room import check_file, check_free
from rpq_convert.tuning.options import TuneOptions

from . import checks
from . import options as o
from .app import examples, group
from .checks import unused
from .errors import catching
from .show import fitting, progress, show_report, width
from .talk import say

if TYPE_CHECKING:
    from rpq_convert.checkpoint.against import Comparison


@group.command(epilog=examples("rpq audit opt-125m-rpq", "rpq audit opt-125m-rpq --format html --output audit.html"))
@catching
@o.with_options
def audit(
    folder: Annotated[str, Argument(metavar="FOLDER", help="A folder that rpq-convert wrote, or its repository's id.")],
    source: HubOptions,
    format: Annotated[
        Literal["terminal", "json", "markdown", "csv", "html"] | None,
        Option(help="How to write it; for a terminal by default."),
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE", help="Write to a file instead of stdout.")
    ] = None,
    json: Annotated[bool, Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show a converted folder's size audit: every tensor, its bytes and its measured error."""
    if json and format not in (None, "json"):
        raise typer.BadParameter(f"--json and --format {format} contradict each other", param_hint="--json")
    if output is not None:
        check_file(output)
    checks.converted(folder, source)
    from rpq_convert.checkpoint.verifying import audit as read

    report = read(folder, **source.hub)
    views = {
        "terminal": lambda: report.to_terminal(width()), "json": report.to_json, "markdown": report.to_markdown,
        "csv": report.to_csv, "html": report.to_html,
    }  # fmt: skip
    text = views["json" if json else format or "terminal"]().rstrip("\n")
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", "utf8")
        say(f"wrote {output}")


@group.command(epilog=examples("rpq tune opt-125m/ opt-125m-rpq --data wikitext-train.txt --out opt-125m-tuned"))
@catching
@o.with_options
def tune(
    base: o.Base,
    folder: o.OutputFolder,
    data: o.Data,
    out: o.OutFolder,
    options: TuneOptions,
    source: HubOptions,
    running: TimeOptions,
    blocks: Annotated[
        int, Option(min=0, help="Steps on each transformer block alone, before all are tuned together.")
    ] = 0,
    bfloat16: Annotated[
        bool, Option("--bfloat16", help="Multiply in bfloat16: faster where the processor has it.")
    ] = False,
    window: Annotated[int | None, Option(min=2, help="Tokens of one window; 256 by default.")] = None,
    samples: Annotated[int, Option(min=2, help="Windows, lines or pictures.")] = 512,
    text_field: o.TextField = None,
    factory: o.Factory = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Train a converted model's codebooks, scales, norms and biases against its base; with --recode also codes. 'self' as data: synthetic inputs."""
    o.find_modules(factory)
    own = str(data) == "self"
    checks.needs("--text-field", text_field, "a table as --data", not own)
    checks.needs("--window", window, "a text as --data", not own)
    checks.pair(base, folder, factory, source)
    if not own:
        checks.data(data, "--data", field=text_field, window=window)
    check_free(o.apart_from(Path(base), Path(folder), out=out), overwrite=overwrite)
    if options.steps == 0 and blocks == 0:
        raise unused("--steps", "no step is taken; give some, or --blocks")
    from rpq_convert.folders import Given, tune_folder

    which = checks.with_base(base, folder, factory, source)
    options = replace(options, autocast="bfloat16" if bfloat16 else None)
    with progress() as tell:
        found = tune_folder(
            which, out, Given(None if own else data, window or 256, samples, text_field), options, blocks=blocks,
            overwrite=overwrite, run=running, say=say, progress=tell,
        )  # fmt: skip
    print(found.to_json() if json else printable(str(found), lines=True))


@group.command(
    epilog=examples(
        "rpq recalibrate opt-125m/ opt-125m-rpq --data wikitext-train.txt --out opt-125m-fed",
        "rpq recalibrate opt-125m/ opt-125m-rpq --data self --out opt-125m-fed",
    )
)
@catching
@o.with_options
def recalibrate(
    base: o.Base,
    folder: o.OutputFolder,
    data: o.Data,
    out: o.OutFolder,
    source: HubOptions,
    samples: o.Samples = None,
    text_field: o.TextField = None,
    factory: o.Factory = None,
    workers: o.Workers = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Fit a converted model to its inputs, from the codebooks that it has; 'self' as data: synthetic inputs."""
    o.find_modules(factory)
    own = str(data) == "self"
    checks.needs("--text-field", text_field, "a table as --data", not own)
    checks.pair(base, folder, factory, source)
    if not own:
        checks.data(data, "--data", field=text_field)
    check_free(o.apart_from(Path(base), Path(folder), out=out), overwrite=overwrite)
    from rpq_convert.folders import Given, coded_sizes, recalibrate_folder

    which = checks.with_base(base, folder, factory, source)
    with fitting(coded_sizes(which.folder)) as callback:
        report = recalibrate_folder(
            which, out, Given(None if own else data, samples=samples, field=text_field), workers=workers, overwrite=overwrite,
            say=say, progress=callback,
        )  # fmt: skip
    show_report(report, json=json)


@group.command(
    epilog=examples(
        "rpq verify opt-125m-rpq",
        "rpq verify opt-125m-rpq --quick",
        "rpq verify opt-125m-rpq --against opt-125m/ --all",
    )
)
@catching
@o.with_options
def verify(
    folder: o.OutputFolder,
    source: HubOptions,
    quick: Annotated[
        bool, Option("--quick", help="Only sizes, headers, index and manifest: no weight is read, whatever its size.")
    ] = False,
    against: Annotated[
        str | None,
        Option(metavar="SRC", help="Compare with the checkpoint that it was made from: fit a few weights again."),
    ] = None,
    all: Annotated[bool, Option("--all", help="With --against: look at every tensor.")] = False,
    factory: o.Factory = None,
    json: o.Json = False,
) -> None:
    """Check a converted folder: hashes, headers, index, shapes, and that every number is finite."""
    checks.needs("--all", all, "--against", against is not None)
    checks.needs("--factory", factory, "--against", against is not None)
    if quick and against is not None:
        raise unused("--quick", "--against reads weights; leave one out")
    o.find_modules(factory)
    if against is not None:
        checks.pair(against, folder, factory, source)
    checks.token_unused(source, checks.named(folder, source))
    from rpq_convert.checkpoint.verifying import here
    from rpq_convert.checkpoint.verifying import verify as check
    from rpq_convert.storage.files import files_in

    place = here(folder, source)
    sizes = {name: file.stat().st_size for name, file in files_in(place).items()}
    seen: list[str] = []
    with progress() as tell:

        def told(name: str) -> None:
            seen.append(name)
            tell(name, sum(sizes[s] for s in seen), sum(sizes.values()))

        files = check(place, told, quick=quick)
    compared = None if against is None else _compared(place, against, factory, every=all)
    if json:
        print(
            jsonlib.dumps({"folder": str(folder), "files": files} | ({"against": asdict(compared)} if compared else {}))
        )
    else:
        print(printable(f"{folder} is whole: {len(files)} files checked" + (", without hashes" if quick else "")))
        if compared:
            print(printable(f"against {against}: {compared}"))


def _compared(folder: Path, src: str, factory: str | None, *, every: bool) -> "Comparison":
    from rpq_convert.checkpoint.against import compare_with_source

    with progress() as tell:
        return compare_with_source(folder, src, SourceOptions(factory=factory), every=every, progress=tell)


@group.command(epilog=examples("rpq restore opt-125m-rpq opt-125m-dense"))
@catching
@o.with_options
def restore(
    folder: o.OutputFolder,
    source: HubOptions,
    out: Annotated[Path, Argument(metavar="OUT", help="Where to write the dense checkpoint.")],
    overwrite: o.Overwrite = False,
) -> None:
    """Write a plain dense checkpoint from a converted folder."""
    o.apart(Path(folder), out)
    checks.converted(folder, source)
    check_free(out, overwrite=overwrite)
    from rpq_convert.checkpoint.restoring import restore_checkpoint

    with progress() as tell:
        written = restore_checkpoint(folder, out, overwrite=overwrite, progress=tell, **source.hub)
    print(f"{destination(out) or out}: {written.file_bytes:,} bytes of dense weights")
