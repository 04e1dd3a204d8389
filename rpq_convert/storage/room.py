"""Room: whether an output can be written where it is wanted, before it takes long to find out. Free of torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rpq_convert.errors import FolderError
from rpq_convert.report.text import megabytes
from rpq_convert.storage.addresses import destination, local_path
from rpq_convert.storage.swap import work_of

if TYPE_CHECKING:
    from rpq_convert.planning.plan import Plan


def check_free(out: str | Path, *, overwrite: bool) -> None:
    """Refuse an output folder that exists, or that cannot be made.

    Raises:
        FolderError: what is in its way.
    """
    if destination(out) is not None:
        return  # its store is asked when its lock is taken (delivery.py)
    place = Path(local_path(out) or out)
    if place.exists() and not place.is_dir():
        raise FolderError(f"{place} is a file; choose another folder")
    if place.exists() and not overwrite:
        raise FolderError(f"{place} already exists; choose another folder or pass overwrite=True")
    _check_writable(place)


def check_apart(src: str | Path, out: str | Path) -> None:
    """Refuse an output that is a source or holds it, as a whole or in the making: it would delete the original.

    Raises:
        FolderError: it is, or does.
    """
    real, target = Path(src).resolve(), Path(out).resolve()
    taken = {target.with_name(target.name + end) for end in ("", ".partial", ".old.partial")}
    if Path(src).exists() and not taken.isdisjoint((real, *real.parents)):
        raise FolderError(f"{out} is or holds the source {src}; choose another folder")


def check_file(file: str | Path, ends: Collection[str] = ()) -> None:
    """Refuse a file to write that cannot be written.

    Args:
        ends: it must end in one of these, if any are given.

    Raises:
        FolderError: what is in its way.
    """
    path = Path(file)
    if ends and path.suffix.lower() not in ends:
        raise FolderError(
            f"{path} is written as {' or '.join(ends)[1:].upper()}; give a name that ends in {' or '.join(ends)}"
        )
    if path.is_dir():
        raise FolderError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FolderError(f"{path.parent} does not exist; make it, or give another file")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    above = nearest(path)
    if not above.is_dir():
        raise FolderError(f"{path} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FolderError(f"{path} cannot be made: {above} is not writable")


def check_room(out: str | Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        out: the output folder. needed: bytes that will be written, beside those that are there.

    Raises:
        FolderError: how much is missing.
    """
    free = shutil.disk_usage(nearest(Path(out))).free
    if needed > free:
        raise FolderError(
            f"disk full: {out} needs {megabytes(needed)} while it is written, and {megabytes(free)} are free there; "
            "free some space or choose another folder"
        )


def nearest(path: Path) -> Path:
    """Return what exists of a path or above it."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def bytes_to_write(out: str | Path, plan: Plan) -> int:
    """Return the bytes that a plan still needs on the disk, but for what an earlier run wrote."""
    work = work_of(Path(out))
    there = sum(p.stat().st_size for p in work.rglob("*.safetensors")) if work.is_dir() else 0
    return max(0, most_bytes(plan) - there)


def most_bytes(plan: Plan) -> int:
    """Return the most bytes that pieces and weight files take together: tensors leave the pieces file by file."""
    where = {key: number for number, (_, keys) in enumerate(plan.shards) for key in keys}
    held = sum(sum(job.nbytes.values()) for job in plan.jobs)
    leaving = [0] * len(plan.shards)
    for job in plan.jobs:
        parts = job.spec.stored(job.weight_view, job.shape)
        leaving[max(where[f"{job.name}_rpq.{part}"] for part in parts)] += sum(job.nbytes.values())
    most = held
    for (name, _), left in zip(plan.shards, leaving):
        held += plan.files[name]
        most = max(most, held)
        held -= left
    return most
