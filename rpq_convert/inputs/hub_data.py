"""Data sets of the hub, through the package datasets: only as many rows as are needed are fetched."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

from rpq_convert.errors import SourceError
from rpq_convert.hf.hub import asking, client
from rpq_convert.inputs.tables import Chat, items_of

ROWS = 10_000  # that are fetched of a data set
SPLITS = ("train", "validation", "test", "dev")


def hub_items(name: str, field: str | None = None) -> tuple[list[str | Chat], str]:
    """Return the texts or chats of a data set's first rows, and the column that they are from.

    Args:
        name: `user/name[:config][:split]`; of one word after the name it is told whether it is a split. By default the first split.
        field: the column.

    Raises:
        HubError: the hub is not reached, or has no such data set. SourceError: it cannot be read, or has no such column.
    """
    repository, config, split = parts_of(name)
    try:
        from datasets import load_dataset
    except ImportError:
        raise SourceError(f"hub:{name} needs the package datasets: pip install datasets") from None
    if not Path(repository).exists():  # a folder that is written like a data set of the hub
        with asking(repository):  # where the hub is not reached, datasets tries for minutes
            client(None).dataset_info(repository)
    try:
        rows: Any = load_dataset(repository, config, split=split, streaming="[" not in (split or ""))
        if hasattr(rows, "keys"):  # of all splits
            rows = rows[next(iter(rows))]
        found = list(islice(rows, ROWS))
    except Exception as e:  # datasets and what it reads with raise many kinds
        raise SourceError(f"hub:{name} could not be read: {(str(e).strip() or repr(e)).splitlines()[0]}") from None
    return items_of(found, f"hub:{name}", field)


def parts_of(name: str) -> tuple[str, str | None, str | None]:
    """Return the repository, the config and the split that a name says."""
    repository, *rest = re.split(r":(?![^\[]*\])", name)  # a part of a split, such as train[:10%], stays whole
    if len(rest) == 2:
        return repository, rest[0], rest[1]
    if rest and (rest[0] in SPLITS or "[" in rest[0]):
        return repository, None, rest[0]
    return repository, (rest[0] if rest else None), None
