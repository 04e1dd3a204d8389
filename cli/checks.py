"""What commands check before anything slow is imported: that what was given is there, is what it should be, and will be used.

The library checks the same again where Python gives it. Here it is said within half a second instead of after the imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    is_remote,
    located,
    read_config,
    refuse_misspelt,
)

from .talk import phase, warn

if TYPE_CHECKING:
    from rpq_convert.folders import WithBase

NO_HUB = HubOptions()


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
    if not pushes:
        token_unused(options, place)
    if isinstance(options.factory, str):
        check_factory(options.factory)
    check_source(src, options, weights=weights)


def token_unused(options: HubOptions, *places: str | Path) -> None:
    """Refuse an access token of the hub where nothing is there."""
    if options.token is None or any(is_name(located(place, NO_HUB)[0]) for place in places):
        return
    local = all(Path(place).exists() for place in places)
    kind = "a local path" if local else "no repository of the hub"
    are = f"is {kind}" if len(places) == 1 else "are local paths" if local else "are no repositories of the hub"
    raise unused("--token", f"{' and '.join(map(str, places))} {are}")


def named(folder: str | Path, options: HubOptions = NO_HUB) -> str | Path:
    """Return a folder's path or a repository's id; refuse a path that nearly is a converted folder's, and a revision of a folder."""
    refuse_misspelt(folder, is_converted)
    return located(folder, options)[0]


def converted(folder: str | Path, options: HubOptions = NO_HUB, *others: str | Path) -> None:
    """Refuse what is no converted folder, unless it can be a repository's name; and an access token where all is on this machine."""
    place = named(folder, options)
    if not is_remote(place):
        read_config(Path(place))
    token_unused(options, *others, place)


def pair(base: str | Path, folder: str | Path, factory: str | None, options: HubOptions) -> None:
    """Refuse a base that is no dense checkpoint, a folder that is no converted one, and options of the hub where both are folders."""
    converted(folder, options, base)
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
    """Refuse data of another kind than what they are given as, one of the three."""
    if pairs is not None:
        if not pairs.is_file():
            raise SourceError(f"{pairs} does not exist{did_you_mean(pairs)}")
        if kind_of(pairs) in (".csv", ".tsv"):
            scored_pairs(pairs, HEAD)
    elif inputs is not None and data(inputs, "--inputs", window=window).kind not in ("tensors", "pictures"):
        raise SourceError(f"{inputs} is neither tensors (.safetensors) nor pictures; give a text as --text")
    elif text is not None and (kind := data(text, "--text", field=field).kind) not in ("texts", "hub"):
        raise SourceError(f"{text} holds {kind}, no text; give it as --inputs")


def needs(option: str, value: Any, other: str, there: bool) -> None:
    """Refuse an option that another one is missing for."""
    if value not in (None, False) and not there:
        raise unused(option, f"give {other} as well, or leave it out")


def with_base(base: str, folder: str, factory: str | None, options: HubOptions, *, related: bool = True) -> WithBase:
    """Return a converted model and its base on this machine, and warn where it cannot be the base; this is slow.

    Args:
        options: of the hub; a revision is the folder's.
        related: whether a base that it cannot be is a warning. If not, it is refused: the result will be kept.
    """
    from rpq_convert.folders import WithBase

    with phase("fetched and compared"):
        which = WithBase.at_hand(base, folder, factory, options)
        doubt = which.check()
    if doubt and not related:
        raise SourceError(f"{doubt}; leave out --save, or give its base")
    warn((doubt,) if doubt else ())
    return which


def report_to_write(folder: str) -> None:
    """Refuse to keep a result where there is no report to keep it in."""
    if is_remote(folder):
        raise SourceError(f"{folder} is not on this machine; --save writes into a folder")
    if not (Path(folder) / REPORT).is_file():
        raise SourceError(f"{folder} has no {REPORT} to write into; leave out --save")
    read_manifest(Path(folder))
