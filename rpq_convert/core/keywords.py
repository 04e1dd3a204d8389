"""Keywords: what the public functions take by name, spelled out for `help`, completion and type checkers.

A function that takes `**options` is decorated with the classes that they are the fields of. Its signature then shows every one with
its default, its docstring says what each does, and a wrong keyword is refused before anything runs, with the right one's name. For
type checkers each class has a TypedDict beside it, which says what a caller may give; a test holds the two together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable
from dataclasses import Field, fields
from functools import wraps
from typing import Any, TypeVar

from rpq_convert.core.options import near

F = TypeVar("F", bound=Callable[..., Any])
SYNONYMS = {  # what other tools call it -> what it is here, where the function has it
    "calibrate": "calibration", "data": "calibration", "dataset": "calibration", "nbits": "bits", "w_bits": "bits", "wbits": "bits",
    "size": "target_size", "budget": "target_size", "ignore": "exclude", "skip": "exclude", "modules_to_not_convert": "exclude",
    "torch_dtype": "dtype", "lr": "rate", "learning_rate": "rate", "iterations": "steps", "force": "overwrite", "exist_ok": "overwrite",
    "max_seq_len": "window", "seqlen": "window", "n_samples": "samples", "nsamples": "samples", "num_workers": "workers",
}  # fmt: skip


def keywords(*kinds: type, without: Container[str] = ()) -> Callable[[F], F]:
    """Let a function name the right keyword where a wrong one is given, and show its options in its signature and docstring.

    Args:
        kinds: option classes; the function takes their fields as `**options`. None where it spells its keywords itself.
        without: fields that it does not take.
    """

    found = [f for kind in kinds for f in fields(kind) if f.name not in without]

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        plain = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = [*plain, *_parameters(found, {p.name for p in plain})]
        named = [p.name for p in shown if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        placed = [p.name for p in shown if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

        @wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            if len(args) > len(placed):
                raise TypeError(
                    f"{called} takes {' and '.join(placed)}, then keywords such as {_example(named, placed)}, not {args[-1]!r}"
                )
            for name in given:
                if name not in named:
                    raise unknown(called, name, named)
            return function(*args, **given)

        checked.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        if kinds and function.__doc__:
            checked.__doc__ = inspect.cleandoc(function.__doc__) + "\n\nOptions:\n" + "\n".join(_told(found))
        return checked  # type: ignore[return-value]

    return decorate


def unknown(function: str, name: str, known: Iterable[str]) -> TypeError:
    """Return the error for a keyword that a function does not have: it names the one that was probably meant, or all."""
    known = list(known)
    meant = SYNONYMS.get(name)
    hint = f"; did you mean {meant!r}?" if meant in known else near(name, known)
    return TypeError(f"{function} has no option {name!r}{hint or '; it has ' + ', '.join(known)}")


def _parameters(options: Iterable[Field[Any]], taken: set[str]) -> list[inspect.Parameter]:
    named = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(f.name, named, default=f.default, annotation=f.type) for f in options if f.name not in taken
    ]


def _told(options: Iterable[Field[Any]]) -> list[str]:
    return [f"    {f.name}: {f.metadata['help']}" for f in options]


def _example(named: list[str], placed: list[str]) -> str:
    first = next((n for n in ("bits", *named) if n in named and n not in placed), "")
    return f"{first}=4" if first == "bits" else f"{first}=…"
