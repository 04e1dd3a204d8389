"""Verify and audit a converted folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rpq_convert.checkpoint.loading import read_config
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.hf import hub
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.report.schema import FileRow, Report, read_report
from rpq_convert.storage.reader import open_folder
from rpq_convert.storage.writer import CONFIG, MANIFEST, REPORT, read_manifest, sha256


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
    if not (folder / MANIFEST).is_file():
        read_config(folder)  # raises where it is no RPQ folder at all
    files = {name: (facts["bytes"], facts["sha256"]) for name, facts in read_manifest(folder)["files"].items()}
    unlisted = [p for p in (folder / CONFIG, *sorted(folder.glob("*.safetensors*"))) if p.name not in files]
    if unlisted:
        raise VerifyError(f"{unlisted[0]} is not in the manifest")
    for name, (size, digest) in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
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
        config, source = read_config(folder), open_folder(folder)
    except SourceError as e:
        raise VerifyError(str(e)) from None
    for name, description in config["quantization_config"]["modules"].items():
        rpq = RPQWeight.from_config(description, device="meta")
        for part, (dtype, shape) in rpq.spec.tensors(rpq.view, rpq.shape).items():
            key = f"{name}_rpq.{part}"
            if key not in source:
                raise VerifyError(f"{key} is missing from the weight files")
            info = source.infos[key]
            if (info.dtype, tuple(info.shape)) != (dtype, shape):
                raise VerifyError(
                    f"{key} is {list(info.shape)} {info.dtype}, its description says {list(shape)} {dtype}"
                )
        if rpq.spec.outliers:
            key, inputs = f"{name}_rpq.positions", rpq.cut.inputs
            low, high = source[key].aminmax()
            if int(low) < 0 or int(high) >= inputs:
                raise VerifyError(f"{key} names inputs {int(low)} to {int(high)}, of {inputs}")
    for key in source:
        tensor = source[key]
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise VerifyError(f"{key} holds NaN or infinite values")
    return sorted(files)


def audit(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Report:
    """Return the report of an RPQ folder, with the sizes that its files have; of a repository, no weight is fetched.

    Args:
        path: the folder, or the id of a repository on the hub.
        revision, token, local_files_only: of a repository, as for `convert_checkpoint`.
    """
    folder = Path(path)
    if hub.is_name(path):
        where: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
        repository = hub.find(path, (CONFIG, REPORT), **where)
        folder, files = repository.folder, dict(repository.files)
    else:
        files = {p.name: p.stat().st_size for p in folder.glob("*") if p.is_file()}
    read_config(folder)
    file = folder / REPORT
    if not file.is_file():
        raise SourceError(f"{file} is missing: the folder has no report")
    report = read_report(file)
    sizes = tuple(FileRow(name, size or 0) for name, size in sorted(files.items()))
    return replace(report, files=sizes)
