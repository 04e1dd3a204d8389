"""Verify and audit a converted folder. Importing this is quick: torch is imported where tensors are looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from rpq_convert.checkpoint.finding import at_hand, find_converted
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.report.schema import FileRow, Report, read_report
from rpq_convert.storage.files import WHOLE, files_in, is_inside, module_weights, refuse_links, weight_paths
from rpq_convert.storage.headers import joined, read_entries
from rpq_convert.storage.options import HubKeywords, HubOptions
from rpq_convert.storage.records import CONFIG, MANIFEST, REPORT, read_manifest, sha256
from rpq_convert.storage.sources import called, is_remote, located, read_config

DEFAULT = HubOptions()


def here(path: str | Path, options: HubOptions = DEFAULT) -> Path:
    """Return a converted folder on this machine: the path itself, or the local copy of what lies elsewhere."""
    place, options = located(path, options)
    if not is_remote(place):
        if not Path(place).exists():
            read_config(Path(place))  # raises, and says what may have been meant
        return Path(place)
    return at_hand(place, options)


@keywords(HubOptions)
def verify(
    path: str | Path,
    progress: Callable[[str], None] | None = None,
    *,
    edited: Collection[str] = (),
    quick: bool = False,
    **source: Unpack[HubKeywords],
) -> list[str]:
    """Check a folder: manifest hashes, headers, index, specs and finiteness. Return the files that were checked.

    Args:
        path: the folder, or the id of a repository on the hub, which is then fetched.
        progress: called with every file.
        edited: files that must be there, and need not be as they were written.
        quick: only sizes, headers, index and manifest; no weight is read, and torch is not imported.
        source: of a repository, as for `audit`.

    Raises:
        VerifyError: what is damaged, and where.
    """
    (options,) = take(source, HubOptions)
    folder = here(path, options)
    refuse_links(folder)
    if not (folder / MANIFEST).is_file():
        read_config(folder)  # raises where it is no RPQ folder at all
    manifest = read_manifest(folder)
    _check_files(folder, manifest["files"], edited, progress, hashes=not quick)
    try:
        if quick:
            read_config(folder)
            paths, index = weight_paths(folder)
            joined(map(read_entries, paths), index, folder)
        else:
            _check_tensors(folder, manifest.get("not_finite", ()))
    except SourceError as e:
        raise VerifyError(str(e)) from None
    return sorted(manifest["files"])


def _check_files(
    folder: Path,
    listed: dict[str, dict[str, Any]],
    edited: Collection[str],
    progress: Callable[[str], None] | None,
    *,
    hashes: bool,
) -> None:
    """Compare the files of a folder with its manifest."""
    names = files_in(folder)
    later = {
        n for n in module_weights(names, folder, allow_pickle=True) if n.endswith(f"/{WHOLE}")
    }  # after ours, by their library
    unlisted = [n for n in names if n not in {*listed, *later} and (n == CONFIG or ".safetensors" in n)]
    if unlisted:
        raise VerifyError(f"{folder / unlisted[0]} is not in the manifest")
    for name, facts in listed.items():
        file = folder / name
        if not is_inside(name) or not os.path.isfile(file):
            raise VerifyError(f"{file} is missing")
        if name in edited:
            continue
        size = file.stat().st_size
        known = [f for f in (facts, facts.get("earlier")) if f]  # two, where a kill ended a change
        if all(size != f["bytes"] for f in known):
            raise VerifyError(f"{file} has {size} bytes, the manifest says {facts['bytes']}")
        if hashes and sha256(file) not in [f["sha256"] for f in known]:
            raise VerifyError(
                f"{file} does not match its sha256 in the manifest{_damaged(file, facts.get('tensors', {}))}"
            )
        if progress:
            progress(name)


def _damaged(file: Path, tensors: dict[str, str]) -> str:
    """Return which tensors of a weight file are damaged, as the end of a sentence; empty where that cannot be told."""
    if not tensors:
        return ""
    from rpq_convert.storage.assembly import digest
    from rpq_convert.storage.reader import SafetensorsSource, read_header

    try:
        source = SafetensorsSource([read_header(file)])
        wrong = [name for name, known in tensors.items() if name not in source or digest(source[name]) != known]
    except SourceError as e:
        return f": {e}"
    return f": {', '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}" if wrong else ""


def _check_tensors(folder: Path, not_finite: Collection[str]) -> None:
    """Compare the tensors of a folder with their descriptions, and look for numbers that are none."""
    from rpq_convert.core import description
    from rpq_convert.storage.folder import open_folder
    from rpq_convert.storage.unpacking import checked
    from rpq_convert.storage.writer import is_finite

    source = checked(open_folder(folder), description.read_all(read_config(folder)["quantization_config"]))
    for key in set(source) - set(not_finite):
        if not is_finite(source[key]):
            raise VerifyError(f"{key} holds NaN or infinite values")


@keywords(HubOptions)
def audit(path: str | Path, **source: Unpack[HubKeywords]) -> Report:
    """Return the report of an RPQ folder, with the sizes that its files have; of a repository, no weight is fetched.

    Args:
        path: the folder, or the id of a repository on the hub.
        source: of a repository: `revision`, `token`, `local_files_only`, the fields of `HubOptions`.
    """
    (options,) = take(source, HubOptions)
    path, options = located(path, options)
    folder = Path(path)
    if is_remote(path):
        repository = find_converted(path, (REPORT,), options)
        folder, files = repository.folder, dict(repository.files)
    else:
        files = {n: p.stat().st_size for n, p in files_in(folder).items()}
    read_config(folder)
    file = folder / REPORT
    if not file.is_file():
        raise SourceError(f"{called(folder)} has no report: {REPORT} is missing; convert the model again to have one")
    report = read_report(file)
    sizes = tuple(FileRow(name, size or 0) for name, size in sorted(files.items()))
    return replace(report, files=sizes)
