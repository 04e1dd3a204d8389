"""Options as values: each setting is one documented field of a frozen dataclass.

A field carries its default, its range and the sentence that explains it. The library takes keyword arguments and builds these
values once (`take`); the command line makes its options from the same fields (cli/options.py). Free of torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any

ALWAYS, IF_SET, NEVER = "always", "if set", "never"  # whether a plan's record holds a setting
DTYPES = ("float32", "float16", "bfloat16")  # of models, by their names in torch
STORED_DTYPES = (*DTYPES, "float64")  # of scales and outliers
CODEBOOK_DTYPES = (*STORED_DTYPES, "float8_e4m3fn")


def setting(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, record: str = IF_SET, **shown: Any
) -> Any:  # fmt: skip
    """Return a dataclass field.

    Args:
        default: its value where nothing is asked.
        help: what it does, in a sentence or two.
        least, most: its range, ends included.
        record: whether a plan's record of what was asked holds it: ALWAYS, IF_SET or NEVER.
        shown: how the command line shows it: `metavar`, `panel` (a heading of `--help`), `choices` of a text, `flag` (its name
            without the dashes, where it differs); `flag=None` for a setting that the command line does not have.
    """
    return field(default=default, metadata={"help": help, "least": least, "most": most, "record": record, **shown})


def check_values(options: Any, error: type[Exception]) -> None:
    """Raise `error` for a number that is outside the range of its field, and for a text that is none of its choices."""
    for f in fields(options):
        value, least, most = getattr(options, f.name), f.metadata["least"], f.metadata["most"]
        if (choices := f.metadata.get("choices")) and value is not None and not callable(value):
            one_of(f.name, value, choices, error)
        if (least is None and most is None) or value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or (least is not None and not value >= least) or (most is not None and not value <= most):
            reach = f"of at least {least}" if most is None else f"between {least} and {most}"
            raise error(f"{f.name} must be a number {reach}, not {value!r}")


def near(name: Any, known: Iterable[str]) -> str:
    """Return the question that names what was probably meant, to end a message with; empty where nothing is near."""
    found = difflib.get_close_matches(str(name), sorted(known), 1, 0.54)  # fp16 is near to float16
    return f"; did you mean {found[0]!r}?" if found else ""


def one_of(name: str, value: Any, choices: Sequence[str], error: type[Exception]) -> None:
    """Raise `error` for a value that is none of the choices; it lists them, and names the nearest."""
    if value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise error(f"{name} must be {listed}, not {value!r}{near(value, choices)}")


def dtype_text(value: Any) -> Any:
    """Return the name of a torch dtype, given as it is or as text such as `float16` or `torch.float16`; None for None."""
    return None if value is None else str(value).removeprefix("torch.")


def take(given: Mapping[str, object], *kinds: type[Any]) -> list[Any]:
    """Return one object of each kind, made of the keyword arguments that are its fields.

    Raises:
        TypeError: an argument that is a field of none; it names the nearest one.
    """
    known = [{f.name for f in fields(kind)} for kind in kinds]
    every = set().union(*known)
    if unknown := [name for name in given if name not in every]:
        raise TypeError(f"unknown option {unknown[0]!r}{near(unknown[0], every)}")
    return [kind(**{k: v for k, v in given.items() if k in names}) for kind, names in zip(kinds, known)]


def record(options: Any) -> dict[str, Any]:
    """Return what was asked, as JSON values, in the order of the fields."""
    found = {}
    for f in fields(options):
        value, when = getattr(options, f.name), f.metadata["record"]
        if when == ALWAYS or (when == IF_SET and value != f.default):
            found[f.name] = list(value) if isinstance(value, tuple) else value
    return found


def shown(options: Any) -> dict[str, Any]:
    """Return the settings that differ from their defaults, of those that the command line has."""
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.metadata.get("flag", "") is not None}
    return {
        f.name: given[f.name]
        for f in fields(options)
        if f.name in given and given[f.name] != f.default and not callable(given[f.name])
    }
