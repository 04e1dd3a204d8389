"""Options of the commands. Those of a plan and of a source are made from the fields of the library's own classes."""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from typer import Argument, Option

from rpq_convert.errors import FolderError, PlanError
from rpq_convert.planning.options import SHARED_BY
from rpq_convert.planning.rules import parse_rule, preset_names
from rpq_convert.storage.room import check_apart

Source = Annotated[str, Argument(metavar="SRC", help="A hub id, a checkpoint folder, or a safetensors file.")]
OutputFolder = Annotated[
    str, Argument(metavar="FOLDER", help="A folder that rpq-convert wrote, or its repository's id.")
]
Public = Annotated[bool, Option("--public", help="Make a pushed repository public; private by default.")]
Json = Annotated[bool, Option("--json", help="Print JSON to stdout, and nothing else there.")]
Overwrite = Annotated[
    bool, Option("--overwrite", help="Replace an existing output folder once the new one is complete.")
]

DATA = (
    "a text, a table of texts (.jsonl, .json, .csv, .parquet), or a folder of texts or pictures such as the model will see, "
    "or a .safetensors file of tensors named after the arguments of its forward"
)
Data = Annotated[Path, Option("--data", "--text", metavar="PATH", help=f"{DATA.capitalize()}.")]
Samples = Annotated[
    int | None,
    Option(min=1, help="Windows of 512 tokens, lines or pictures to calibrate on; 128 by default, 64 with 'self'."),
]
TextField = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="The column of texts in a table; by default text, content, messages, prompt and completion, …",
    ),
]
Base = Annotated[str, Argument(metavar="BASE", help="The dense checkpoint: a folder, a file or a hub id.")]
Out = Annotated[
    Path | None,
    Option("--out", "-o", metavar="FOLDER", help="Where to write; the source's name and -rpq by default."),
]
Device = Annotated[Literal["cpu", "cuda"], Option(help="Where fits run; in this version on the CPU.")]
Calibrate = Annotated[
    str | None,
    Option(
        metavar="PATH|self",
        help=f"Fit each layer to its inputs on {DATA}; or 'self': on synthetic inputs (text that a language model writes, tokens, noise).",
    ),
]


def _workers(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise typer.BadParameter(f"{text!r} is neither a whole number of at least 1 nor 'auto'")
    return int(text)


Workers = Annotated[
    int | None,
    Option(
        parser=_workers,
        metavar="N|auto",
        help="Fits at once at most. auto, the default: up to 4, as memory has room for.",
    ),
]
Executor = Annotated[
    Literal["serial", "threads", "processes", "ray"],
    Option(help="How fits run; ray: as tasks of a cluster, which sees source and output, or is sent what it needs."),
]
DryRun = Annotated[bool, Option("--dry-run", help="Show the plan and the exact sizes; write nothing.")]
PushTo = Annotated[str | None, Option(metavar="REPO", help="Upload the result to this repository of the hub.")]
OutFolder = Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Where to write the new model.")]

Factory = Annotated[
    str | None,
    Option(
        metavar="MODULE:FUNCTION",
        help="Builds the model of a checkpoint that is not transformers': package.module:function or file.py:function.",
    ),
]
Seed = Annotated[int, Option(min=0, help="Decides every random number.")]


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command that takes objects of option classes take their fields from the command line.

    Each parameter whose annotation is a dataclass becomes one option per field, with the field's own default, range and help.
    """
    signature = inspect.signature(command, eval_str=True)
    kinds: dict[str, Any] = {p.name: p.annotation for p in signature.parameters.values() if is_dataclass(p.annotation)}
    shown: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = kinds.get(parameter.name)
        if kind is None:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            shown += [_parameter(kind, f) for f in fields(kind) if f.metadata.get("flag", "") is not None]

    @wraps(command)
    def filled(**given: Any) -> Any:
        for name, kind in kinds.items():
            own = {f.name: given.pop(f.name) for f in fields(kind) if f.name in given}
            given[name] = kind(**{field: _meant(field, value) for field, value in own.items()})
        return command(**given)

    filled.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    filled.__annotations__ = {p.name: p.annotation for p in shown}
    return filled


def _parameter(kind: Any, f: Field[Any]) -> inspect.Parameter:
    """Return a field as a command's parameter."""
    told, hint, default = f.metadata, get_type_hints(kind)[f.name], f.default
    if default == ():
        hint, default = list[str] | None, None
    else:  # what may be a text is one on the command line; _meant reads it
        hint = next((h for h in (str, bool) if h in get_args(hint)), hint if default is not None else _first(hint))
        hint = hint if default is not None else hint | None
    if choices := told.get("choices"):
        hint = Literal[choices] | None
    name = "--" + (told.get("flag") or f.name.replace("_", "-"))
    option = Option(
        name,
        help=told["help"],
        metavar=told.get("metavar"),
        min=told["least"],
        max=told["most"],
        rich_help_panel=told.get("panel"),
        autocompletion=_presets if f.name == "preset" else None,
    )
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )


