"""Verify and audit a converted folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from rpq_convert.checkpoint.loading import read_config
from rpq_convert.core import description
from rpq_convert.core.options import take
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.hf import hub
from rpq_convert.report.schema import FileRow, Report, read_report
from rpq_convert.storage.files import files_in, is_inside, refuse_links
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.options import HubOptions
from rpq_convert.storage.unpacking import checked
from rpq_convert.storage.writer import CONFIG, MANIFEST, REPORT, is_finite, read_manifest, sha256


def verify(
    path: str | Path, progress: Callable[[str], None] | None = None, *, edited: Collection[str] = ()
) -> list[str]:
    """Check a folder: manifest hashes, headers, index, specs and finiteness. Return the files that were checked.

    Args:
        progress: called with every file.
        edited: files that must be there, and need not be as they were written.

    Raises:
        VerifyError: what is damaged, and where.
    """
    folder = Path(path)
    refuse_links(folder)
    if not (folder / MANIFEST).is_file():
        read_config(folder)  # raises where it is no RPQ folder at all
    manifest = read_manifest(folder)
    files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    unlisted = [n for n in files_in(folder) if n not in files and (n == CONFIG or ".safetensors" in n)]
    if unlisted:
        raise VerifyError(f"{folder / unlisted[0]} is not in the manifest")
    for name, (size, digest) in files.items():
        file = folder / name
        if not is_inside(name) or not file.is_file():
            raise VerifyError(f"{file} is missing")
        if name in edited:
            continue
        if file.stat().st_size != size:
            raise VerifyError(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
        if sha256(file) != digest:
            raise VerifyError(f"{file} does not match its sha256 in the manifest")
        if progress:
            progress(name)
    try:
        contents = description.read_all(read_config(folder)["quantization_config"])
        source = checked(open_folder(folder), contents)
        for key in set(source) - set(manifest.get("not_finite", ())):
            if not is_finite(source[key]):
                raise VerifyError(f"{key} holds NaN or infinite values")
    except SourceError as e:
        raise VerifyError(str(e)) from None
    return sorted(files)


def audit(path: str | Path, **source: Any) -> Report:
    """Return the report of an RPQ folder, with the sizes that its files have; of a repository, no weight is fetched.

    Args:
        path: the folder, or the id of a repository on the hub.
        source: of a repository: `revision`, `token`, `local_files_only`, the fields of `HubOptions`.
    """
    (options,) = take(source, HubOptions)
    folder = Path(path)
    if hub.is_name(path):
        repository = hub.find(path, (CONFIG, REPORT), options)
        folder, files = repository.folder, dict(repository.files)
    else:
        files = {n: p.stat().st_size for n, p in files_in(folder).items()}
    read_config(folder)
    file = folder / REPORT
    if not file.is_file():
        raise SourceError(f"{file} is missing: the folder has no report")
    report = read_report(file)
    sizes = tuple(FileRow(name, size or 0) for name, size in sorted(files.items()))
    return replace(report, files=sizes)
