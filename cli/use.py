"""The commands that run a converted model: what it still knows, a talk with it, a server."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from rpq_convert.errors import EvaluateError
from rpq_convert.showing import printable
from rpq_convert.storage.options import HubOptions

from . import checks
from . import options as o
from .app import examples, group
from .errors import catching
from .show import progress
from .talk import say

if TYPE_CHECKING:
    from rpq_convert.integrations.chat import Talker

Tasks = Annotated[
    str | None,
    Option(metavar="NAME,…", help="Score both on these tasks of lm-eval, such as hellaswag,arc_easy; it must be installed."),
]  # fmt: skip


@group.command(
    epilog=examples(
        "rpq eval opt-125m/ opt-125m-rpq --text wikitext.txt --save",
        "rpq eval opt-125m/ opt-125m-rpq --text wikitext.txt --samples 5",
        "rpq eval opt-125m/ opt-125m-rpq --tasks hellaswag --limit 200",
        "rpq eval minilm/ minilm-rpq --pairs stsb.csv",
        "rpq eval net.safetensors net-rpq --factory mymodel:build --inputs test.safetensors",
    )
)
@catching
@o.with_options
def eval(
    base: o.Base,
    folder: o.OutputFolder,
    source: HubOptions,
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
    tasks: Tasks = None,
    include_path: Annotated[
        Path | None, Option(metavar="FOLDER", help="A folder with tasks of your own, as lm-eval takes it.")
    ] = None,
    samples: Annotated[int, Option(min=0, help="Show what both say to so many of the inputs, side by side.")] = 0,
    factory: o.Factory = None,
    window: Annotated[int | None, Option(min=2, help="Tokens of one window; 512 by default.")] = None,
    text_field: o.TextField = None,
    limit: Annotated[
        int | None,
        Option(
            "--limit", "--windows", min=1, help="At most so many windows, lines, pairs, samples or questions of a task."
        ),
    ] = None,
    layers: Annotated[bool, Option("--layers", help="Measure what each converted layer adds as well.")] = False,
    save: Annotated[bool, Option("--save", help="Write the result into FOLDER's report and model card.")] = False,
    json: o.Json = False,
) -> None:
    """Compare a converted model with its base: perplexity, divergence and agreement; cosines; a task's score; accuracy; answers."""
    named = tuple(t.strip() for t in (tasks or "").split(",") if t.strip())
    if sum(x is not None for x in (text, pairs, inputs, tasks)) != 1:
        raise typer.BadParameter(
            "give one of --text, --pairs, --inputs and --tasks to measure on", param_hint="rpq eval"
        )
    o.find_modules(factory)
    checks.needs("--text-field", text_field, "--text with a table", text is not None)
    checks.needs("--include-path", include_path, "--tasks", tasks is not None)
    if tasks is not None:
        for name, value in {"--samples": samples, "--layers": layers, "--window": window}.items():
            if value:
                raise checks.unused(name, "tasks are scored, nothing else is run")
        from rpq_convert.evaluation.tasks import check_tasks

        check_tasks(named, include_path)
    checks.pair(base, folder, factory, source)
    if save:
        checks.report_to_write(folder)
    if tasks is None:
        checks.evaluated(text, pairs, inputs, field=text_field, window=window)
    from rpq_convert.folders import Measured, evaluate_folder

    which = checks.with_base(base, folder, factory, source, related=not save)
    on = Measured(text, pairs, inputs, named, include_path, window or 512, limit, text_field)
    with progress() as tell:
        found = evaluate_folder(which, on, layers=layers, answers=samples, keep=save, say=say, progress=tell)
    print(found.to_json() if json else printable(str(found), lines=True))


@group.command(epilog=examples("rpq chat smollm2-rpq", "rpq chat smollm2-rpq --base smollm2/ --temperature 0"))
@catching
@o.with_options
def chat(
    folder: o.OutputFolder,
    source: HubOptions,
    base: Annotated[str | None, Option(metavar="BASE", help="Show the answers of its base as well.")] = None,
    max_tokens: Annotated[int, Option(min=1, help="Tokens of one answer, at most.")] = 200,
    temperature: Annotated[float, Option(min=0, help="0: the likeliest token every time.")] = 0.7,
    seed: o.Seed = 0,
) -> None:
    """Talk with a converted language model: /new begins anew, /quit or ctrl-D ends, ctrl-C ends an answer."""
    if base is None:
        checks.converted(folder, source)
    else:
        checks.pair(base, folder, None, source)
    from rpq_convert.checkpoint.finding import at_hand
    from rpq_convert.checkpoint.loading import load
    from rpq_convert.inputs.files import tokenizer_of
    from rpq_convert.integrations.chat import Talker

    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if base is None:
        place = at_hand(folder, source)
        models: dict[str, tuple[Any, Any]] = {"": (load(place), place)}
    else:
        which = checks.with_base(base, folder, None, source)
        dense, converted = which.load()
        models = {"base": (dense, which.base), "converted": (converted, which.folder)}
    talkers = {name: Talker(model, tokenizer_of(place), **how) for name, (model, place) in models.items()}
    if not all(t.remembers for t in talkers.values()):
        say("no chat template: what you type is continued")
    say("/new begins anew, /quit ends")
    _talk(talkers)


def _talk(talkers: "dict[str, Talker]") -> None:
    """Answer what is typed, line by line, until it ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            typed = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()
            return
        if typed in ("/quit", "/exit", "/q"):
            return
        if typed == "/new":
            for talker in talkers.values():
                talker.forget()
        elif typed.startswith("/"):
            say(f"no command {typed}; there are /new and /quit")
        elif typed:
            _answer(talkers, typed)


def _answer(talkers: "dict[str, Talker]", typed: str) -> None:
    for name, talker in talkers.items():
        if name:
            _write(f"{name}: ")
        try:
            talker.answer(typed, _write)
            _write("\n")
        except EvaluateError as e:
            _write("\n")
            say(f"error: {e}")


def _write(text: str) -> None:
    print(printable(text, lines=True), end="", flush=True)


@group.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples("rpq serve smollm2-rpq", "rpq serve smollm2-rpq --port 9000 --log-level info"),
)
@catching
def serve(context: typer.Context, folder: o.OutputFolder) -> None:
    """Serve a converted language model over HTTP as OpenAI's interface: `transformers serve`, which takes all other options."""
    checks.converted(folder)
    from rpq_convert.integrations.serving import serve as run

    run([folder, *context.args])
