"""Finding: models that lie elsewhere, in a repository of the hub or at an address, and what of them is brought to this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rpq_convert.errors import SourceError
from rpq_convert.storage import remote
from rpq_convert.storage.addresses import address_of
from rpq_convert.storage.options import HubOptions
from rpq_convert.storage.records import CONFIG, MANIFEST
from rpq_convert.storage.remote import Remote
from rpq_convert.storage.sources import did_you_mean, is_name, is_remote, is_rpq, located, not_converted, read_config

DEFAULT = HubOptions()


def find(place: str | Path, wanted: Sequence[str], options: HubOptions = DEFAULT) -> Remote:
    """Find what lies elsewhere, and fetch its small files.

    Args:
        place: as `located` gives it, and `is_remote`.
        wanted: the small files.
        options: of the hub: which revision, with which token, and whether only the cache is used.

    Raises:
        HubError: what the hub refuses. SourceError: what a store refuses.
    """
    if not is_name(place) and (address := address_of(place)) is not None:
        return remote.find(address, wanted)
    from rpq_convert.hf import hub

    return hub.find(place, wanted, options)


def find_converted(place: str | Path, wanted: Sequence[str], options: HubOptions = DEFAULT) -> Remote:
    """Find a converted model by its config alone, and fetch its small files.

    Args:
        place, wanted, options: as for `find`.

    Raises:
        HubError: as `find`. SourceError: it is of another kind, or its upload has not ended; nothing else of it was fetched.
    """
    found = find(place, (CONFIG,), options)
    if CONFIG not in found.files:
        raise SourceError(not_converted(found.folder, found.files))
    if not is_name(place) and MANIFEST not in found.files and is_rpq(found.folder):
        raise SourceError(f"{place} has no {MANIFEST}: its upload has not ended; repeat the command that made it")
    read_config(found.folder)
    found.fetch([n for n in wanted if n in found.files])
    return found


def at_hand(src: str | Path, options: HubOptions = DEFAULT, *, base: bool = False) -> Path:
    """Return a model on this machine: the path itself, or a local copy, fetched as far as it is not there.

    Args:
        src: a path, the id of a repository, its address, or the address of a store.
        base: it is a dense checkpoint, of which the weights that would be loaded are fetched and no others.

    Raises:
        SourceError: there is no such path, or what a store refuses. HubError: what the hub refuses.
    """
    place, options = located(src, options)
    if not is_remote(place):
        if not Path(place).exists():
            raise SourceError(f"{place} does not exist{did_you_mean(place)}")
        return Path(place)
    if not base:
        found = find_converted(place, (), options)
        return found.fetch([*found.files])
    found = find(place, (CONFIG,), options)
    found.fetch_beside()
    return found.fetch_weights()
