"""What commands check before anything slow is imported: that what was given is there, is what it should be, and will be used.

The library checks the same again where Python gives it. Here it is said within half a second instead of after the imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from rpq_convert.checkpoint.factories import check_factory
from rpq_convert.errors import SourceError
from rpq_convert.inputs.found import Found, find_data
from rpq_convert.inputs.tables import HEAD, kind_of, scored_pairs
from rpq_convert.storage.options import HubOptions, SourceOptions
from rpq_convert.storage.records import REPORT, read_manifest
from rpq_convert.storage.sources import (
    check_source,
    did_you_mean,
    is_checkpoint,
    is_converted,
    is_name,
    located,
    read_config,
    refuse_misspelt,
)


def unused(option: str, why: str) -> typer.BadParameter:
    """Return the error for an option that would do nothing."""
    return typer.BadParameter(f"it would do nothing: {why}", param_hint=option)


def source(src: str, options: SourceOptions, *, weights: bool, pushes: bool = False) -> None:
    """Refuse a source that is no dense checkpoint, and options of the hub for one that is not there.

    Args:
        weights: it must have some. pushes: the access token serves an upload as well.
    """
    refuse_misspelt(src, is_checkpoint)
    place, _ = located(src, options)
    _hub(place, options, pushes)
    if isinstance(options.factory, str):
        check_factory(options.factory)
    check_source(src, options, weights=weights)


def _hub(place: str | Path, options: HubOptions, pushes: bool = False) -> None:
    if Path(place).exists() and options.token is not None and not pushes:
        raise unused("--token", f"{place} is a local path")


def report_of(folder: str, options: HubOptions) -> None:
    """Refuse what is no converted folder or repository with a report."""
    refuse_misspelt(folder, is_converted)
    place, _ = located(folder, options)
    _hub(place, options)
    if not is_name(place):
        read_config(Path(place))


def converted(folder: str | Path) -> None:
    """Refuse what is no converted folder, unless it can be a repository's name."""
    refuse_misspelt(folder, is_converted)
    if not is_name(folder):
        read_config(Path(folder))


def pair(base: str | Path, folder: str | Path, factory: str | None) -> None:
    """Refuse a base that is no dense checkpoint, and a folder that is no converted one."""
    converted(folder)
    own = factory is not None  # transformers reads pickled weights of a base by itself
    source(str(base), SourceOptions(factory=factory, allow_pickle=not own), weights=True)


def data(where: str | Path, option: str, *, field: str | None = None, window: int | None = None) -> Found:
    """Return what was given as data; columns are of tables alone, windows of texts."""
    found = find_data(where, field)
    if window is not None and found.kind in ("tensors", "pictures"):
        raise unused("--window", f"{option} is given {found.kind}, not a text")
    return found


def evaluated(
    text: Path | None, pairs: Path | None, inputs: Path | None, *, field: str | None, window: int | None
) -> None:
    """Refuse what a model cannot be evaluated on: nothing or several things, and data of another kind."""
    if sum(x is not None for x in (text, pairs, inputs)) != 1:
        raise typer.BadParameter("give one of --text, --pairs and --inputs to measure on", param_hint="rpq eval")
    needs("--text-field", field, "--text with a table", text is not None)
    if pairs is not None:
        if not pairs.is_file():
            raise SourceError(f"{pairs} does not exist{did_you_mean(pairs)}")
        if kind_of(pairs) in (".csv", ".tsv"):
            scored_pairs(pairs, HEAD)
    elif inputs is not None and data(inputs, "--inputs", window=window).kind not in ("tensors", "pictures"):
        raise SourceError(f"{inputs} is neither tensors (.safetensors) nor pictures; give a text as --text")
    elif text is not None and (kind := data(text, "--text", field=field).kind) not in ("texts", "hub"):
        raise SourceError(f"{text} holds {kind}, no text; give it as --inputs")


def misspelt(folder: str | Path) -> None:
    """Refuse a path that nearly is a converted folder's."""
    refuse_misspelt(folder, is_converted)


def needs(option: str, value: Any, other: str, there: bool) -> None:
    """Refuse an option that another one is missing for."""
    if value not in (None, False) and not there:
        raise unused(option, f"give {other} as well, or leave it out")


def report_to_write(folder: Path) -> None:
    """Refuse to keep a result where there is no report to keep it in."""
    if not (folder / REPORT).is_file():
        raise SourceError(f"{folder} has no {REPORT} to write into; leave out --save")
    read_manifest(folder)
