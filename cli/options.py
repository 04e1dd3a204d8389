"""The options that `convert` and `plan` share, each defined once, and what they mean to the library."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

WHAT, SIZE, WHERE = "What to convert", "Size and quality", "Source"

Source = Annotated[str, Argument(metavar="SRC", help="A hub id, a checkpoint folder, or a safetensors file.")]
OutputFolder = Annotated[Path, Argument(metavar="FOLDER", help="A folder that rpq-convert wrote.")]
Public = Annotated[bool, Option("--public", help="Let everybody see a pushed repository; only you by default.")]
Json = Annotated[bool, Option("--json", help="Print JSON to stdout, and nothing else there.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress; warnings and errors only on stderr.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output folder once the new one is whole.")]

Preset = Annotated[
    str | None, Option(help="A preset's name (see `rpq presets`) or a .toml file.", rich_help_panel=SIZE)
]
Bits = Annotated[
    float | None,
    Option(help="Code bits per weight, 0.05 to 8; one that no layout has exactly, such as 2.5, is met by mixing.", rich_help_panel=SIZE),
]  # fmt: skip
TargetSize = Annotated[
    str | None,
    Option(metavar="SIZE", help="Bytes of all weight files, e.g. 50MB: sizes of layers are chosen so that they fit.", rich_help_panel=SIZE),
]  # fmt: skip
MaxError = Annotated[
    float | None,
    Option(help="Largest expected relative squared error of any layer: the smallest size below it.", rich_help_panel=SIZE),
]  # fmt: skip
Sensitivity = Annotated[
    str | None,
    Option(
        metavar="FILE|shape",
        help="What budgets go by: JSON of name to number, or shapes alone. By default the model is run and measured.",
        rich_help_panel=SIZE,
    ),
]
Codebooks = Annotated[
    str | None,
    Option(metavar="heads|N", help="'heads': sub-vectors as long as an attention head; or N codebooks per weight.", rich_help_panel=SIZE),
]  # fmt: skip
Dim = Annotated[int | None, Option(min=1, help="Length of a sub-vector.", rich_help_panel=SIZE)]
Axis = Annotated[Literal["out", "in"] | None, Option(help="Axis to cut where both are possible.", rich_help_panel=SIZE)]
Rotation = Annotated[
    int | None,
    Option(min=0, help="Size of a block-Hadamard rotation of the inputs, 0 for none; the preset's by default.", rich_help_panel=SIZE),
]  # fmt: skip
Outliers = Annotated[
    float | None,
    Option(min=0, max=0.1, help="Share of each output's weights, the largest, that is kept apart: 0.005.", rich_help_panel=SIZE),
]  # fmt: skip
Fit = Annotated[
    Literal["kmeans", "additive", "random"] | None, Option(help="How codebooks are found.", rich_help_panel=SIZE)
]
Grow = Annotated[bool, Option("--grow", help="Convert layers that would grow as well.", rich_help_panel=SIZE)]
Seed = Annotated[int, Option(min=0, help="Decides every random number.", rich_help_panel=SIZE)]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    Option(help="Dtype of what stays dense and of expanded weights; as stored by default.", rich_help_panel=SIZE),
]
MaxShardSize = Annotated[
    str | None, Option(metavar="SIZE", help="Largest weight file, e.g. 5GB.", rich_help_panel=SIZE)
]

Rule = Annotated[
    list[str] | None,
    Option("--rule", metavar="PATTERN:KEY=VALUE,…", help="Settings for matching parameters; repeatable, first match wins.", rich_help_panel=WHAT),
]  # fmt: skip
Include = Annotated[
    list[str] | None, Option(metavar="PATTERN", help="Convert only these; repeatable.", rich_help_panel=WHAT)
]
Exclude = Annotated[
    list[str] | None, Option(metavar="PATTERN", help="Leave these dense; repeatable.", rich_help_panel=WHAT)
]

Factory = Annotated[
    str | None,
    Option(metavar="PACKAGE:CALLABLE", help="Builds the model of a checkpoint that is not transformers'.", rich_help_panel=WHERE),
]  # fmt: skip
DATA = (
    "a text or a folder of texts or pictures such as the model will see, "
    "or a .safetensors file of tensors named after the arguments of its forward"
)
Data = Annotated[Path, Option("--data", "--text", metavar="PATH", help=f"{DATA.capitalize()}.")]
Samples = Annotated[
    int | None,
    Option(min=1, help="Windows of 512 tokens, lines or pictures to calibrate on; 128 by default, 64 with 'self'."),
]
Base = Annotated[Path, Argument(metavar="BASE", help="The dense checkpoint.")]
OutFolder = Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Where to write the new model.")]

Revision = Annotated[str | None, Option(help="Branch, tag or commit on the hub.", rich_help_panel=WHERE)]
Token = Annotated[
    str | None,
    Option(help="Access token of the hub; HF_TOKEN or `hf auth login` keep it out of the shell's history.", rich_help_panel=WHERE),
]  # fmt: skip
LocalFilesOnly = Annotated[bool, Option("--local-files-only", help="Never ask the hub.", rich_help_panel=WHERE)]
AllowPickle = Annotated[
    bool, Option("--allow-pickle", help="Read pickled weights, tensors only.", rich_help_panel=WHERE)
]

PLAN = (
    "preset",
    "bits",
    "target_size",
    "max_error",
    "dim",
    "axis",
    "rotation",
    "outliers",
    "fit",
    "grow",
    "seed",
    "dtype",
)
OPEN = ("factory", "revision", "token", "local_files_only", "allow_pickle")


def plan_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `make_plan` from a command's parameters."""
    options = {k: given[k] for k in PLAN}
    options |= {k: tuple(given[k] or ()) for k in ("include", "exclude")}
    codebooks = given["codebooks"]
    options["codebooks"] = int(codebooks) if codebooks and codebooks.isascii() and codebooks.isdigit() else codebooks
    options["rules"] = [parse_rule(r) for r in given["rule"] or ()]
    if given["sensitivity"] is not None:
        options["sensitivity"] = _sensitivity(given["sensitivity"])
    if given["max_shard_size"]:
        options["max_shard_size"] = given["max_shard_size"]
    return options


