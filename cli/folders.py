"""The commands for a converted folder: its audit, what it still knows, tuning, checks, the way back."""

import json as jsonlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from rpq_convert.showing import printable
from rpq_convert.storage.options import HubOptions
from rpq_convert.storage.room import check_file, check_free
from rpq_convert.tuning.options import TuneOptions

from . import checks
from . import options as o
from .app import examples, group
from .checks import unused
from .errors import catching
from .show import fitting, progress, show_report, width
from .talk import say


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
    checks.report_of(folder, source)
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


@group.command(
    epilog=examples(
        "rpq eval opt-125m/ opt-125m-rpq --text wikitext.txt --save",
        "rpq eval minilm/ minilm-rpq --pairs stsb.csv",
        "rpq eval net.safetensors net-rpq --factory mymodel:build --inputs test.safetensors",
    )
)
@catching
def eval(
    base: o.Base,
    folder: o.OutputFolder,
    text: Annotated[Path | None, Option(metavar="FILE", help="Text to measure on; not what a fit has seen.")] = None,
    pairs: Annotated[
        Path | None,
        Option(metavar="FILE.csv", help="Sentence, sentence, score: the rank correlation of cosines and scores."),
    ] = None,
    inputs: Annotated[
        Path | None,
        Option(
            metavar="PATH",
            help="Tensors named after the arguments of the model's forward (.safetensors), with labels for accuracy; or a folder of pictures.",
        ),
    ] = None,
    factory: o.Factory = None,
    window: Annotated[int | None, Option(min=2, help="Tokens of one window; 512 by default.")] = None,
    text_field: o.TextField = None,
    windows: Annotated[int | None, Option(min=1, help="At most so many windows, lines, pairs or samples.")] = None,
    layers: Annotated[bool, Option("--layers", help="Measure what each converted layer adds as well.")] = False,
    save: Annotated[bool, Option("--save", help="Write the result into FOLDER's report and model card.")] = False,
    json: o.Json = False,
) -> None:
    """Compare a converted model with its base: perplexity, divergence and agreement; cosines; a task's score; accuracy."""
    o.find_modules(factory)
    checks.pair(base, folder, factory)
    if save:
        checks.report_to_write(folder)
    checks.evaluated(text, pairs, inputs, field=text_field, window=window)
    from rpq_convert.folders import WithBase, evaluate_folder

    with progress() as tell:
        found = evaluate_folder(
            WithBase(base, folder, factory), text=text, pairs=pairs, inputs=inputs, window=window or 512, windows=windows, field=text_field,
            layers=layers, keep=save, say=say, progress=tell,
        )  # fmt: skip
    print(found.to_json() if json else printable(str(found), lines=True))


@group.command(epilog=examples("rpq tune opt-125m/ opt-125m-rpq --data wikitext-train.txt --out opt-125m-tuned"))
@catching
@o.with_options
def tune(
    base: o.Base,
    folder: o.OutputFolder,
    data: o.Data,
    out: o.OutFolder,
    options: TuneOptions,
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
    """Train a converted model's codebooks, scales, norms and biases against its base; with --recode also codes."""
    o.find_modules(factory)
    checks.pair(base, folder, factory)
    checks.data(data, "--data", field=text_field, window=window)
    check_free(o.apart_from(base, folder, out=out), overwrite=overwrite)
    if options.steps == 0 and blocks == 0:
        raise unused("--steps", "no step is taken; give some, or --blocks")
    from rpq_convert.folders import WithBase, tune_folder

    options = replace(options, autocast="bfloat16" if bfloat16 else None)
    with progress() as tell:
        found = tune_folder(
            WithBase(base, folder, factory), out, data, options, window=window or 256, samples=samples, field=text_field,
            blocks=blocks, overwrite=overwrite, say=say, progress=tell,
        )  # fmt: skip
    print(found.to_json() if json else printable(str(found), lines=True))


@group.command(
    epilog=examples(
        "rpq recalibrate opt-125m/ opt-125m-rpq --data wikitext-train.txt --out opt-125m-fed",
        "rpq recalibrate opt-125m/ opt-125m-rpq --data self --out opt-125m-fed",
    )
)
@catching
def recalibrate(
    base: o.Base,
    folder: o.OutputFolder,
    data: o.Data,
    out: o.OutFolder,
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
    checks.pair(base, folder, factory)
    if not own:
        checks.data(data, "--data", field=text_field)
    check_free(o.apart_from(base, folder, out=out), overwrite=overwrite)
    from rpq_convert.folders import WithBase, coded_sizes, recalibrate_folder

    with fitting(coded_sizes(folder)) as callback:
        report = recalibrate_folder(
            WithBase(base, folder, factory), out, None if own else data, samples=samples, field=text_field, workers=workers,
            overwrite=overwrite, say=say, progress=callback,
        )  # fmt: skip
    show_report(report, json=json)


@group.command(epilog=examples("rpq verify opt-125m-rpq", "rpq verify opt-125m-rpq --quick"))
@catching
def verify(
    folder: o.OutputFolder,
    quick: Annotated[
        bool, Option("--quick", help="Only sizes, headers, index and manifest: no weight is read, whatever its size.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Check a converted folder: hashes, headers, index, shapes, and that every number is finite."""
    checks.misspelt(folder)
    from rpq_convert.checkpoint.verifying import verify as check
    from rpq_convert.storage.files import files_in

    sizes = {name: file.stat().st_size for name, file in files_in(folder).items()}
    seen: list[str] = []
    with progress() as tell:

        def told(name: str) -> None:
            seen.append(name)
            tell(name, sum(sizes[s] for s in seen), sum(sizes.values()))

        files = check(folder, told, quick=quick)
    print(
        jsonlib.dumps({"folder": str(folder), "files": files})
        if json
        else printable(f"{folder} is whole: {len(files)} files checked" + (", without hashes" if quick else ""))
    )


@group.command(epilog=examples("rpq restore opt-125m-rpq opt-125m-dense"))
@catching
def restore(
    folder: o.OutputFolder,
    out: Annotated[Path, Argument(metavar="OUT", help="Where to write the dense checkpoint.")],
    overwrite: o.Overwrite = False,
) -> None:
    """Write a plain dense checkpoint from a converted folder."""
    o.apart(folder, out)
    checks.converted(folder)
    check_free(out, overwrite=overwrite)
    from rpq_convert.checkpoint.restoring import restore_checkpoint

    with progress() as tell:
        written = restore_checkpoint(folder, out, overwrite=overwrite, progress=tell)
    print(f"{out}: {written.file_bytes:,} bytes of dense weights")


@group.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples("rpq serve smollm2-rpq", "rpq serve smollm2-rpq --port 9000 --log-level info"),
)
@catching
def serve(context: typer.Context, folder: o.OutputFolder) -> None:
    """Serve a converted language model over HTTP as OpenAI's interface: `transformers serve`, which takes all other options."""
    checks.converted(folder)
    from rpq_convert.integrations.serving import serve as run

    run([str(folder), *context.args])