def _presets(incomplete: str) -> list[str]:
    """Return the presets that a shell offers after a beginning."""
    return [name for name in preset_names() if name.startswith(incomplete)]


def _first(hint: Any) -> Any:
    return next(h for h in get_args(hint) if h is not type(None))


def _meant(name: str, value: Any) -> Any:
    """Return what a field's text on the command line means to the library."""
    if name == "rules":
        try:
            return [parse_rule(r) for r in value or ()]
        except PlanError as e:
            raise typer.BadParameter(str(e), param_hint="--rule") from None
    if name == "sensitivity" and value is not None:
        return _sensitivity(value)
    if name == "codebooks" and value and value.isascii() and value.isdigit():
        return int(value)
    if name == "factory":
        find_modules(value)
    return () if value is None and name in ("include", "exclude") else value


def _sensitivity(text: str) -> Any:
    if text in SHARED_BY:
        return text
    from rpq_convert.schemas import kinds
    from rpq_convert.schemas.checking import read_json
    from rpq_convert.storage.sources import did_you_mean

    if not Path(text).is_file():
        raise PlanError(f"sensitivities {text} is no file, nor 'shape' or 'measured'{did_you_mean(text)}")
    return read_json(text, kinds.SENSITIVITIES, PlanError)


def find_modules(factory: str | None) -> None:
    """Let a factory lie in the working directory."""
    if factory and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def output_for(src: str, out: Path | None) -> Path:
    """Return the output folder; by default the source's name and `-rpq`, in the working directory."""
    return apart(Path(src), out or Path(f"{name_of(src).removesuffix('.safetensors')}-rpq"))


def name_of(src: str) -> str:
    """Return the last part of a source's name, whether a hub id, its address or a path such as `.`."""
    if Path(src).exists():
        return Path(src).resolve().name
    from rpq_convert.storage.options import HubOptions
    from rpq_convert.storage.sources import located

    return str(located(src, HubOptions())[0]).rstrip("/").rpartition("/")[2]


def apart_from(base: Path, folder: Path, *, out: Path) -> Path:
    """Refuse an output that would harm the base or the converted folder; it may replace the converted folder itself."""
    apart(base, out)
    return out if out.resolve() == folder.resolve() else apart(folder, out)


def apart(src: Path, out: Path) -> Path:
    """Refuse an output that is the source, holds it or lies in it."""
    try:
        check_apart(src, out)
    except FolderError as e:
        raise typer.BadParameter(str(e), param_hint="the output folder") from None
    if src.is_dir() and src.resolve() in out.resolve().parents:
        raise typer.BadParameter(
            f"{out} would lie in the source {src}, and be taken for a part of it; pass --out with a folder outside of it",
            param_hint="the output folder",
        )
    return out