def _sensitivity(text: str) -> Any:
    if text == "shape":
        return text
    from rpq_convert.errors import PlanError
    from rpq_convert.schemas import kinds
    from rpq_convert.schemas.checking import read_json

    return read_json(text, kinds.SENSITIVITIES, PlanError)


def open_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `open_checkpoint`."""
    find_modules(given["factory"])
    return {k: given[k] for k in OPEN}


def find_modules(factory: str | None) -> None:
    """Let a factory lie in the working directory."""
    if factory and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def parse_rule(text: str) -> dict[str, Any]:
    """Turn `PATTERN:key=value,key=value` into a rule. The last colon divides, so `type:Linear:bits=4` is meant well."""
    pattern, colon, settings = text.rpartition(":")
    if not colon or not pattern or not settings:
        raise typer.BadParameter(f"{text!r} is not PATTERN:key=value,key=value", param_hint="--rule")
    rule: dict[str, Any] = {"match": pattern}
    for item in settings.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals and key in ("skip", "grow"):
            value = "true"
        elif not equals or not key or not value:
            raise typer.BadParameter(f"{item!r} in {text!r} is not key=value", param_hint="--rule")
        if key == "match":
            raise typer.BadParameter(f"{text!r} sets match; the pattern goes before the colon", param_hint="--rule")
        rule[key] = _value(value)
    return rule


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def output_for(src: str, out: Path | None) -> Path:
    """Return the output folder; by default the source's name and `-rpq`, in the working directory."""
    return apart(Path(src), out or Path(f"{name_of(src).removesuffix('.safetensors')}-rpq"))


def name_of(src: str) -> str:
    """Return the last part of a source's name, whether a hub id or a path such as `.`."""
    return Path(src).resolve().name if Path(src).exists() else src.rstrip("/").rpartition("/")[2]


def apart(src: Path, out: Path) -> Path:
    """Refuse an output that is the source or holds it, as a whole or in the making: it would delete the original."""
    real, target = src.resolve(), out.resolve()
    taken = {target.with_name(target.name + end) for end in ("", ".partial", ".old.partial")}
    if src.exists() and not taken.isdisjoint((real, *real.parents)):
        raise typer.BadParameter(
            f"{out} is or holds the source {src}; choose another folder", param_hint="the output folder"
        )
    return out
