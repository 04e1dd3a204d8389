"""The commands: each reads its options, calls one function of the library and shows what it returns."""

import json as jsonlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from rpq_convert.errors import FolderError, SourceError
from rpq_convert.planning.options import PlanOptions
from rpq_convert.showing import printable
from rpq_convert.storage.options import HubOptions, SourceOptions
from rpq_convert.tuning.options import TuneOptions

from . import options as o
from .errors import catching
from .show import fits, progress, say, show_report, warn, width

if TYPE_CHECKING:
    from rpq_convert.checkpoint.opening import Opened

SETTINGS: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "add_completion": False}
EXIT_CODES = (
    "Exit codes: 0 done, 2 usage, 3 plan, 4 input or output, 5 verification, 130 interrupted (run again to go on)."
)


def examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines), EXIT_CODES])


group = typer.Typer(
    **SETTINGS,
    help="Make neural networks small: product-quantize their weights.",
    epilog=examples(
        "rpq plan facebook/opt-125m --bits 4", "rpq convert facebook/opt-125m --bits 4", "rpq audit opt-125m-rpq"
    ),
)
main = typer.Typer(**SETTINGS)
CONVERT_EPILOG = examples(
    "rpq-convert facebook/opt-66b --codebooks heads",
    "rpq-convert facebook/opt-125m --bits 4 --rule 'type:Embedding:bits=8' --exclude '*lm_head*'",
    "rpq-convert weights.safetensors --factory mymodel:build --out small",
)


@main.command(epilog=CONVERT_EPILOG)
@group.command(epilog=CONVERT_EPILOG)
@catching
@o.with_options
def convert(
    src: o.Source,
    options: PlanOptions,
    source: SourceOptions,
    out: Annotated[
        Path | None,
        Option("--out", "-o", metavar="FOLDER", help="Where to write; the source's name and -rpq by default."),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], Option(help="Where fits run; in this version on the CPU.")] = "cpu",
    calibrate: Annotated[
        str | None,
        Option(
            metavar="PATH|self",
            help=f"Fit each layer to its inputs on {o.DATA}; or 'self': on synthetic inputs (text that a language model writes, tokens, noise).",
        ),
    ] = None,
    samples: o.Samples = None,
    workers: Annotated[int | None, Option(min=1, help="Fits at once; up to 4 by default.")] = None,
    executor: Annotated[Literal["serial", "threads", "processes"], Option(help="How fits run.")] = "threads",
    dry_run: Annotated[bool, Option("--dry-run", help="Show the plan and the exact sizes; write nothing.")] = False,
    push_to: Annotated[
        str | None, Option(metavar="REPO", help="Upload the result to this repository of the hub.")
    ] = None,
    public: o.Public = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Convert a checkpoint into a folder of RPQ weights, tensor by tensor, whatever its size."""
    if device != "cpu":
        raise typer.BadParameter("fits run on the CPU in this version; use --device cpu", param_hint="--device")
    folder = o.output_for(src, out)
    from rpq_convert.calibration.sensitivity import needs_sensitivities
    from rpq_convert.checkpoint.metadata import make_report
    from rpq_convert.checkpoint.opening import open_checkpoint
    from rpq_convert.conversion.plans import plan_opened
    from rpq_convert.conversion.streaming import convert_opened

    if not dry_run and folder.exists() and not overwrite:  # said before a download, not after
        raise FolderError(f"{folder} already exists; choose another folder or pass --overwrite")
    if push_to and not dry_run:
        from rpq_convert.checkpoint.publishing import check_login

        check_login(push_to, token=source.token)  # hours before the upload
    opened = open_checkpoint(src, source, need="headers")
    if opened.model is None and not dry_run:
        raise SourceError(f"{src} has no config.json: give --factory package:callable, which builds its model")
    data = None if calibrate is None else _calibration(calibrate, opened, samples, options.seed)
    if needs_sensitivities(options) and (not dry_run or Path(src).exists()):
        if not quiet:
            say("measuring what the model is sensitive to")
        opened = opened.fetched()
        if callable(data) and opened.model is not None:
            data = data(opened.filled())  # written once, for the measurement and the fit
    plan = plan_opened(opened, options, data=data)
    warn(plan.warnings)
    if dry_run:
        return show_report(make_report(plan, {}, title=o.name_of(src)), json=json)
    with progress(plan, quiet=quiet) as callback:
        report = convert_opened(
            opened.fetched(),
            folder,
            plan,
            data,
            overwrite=overwrite,
            executor=executor,
            workers=workers,
            progress=callback,
        )
    warn(tuple(w for w in report.warnings if w not in plan.warnings))
    show_report(report, json=json)
    if not quiet:
        say(f"wrote {folder}")
    if push_to:
        _push(folder, push_to, public=public, token=source.token)


def _calibration(where: str, opened: "Opened", samples: int | None, seed: int) -> Any:
    """Return the inputs to calibrate on, or the function of the dense model that makes them."""
    from rpq_convert.inputs.files import read_inputs
    from rpq_convert.inputs.synthetic import own_inputs

    if opened.options.factory is not None and not where.endswith(".safetensors"):
        raise typer.BadParameter(
            "a factory's model has no tokenizer; give a .safetensors file of its arguments", param_hint="--calibrate"
        )
    some: dict[str, Any] = {} if samples is None else {"samples": samples}
    if where == "self":
        return partial(own_inputs, seed=seed, **some)
    return read_inputs(where, opened.src, model=opened.model, **opened.options.hub, **some)


def _push(folder: Path, repo: str, *, public: bool, token: str | bool | None, revision: str | None = None) -> None:
    from rpq_convert.checkpoint.publishing import push

    say(f"pushed to {push(folder, repo, private=not public, token=token, revision=revision)}")


@group.command(
    epilog=examples("rpq push opt-125m-rpq me/opt-125m-rpq", "rpq push opt-125m-2bit me/opt-125m-rpq --revision 2bit")
)
@catching
def push(
    folder: o.OutputFolder,
    repo: Annotated[str, Argument(metavar="REPO", help="user/name, or name; made if it does not exist.")],
    public: o.Public = False,
    revision: Annotated[str | None, Option(help="Branch to push to; made if it does not exist.")] = None,
    token: Annotated[
        str | None,
        Option(help="Access token of the hub; HF_TOKEN or `hf auth login` keep it out of the shell's history."),
    ] = None,
) -> None:
    """Verify a converted folder and upload it to the hub, in one commit; private unless --public."""
    _push(folder, repo, public=public, token=token, revision=revision)


@group.command(
    epilog=examples(
        "rpq plan facebook/opt-66b --codebooks heads",
        "rpq plan model/ --bits 2 --explain layers.0.fc1",
        "rpq plan model/ --target-size 50MB",
        "rpq plan model/ --sweep --sweep-out curve.svg",
    )
)
@catching
@o.with_options
def plan(
    src: o.Source,
    options: PlanOptions,
    source: SourceOptions,
    explain: Annotated[str | None, Option(metavar="NAME", help="Say what happens to one parameter, and why.")] = None,
    sweep: Annotated[bool, Option("--sweep", help="Show the whole curve of size against expected quality.")] = False,
    sweep_out: Annotated[
        Path | None, Option(metavar="FILE.svg", help="Draw the curve into a file as well; implies --sweep.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Show what a conversion would do, and the exact sizes; a hub id costs kilobytes.

    Weights are read only where they are at hand and sizes are to be chosen: to measure what the model is sensitive to.
    """
    if sweep or sweep_out is not None:
        return _sweep(src, sweep_out, json, options, source)
    from rpq_convert.calibration.sensitivity import needs_sensitivities
    from rpq_convert.checkpoint.metadata import make_report
    from rpq_convert.conversion.plans import open_target, plan_opened

    made = plan_opened(open_target(src, source, measured=needs_sensitivities(options)), options)
    warn(made.warnings)
    if explain is not None:
        text = printable(made.explain(explain), lines=True)
        print(jsonlib.dumps({"name": explain, "explanation": text}) if json else text)
    elif json:
        print(made.to_json())
    else:
        show_report(make_report(made, {}, title=o.name_of(src)), json=False)


