"""The commands that plan a conversion, make it and upload it."""

import json as jsonlib
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from rpq_convert.errors import FolderError, SourceError
from rpq_convert.planning.options import PlanOptions
from rpq_convert.showing import printable
from rpq_convert.storage.options import SourceOptions

from . import options as o
from .app import HELP, Version, examples, group, main
from .errors import catching
from .show import chosen, fitting, progress, show_report
from .talk import detail, phase, say, warn

if TYPE_CHECKING:
    from rpq_convert.checkpoint.opening import Opened

CONVERT_EPILOG = examples(
    "rpq-convert facebook/opt-66b --codebooks heads",
    "rpq-convert facebook/opt-125m --bits 4 --rule 'type:Embedding:bits=8' --exclude '*lm_head*'",
    "rpq-convert weights.safetensors --factory mymodel:build --out small",
)


@main.command(epilog=CONVERT_EPILOG, context_settings=HELP)
@group.command(epilog=CONVERT_EPILOG)
@catching
@o.with_options
def convert(
    src: o.Source,
    options: PlanOptions,
    source: SourceOptions,
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
    with phase("opened"):
        opened = open_checkpoint(src, source, need="headers")
    if opened.model is None and not dry_run:
        raise SourceError(f"{src} has no config.json: give --factory package:callable, which builds its model")
    data = None if calibrate is None else _calibration(calibrate, opened, samples, text_field, options.seed)
    if needs_sensitivities(options) and (not dry_run or Path(src).exists()):
        say("measuring what the model is sensitive to")
        opened = opened.fetched()
        if callable(data) and opened.model is not None:
            data = data(opened.filled())  # written once, for the measurement and the fit
    with phase("planned"), progress() as tell:
        plan = plan_opened(opened, options, data=data, progress=partial(tell, "sensitivities"))
    warn(plan.warnings)
    detail(chosen(plan))
    if dry_run:
        return show_report(make_report(plan, {}, title=o.name_of(src)), json=json)
    before = opened.slots()
    ready = opened.fetched()
    if ready.slots() != before:  # the weights say more than their headers: tied names with values of their own
        plan = plan_opened(ready, options, data=data)
        warn(plan.warnings)
    with phase("converted"), fitting({j.name: prod(j.shape) for j in plan.jobs}) as callback:
        how: dict[str, Any] = {"executor": executor, "workers": workers, "progress": callback}
        report = convert_opened(ready, folder, plan, data, overwrite=overwrite, **how)
    warn(tuple(w for w in report.warnings if w not in plan.warnings))
    show_report(report, json=json)
    say(f"wrote {folder}")
    if push_to:
        _push(folder, push_to, public=public, token=source.token)


def _calibration(where: str, opened: "Opened", samples: int | None, field: str | None, seed: int) -> Any:
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
    return read_inputs(where, opened.src, model=opened.model, field=field, **opened.options.hub, **some)


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

    with phase("planned"), progress() as tell:
        opened = open_target(src, source, measured=needs_sensitivities(options))
        made = plan_opened(opened, options, progress=partial(tell, "sensitivities"))
    warn(made.warnings)
    detail(chosen(made))
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

    with phase("planned"), progress() as tell:
        opened = open_target(src, source, measured=True)
        curve = sweep_opened(opened, options, progress=partial(tell, "sensitivities"))
    warn(curve.warnings)
    if file is not None:
        file.write_text(curve.to_svg(o.name_of(src)), "utf8")
        say(f"wrote {file}")
    print(curve.to_json() if json else curve)
