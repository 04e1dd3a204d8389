"""How much memory a process may still take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

CONTAINER = Path("/sys/fs/cgroup")  # of this process, as a container sees it


VERSIONS = (  # of control groups: folder, files, name of the cached bytes
    ("", ("memory.max", "memory.current", "memory.stat"), "inactive_file"),
    ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"), "total_inactive_file"),
)
STATUS = Path("/proc/self/status")
_asked: ContextVar[int | None] = ContextVar("memory that this process may take, as its user asked", default=None)


@contextmanager
def within(limit: int | None) -> Iterator[None]:
    """Let `available` count with so many bytes for the whole process at most; None for no limit of one's own."""
    token = _asked.set(limit if limit is not None else _asked.get())
    try:
        yield
    finally:
        _asked.reset(token)


def available() -> int | None:
    """Return the bytes of memory that are left to this process, by the machine, its container, its own limits and what its user asked for;
    None if unknown."""
    found = [*_machine(), *_container(), *_limits()]
    if (limit := _asked.get()) is not None:
        found.append(limit - (_used("VmRSS") or 0))
    return max(0, min(found)) if found else None


def peak() -> int | None:
    """Return the most bytes of memory that this process has held; None if unknown."""
    return _used("VmHWM")


def _used(what: str) -> int | None:
    said = re.search(rf"^{what}:\s+(\d+) kB", STATUS.read_text(), re.M) if STATUS.is_file() else None
    return None if said is None else int(said[1]) * 1024


def _machine() -> list[int]:
    meminfo = Path("/proc/meminfo")
    said = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M) if meminfo.is_file() else None
    return [int(said[1]) * 1024] if said else []


def _container() -> list[int]:
    """Return what a container's limit leaves; files that are cached can be dropped, and do not count as used."""
    for folder, files, cache in VERSIONS:
        try:
            most, used, facts = ((CONTAINER / folder / name).read_text() for name in files)
        except OSError:
            continue
        cached = re.search(rf"^{cache} (\d+)", facts, re.M)
        return [] if most.strip() == "max" else [int(most) - int(used) + int(cached[1] if cached else 0)]
    return []


def _limits() -> list[int]:
    """Return what `ulimit -v` and `ulimit -d` leave."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    found = []
    for kind, what in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, used = resource.getrlimit(kind)[0], _used(what)
        if most != resource.RLIM_INFINITY and used is not None:
            found.append(most - used)
    return found