def _sweep(src: str, file: Path | None, json: bool, options: PlanOptions, source: SourceOptions) -> None:
    sizes = ("preset", "bits", "target_size", "max_error", "codebooks", "dim")
    if sized := [k for k in sizes if getattr(options, k) is not None]:
        raise typer.BadParameter(f"the curve shows every size; leave out {', '.join(sized)}", param_hint="--sweep")
    from rpq_convert.conversion.plans import open_target, sweep_opened

    curve = sweep_opened(open_target(src, source, measured=True), options)
    warn(curve.warnings)
    if file is not None:
        file.write_text(curve.to_svg(o.name_of(src)), "utf8")
        say(f"wrote {file}")
    print(curve.to_json() if json else curve)


@group.command(epilog=examples("rpq audit opt-125m-rpq", "rpq audit opt-125m-rpq --format html --output audit.html"))
@catching
@o.with_options
def audit(
    folder: Annotated[str, Argument(metavar="FOLDER", help="A folder that rpq-convert wrote, or its repository's id.")],
    source: HubOptions,
    format: Annotated[
        Literal["terminal", "json", "markdown", "csv", "html"], Option(help="How to write it.")
    ] = "terminal",
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE", help="Write to a file instead of stdout.")
    ] = None,
    json: Annotated[bool, Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show a converted folder's size audit: every tensor, its bytes and its measured error."""
    from rpq_convert.checkpoint.verifying import audit as read

    report = read(folder, **source.hub)
    views = {
        "terminal": lambda: report.to_terminal(width()), "json": report.to_json, "markdown": report.to_markdown,
        "csv": report.to_csv, "html": report.to_html,
    }  # fmt: skip
    text = views["json" if json else format]().rstrip("\n")
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", "utf8")
        say(f"wrote {output}")


@group.command(epilog=examples("rpq diff opt-125m-2bit opt-125m-4bit"))
@catching
def diff(
    a: Annotated[Path, Argument(metavar="A", help="A converted folder.")],
    b: Annotated[Path, Argument(metavar="B", help="Another, usually of the same model.")],
) -> None:
    """Show what differs in size and error between two converted folders."""
    from rpq_convert.checkpoint.verifying import audit as read
    from rpq_convert.report.text import diff as compare

    print(printable(compare(read(a), read(b)), lines=True))


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
    window: Annotated[int, Option(min=2, help="Tokens of one window.")] = 512,
    windows: Annotated[int | None, Option(min=1, help="At most so many windows, lines, pairs or samples.")] = None,
    layers: Annotated[bool, Option("--layers", help="Measure what each converted layer adds as well.")] = False,
    save: Annotated[bool, Option("--save", help="Write the result into FOLDER's report and model card.")] = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Compare a converted model with its base: perplexity, divergence and agreement; cosines; a task's score; accuracy."""
    if sum(x is not None for x in (text, pairs, inputs)) != 1:
        raise typer.BadParameter("give one of --text, --pairs and --inputs to measure on", param_hint="rpq eval")
    o.find_modules(factory)
    from rpq_convert.folders import evaluate_folder

    found = evaluate_folder(
        base, folder, text=text, pairs=pairs, inputs=inputs, factory=factory, window=window, windows=windows,
        layers=layers, keep=save, say=None if quiet else say,
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
    window: Annotated[int, Option(min=2, help="Tokens of one window.")] = 256,
    samples: Annotated[int, Option(min=2, help="Windows, lines or pictures.")] = 512,
    factory: o.Factory = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Train a converted model's codebooks, scales, norms and biases against its base; with --recode also codes."""
    import torch

    o.find_modules(factory)
    from rpq_convert.folders import tune_folder

    options = replace(options, autocast=torch.bfloat16 if bfloat16 else None)
    found = tune_folder(
        base, folder, out, data, options, factory=factory, window=window, samples=samples, blocks=blocks, overwrite=overwrite,
        say=None if quiet else say,
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
    factory: o.Factory = None,
    workers: Annotated[int | None, Option(min=1, help="Fits at once; up to 4 by default.")] = None,
    overwrite: o.Overwrite = False,
    quiet: o.Quiet = False,
    json: o.Json = False,
) -> None:
    """Fit a converted model to its inputs, from the codebooks that it has; 'self' as data: synthetic inputs."""
    o.find_modules(factory)
    from rpq_convert.folders import recalibrate_folder

    report = recalibrate_folder(
        base, folder, out, None if str(data) == "self" else data, factory=factory, samples=samples, workers=workers,
        overwrite=overwrite, progress=None if quiet else fits(),
    )  # fmt: skip
    show_report(report, json=json)


@group.command(epilog=examples("rpq verify opt-125m-rpq"))
@catching
def verify(folder: o.OutputFolder, json: o.Json = False) -> None:
    """Check a converted folder: hashes, headers, index, shapes, and that every number is finite."""
    from rpq_convert.checkpoint.verifying import verify as check

    files = check(folder)
    print(
        jsonlib.dumps({"folder": str(folder), "files": files})
        if json
        else printable(f"{folder} is whole: {len(files)} files checked")
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
    from rpq_convert.checkpoint.restoring import restore_checkpoint

    written = restore_checkpoint(folder, out, overwrite=overwrite)
    print(f"{out}: {written.file_bytes:,} bytes of dense weights")


@group.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples("rpq serve smollm2-rpq", "rpq serve smollm2-rpq --port 9000 --log-level info"),
)
@catching
def serve(context: typer.Context, folder: o.OutputFolder) -> None:
    """Serve a converted language model over HTTP as OpenAI's interface: `transformers serve`, which takes all other options."""
    from rpq_convert.integrations.serving import serve as run

    run([str(folder), *context.args])


@group.command(epilog=examples("rpq presets", "rpq presets 4bit > mine.toml"))
@catching
def presets(name: Annotated[str | None, Argument(metavar="[NAME]", help="Print this preset's TOML.")] = None) -> None:
    """List the presets, or print one as a start for your own."""
    from importlib.resources import files

    from rpq_convert.planning.rules import load_preset, preset_names

    if name is None:
        for known in preset_names():
            print(f"{known:<12} {load_preset(known).description}")
        return
    load_preset(name)
    path: Any = Path(name) if name.endswith(".toml") else files("rpq_convert.configs") / f"{name}.toml"
    print(path.read_text("utf8").rstrip("\n"))


@group.command(epilog=examples("rpq env"))
@catching
def env(json: o.Json = False) -> None:
    """Show versions and the machine, and say how to fix a torchvision that does not fit torch."""
    from .environment import facts

    found = facts()
    if json:
        print(jsonlib.dumps(found, indent=1))
    else:
        for key, value in found.items():
            print(f"{key:<14} {value}")
