"""The commands that plan a conversion, make it and upload it."""

import json as jsonlib
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from rpq_convert.conversion.options import QualityOptions, RunOptions
from rpq_convert.planning.options import DECIDING, MEASURED, PlanOptions
from rpq_convert.report.measured import models, summary
from rpq_convert.running.memory import within
from rpq_convert.showing import printable
from rpq_convert.storage.addresses import destination
from rpq_convert.storage.delivery import delivered, place_of
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.records import read_manifest
from rpq_convert.storage.room import check_file

from . import checks
from . import options as o
from .app import HELP, Version, examples, group, main
from .converting import Conversion, How
from .errors import catching
from .show import chosen, progress, sending, show_report
from .talk import detail, phase, say, warn

if TYPE_CHECKING:
    from rpq_convert.planning.plan import Plan

KNOWN_FIGURES = (
    f"Measured on {models()['smollm2']['name']}, perplexity as a multiple of the dense model's: {summary()}. `rpq presets` has more models, "
    "efforts and minutes."
)
CONVERT_EPILOG = "\n\n".join([KNOWN_FIGURES, examples(
    "rpq-convert facebook/opt-66b --codebooks heads",
    "rpq-convert facebook/opt-125m --bits 4 --rule 'type:Embedding:bits=8' --exclude '*lm_head*'",
    "rpq-convert weights.safetensors --factory mymodel:build --out small",
)])  # fmt: skip


@main.command(epilog=CONVERT_EPILOG, context_settings=HELP)
@group.command(epilog=CONVERT_EPILOG)
@catching
@o.with_options
def convert(
    src: o.Source,
    options: PlanOptions,
    source: SourceOptions,
    quality: QualityOptions,
    running: RunOptions,
    out: o.Out = None,
    device: o.Device = "cpu",
    calibrate: o.Calibrate = None,
    samples: o.Samples = None,
    text_field: o.TextField = None,
    workers: o.Workers = None,
    executor: o.Executor = "threads",
    dry_run: o.DryRun = False,
    push_to: o.PushTo = None,
    public: o.Public = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    version: Version = False,
) -> None:
    """Convert a checkpoint into a folder of RPQ weights, tensor by tensor, whatever its size."""
    out = o.output_for(src, out)
    run = Conversion(
        src, out, place_of(out), options, source, calibrate=calibrate, samples=samples, text_field=text_field,
        quality=quality, dry_run=dry_run, overwrite=overwrite,
    )  # fmt: skip
    how = How(device, executor, workers, push_to, public, running)
    run.check(how)
    with (
        within(running.memory),
        nullcontext() if dry_run else delivered(out, overwrite=overwrite, progress=sending),
    ):  # before hours of measuring and fitting, not after
        run.open()
        plan = run.plan(workers)
        if dry_run:
            from rpq_convert.conversion.jobs import needed

            return show_plan(plan, src, json=json, needs=needed(plan, workers, drawn=run.opened.is_drawn))
        report = run.judge(run.convert(plan, how))
        if push_to:
            _push(run.folder, push_to, public=public, token=source.token)
    show_report(report, json=json)
    say(f"wrote {destination(out) or run.folder}")


def _push(folder: Path, repo: str, *, public: bool, token: str | bool | None, revision: str | None = None) -> None:
    from rpq_convert.checkpoint.publishing import push

    with phase("uploaded"), progress() as tell:
        where = push(folder, repo, private=not public, token=token, revision=revision, progress=tell)
    say(f"pushed to {where}")


@group.command(
    epilog=examples("rpq push opt-125m-rpq me/opt-125m-rpq", "rpq push opt-125m-2bit me/opt-125m-rpq --revision 2bit")
)
@catching
def push(
    folder: o.OutputFolder,
    repo: Annotated[
        str,
        Argument(
            metavar="REPO", help="user/name, or name; made if it does not exist. Or an address: s3://bucket/folder."
        ),
    ],
    public: o.Public = False,
    revision: Annotated[str | None, Option(help="Branch to push to; made if it does not exist.")] = None,
    token: Annotated[
        str | None,
        Option(help="Access token of the hub; HF_TOKEN or `hf auth login` keep it out of the shell's history."),
    ] = None,
) -> None:
    """Verify a converted folder and upload it to the hub, in one commit, private unless --public; or to an address."""
    checks.converted(folder)
    read_manifest(Path(folder))
    if destination(repo) is not None:
        for name, value in {"--public": public, "--revision": revision, "--token": token}.items():
            if value:
                raise checks.unused(name, f"{repo} is no repository of the hub")
    _push(Path(folder), repo, public=public, token=token, revision=revision)


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
    if sweep_out is not None:
        check_file(sweep_out, (".svg",))
    sweep = sweep or sweep_out is not None
    if sweep and explain is not None:
        raise checks.unused("--explain", "a curve is of many plans; leave out --sweep")
    if not sweep:
        options.check_used()
    elif sized := [name for name in DECIDING if getattr(options, name) is not None]:
        raise typer.BadParameter(f"the curve shows every size; leave out {', '.join(sized)}", param_hint="--sweep")
    checks.source(src, source, weights=sweep or options.measures)
    if sweep:
        return _sweep(src, sweep_out, json, options, source)
    from rpq_convert.conversion.jobs import needed
    from rpq_convert.conversion.plans import open_target, plan_opened

    with phase("planned"), progress() as tell:
        opened = open_target(src, source, options)
        made = plan_opened(opened, options, progress=partial(tell, "sensitivities"))
    warn(made.warnings)
    detail(chosen(made))
    if explain is not None:
        text = printable(made.explain(explain), lines=True)
        print(jsonlib.dumps({"name": explain, "explanation": text}) if json else text)
    elif json:
        print(made.to_json())
    else:
        show_plan(made, src, json=False, needs=needed(made, drawn=opened.is_drawn))


def show_plan(plan: "Plan", src: str, *, json: bool, needs: str) -> None:
    from rpq_convert.checkpoint.metadata import make_report

    show_report(make_report(plan, {}, title=o.name_of(src)), json=json)
    if not json:
        print(needs)


def _sweep(src: str, file: Path | None, json: bool, options: PlanOptions, source: SourceOptions) -> None:
    from rpq_convert.conversion.plans import open_target, sweep_opened

    known, options = options.sensitivity, replace(options, sensitivity=None)
    with phase("planned"), progress() as tell:
        opened = open_target(src, source, options, measured=known in (None, MEASURED))
        curve = sweep_opened(opened, options, sensitivity=known, progress=partial(tell, "sensitivities"))
    warn(curve.warnings)
    if file is not None:
        file.write_text(curve.to_svg(o.name_of(src)), "utf8")
        say(f"wrote {file}")
    print(curve.to_json() if json else curve)
