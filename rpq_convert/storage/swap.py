"""Swap: where an output folder lies while it is made, and how it takes its name. Free of torch.

`<out>.partial` holds what is unfinished, `<out>.tuning.partial` how far tuning is, `<out>.old.partial` what was replaced and is being
deleted. A finished folder takes the place of an earlier one by exchanging names, where the operating system can: at any moment one whole
folder has the name. Elsewhere the earlier one is renamed first; a run that was killed between the two renames is undone by the next one
(`recover`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # a kernel or a file system without it


def work_of(out: Path) -> Path:
    """Return where an output folder is written before it is complete."""
    return out.with_name(out.name + ".partial")


def old_of(out: Path) -> Path:
    """Return where a replaced folder lies while it is deleted."""
    return out.with_name(out.name + ".old.partial")


def tuning_of(out: Path) -> Path:
    """Return where a folder keeps the state of a tuning run that has not ended."""
    return out.with_name(out.name + ".tuning.partial")


def recover(out: Path) -> None:
    """Give a replaced folder its name back where a killed run has put nothing in its place; delete what is replaced."""
    old = old_of(out)
    if old.exists() and not out.exists():
        os.replace(old, out)
    remove(old)


def put_in_place(work: Path, out: Path) -> None:
    """Give a finished folder its name, and delete what had it before."""
    old = old_of(out)
    sync(work)
    if not os.path.lexists(out):
        os.replace(work, out)
    elif exchange(work, out):
        os.replace(work, old)
    else:
        os.replace(out, old)
        os.replace(work, out)
    sync(out.parent)
    remove(old)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once; return whether the system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system than Linux, or an old C library
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
