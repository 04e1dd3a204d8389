"""A lock for each output folder: of two commands that write one folder, one wins and the other says who holds it. Free of torch.

The lock is `flock` on `<out>.partial.lock`, a file that says who holds it. The operating system frees it when its process dies, however
that happens; the file is then taken over by the next run. It is removed when the work ends, so the one who gets the lock looks whether
the file is still there. Where a file system has no locks (some network mounts), the file's existence is the lock: that of a process of
this machine that has died is taken over, that of another machine has to be deleted by hand. Rejected: the filelock package, which
leaves its files behind and keeps no record of the holder beside the lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rpq_convert.errors import FolderError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check, parse_json
from rpq_convert.showing import printable
from rpq_convert.storage.addresses import without_password
from rpq_convert.storage.swap import work_of

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # of a file system that has none
SHOWN = 100  # characters of a command in a message
PATIENCE = 0.2  # seconds in which a new holder writes its record
_held: dict[Path, tuple[int, int]] = {}  # lock file -> the thread that holds it, and how often
_guard = threading.Lock()


@contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder; a thread may take it again while it holds it.

    Raises:
        FolderError: another process or thread holds it: which, and since when.
    """
    place = work_of(Path(out).absolute())
    path = place.parent.resolve() / f"{place.name}.lock"
    own = threading.get_ident()
    with _guard:
        holder, count = _held.get(path, (own, 0))
        if holder == own and count:
            _held[path] = own, count + 1
    if holder == own and count:
        try:
            yield
        finally:
            with _guard:
                _held[path] = own, _held[path][1] - 1
        return
    handle = _take(path, Path(out))
    with _guard:
        _held[path] = own, 1
    try:
        yield
    finally:
        with _guard:
            del _held[path]
        with suppress(OSError):
            path.unlink()  # while it is held: whoever opened this file finds that it is gone
        os.close(handle)


def _take(path: Path, out: Path) -> int:
    """Return the open file of a lock that is now held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle, fresh = _open(path)
        try:
            if not _free(handle, fresh, path):
                raise FolderError(f"{out} is being written {_told(handle)}; wait for it, or choose another folder")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, json.dumps(_record()).encode(), 0)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has just ended, and removed it


def _open(path: Path) -> tuple[int, bool]:
    """Return the open file, and whether it was made now."""
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            with suppress(FileNotFoundError):
                return os.open(path, os.O_RDWR), False


def _free(handle: int, fresh: bool, path: Path) -> bool:
    """Take the lock of an open file, and return whether that was possible."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
    if fresh or not _has_died(_read(handle)):
        return fresh
    with suppress(FileNotFoundError):
        path.unlink()
    return True  # no longer at its path, so the caller begins anew


def _has_died(record: dict[str, Any] | None) -> bool:
    """Return whether a holder was a process of this machine, and is no more."""
    if record is None or record["host"] != socket.gethostname():
        return False
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's, and alive
        return False
    return False


def _record() -> dict[str, Any]:
    return {
        "pid": os.getpid(), "host": socket.gethostname(), "command": _command(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip


def _command() -> str:
    """Return the running command, without an access token that it was given."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv and sys.argv[0] else ["python"]
    plain = [w if before != "--token" else "***" for before, w in zip(["", *words], words)]
    return " ".join("--token=***" if w.startswith("--token=") else without_password(w) for w in plain)


def _read(handle: int) -> dict[str, Any] | None:
    """Return a holder's record, or None where there is none, or one that cannot be read."""
    text = os.pread(handle, 1 << 16, 0)
    try:
        record: dict[str, Any] = parse_json(text.decode(errors="replace"), kinds.LOCK, "the lock", FolderError)
        check(record, kinds.LOCK, "the lock", FolderError)
    except FolderError:
        return None
    return record


def _told(handle: int) -> str:
    """Say who holds a lock, and since when."""
    end = time.monotonic() + PATIENCE
    while (record := _read(handle)) is None and time.monotonic() < end:
        time.sleep(0.01)
    if record is None:
        return "by another process"
    command = printable(record["command"])
    command = command if len(command) <= SHOWN else f"{command[: SHOWN - 1]}…"
    who = "another thread of this process" if record["pid"] == os.getpid() else f"process {record['pid']}"
    return f"by {who} on {printable(record['host'])} since {printable(record['since'])} ({command})"
