"""The manifest of a folder: size and hash of every file, hashes of tensors, and how the folder was made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpq_convert.errors import SourceError
from rpq_convert.planning.plan import Plan
from rpq_convert.running.processor import family
from rpq_convert.storage.assembly import digest, write_file
from rpq_convert.storage.lock import locked
from rpq_convert.storage.reader import SafetensorsSource, read_header
from rpq_convert.storage.records import MANIFEST, read_manifest, sha256
from rpq_convert.version import __version__


def made_now(plan: Plan, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return how a folder is made, for its manifest."""
    made: dict[str, Any] = {"plan": plan.sha256, "version": __version__, "processor": family(), "source": source}
    if plan.is_reproducible:
        made["reproducible"] = True
    return {k: v for k, v in made.items() if v is not None}


def write_manifest(
    folder: Path,
    files: Mapping[str, Path],
    not_finite: Sequence[str] = (),
    made: Mapping[str, Any] | None = None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write size and sha256 of files, and of their tensors, into a folder's manifest.

    Args:
        files: path inside the folder -> file. not_finite: buffers, such as masks, that are meant to hold NaN or infinite values.
        made: how it was made (`made_now`). known: entries of files that were hashed when they were written.
    """
    entries = {}
    for name, path in files.items():
        if name in (known or {}):
            entries[name] = {k: v for k, v in (known or {})[name].items() if k != "not_finite"}
        elif name != MANIFEST:
            entries[name] = entry_of(path)
    rest = {"not_finite": [*not_finite], "made": made}
    write_file(folder / MANIFEST, json.dumps({"files": entries} | {k: v for k, v in rest.items() if v}, indent=1))


def entry_of(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    found: dict[str, Any] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".safetensors":
        try:
            source = SafetensorsSource([read_header(path)])
        except SourceError:  # of somebody else, who calls it so
            return found
        found["tensors"] = {name: digest(source[name]) for name in source}
    return found


def amend(folder: Path, texts: Mapping[str, str]) -> None:
    """Rewrite text files of a finished folder and their entries in its manifest.

    The folder is whole at any moment: while files are replaced, the manifest knows both what they were and what they become.
    """
    with locked(folder):
        manifest = read_manifest(folder)
        files = manifest["files"]
        new = {
            name: {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in texts.items()
        }
        both = {name: entry | _earlier(folder / name, files.get(name)) for name, entry in new.items()}
        write_file(folder / MANIFEST, json.dumps(manifest | {"files": files | both}, indent=1))
        for name, text in texts.items():
            write_file(folder / name, text)
        write_file(folder / MANIFEST, json.dumps(manifest | {"files": files | new}, indent=1))


def _earlier(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entry of a file as it is before it is replaced, of those that the manifest knows; empty where it is new."""
    if known is None:
        return {}
    now = next((f for f in (known, known.get("earlier")) if f and is_whole(path, f)), known)
    return {"earlier": {"bytes": now["bytes"], "sha256": now["sha256"]}}


def is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    """Return whether a file is as a record describes it."""
    return os.path.isfile(path) and path.stat().st_size == facts["bytes"] and sha256(path) == facts["sha256"]
