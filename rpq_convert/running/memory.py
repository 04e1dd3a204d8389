"""How much memory a process may still take."""

from __future__ import annotations

import re
from pathlib import Path

CONTAINER = Path("/sys/fs/cgroup")  # of this process, as a container sees it


def available() -> int | None:
    """Return the bytes of memory that are left to this process, by the machine, its container and its own limit; None if unknown."""
    found = [*_machine(), *_container(), *_limit()]
    return max(0, min(found)) if found else None


def _machine() -> list[int]:
    meminfo = Path("/proc/meminfo")
    said = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M) if meminfo.is_file() else None
    return [int(said[1]) * 1024] if said else []


def _container() -> list[int]:
    """Return what a container's limit leaves; files that are cached can be dropped, and do not count as used."""
    try:
        most, used, facts = ((CONTAINER / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return []
    cached = re.search(r"^inactive_file (\d+)", facts, re.M)
    return [] if most.strip() == "max" else [int(most) - int(used) + int(cached[1] if cached else 0)]


def _limit() -> list[int]:
    """Return what `ulimit -v` leaves."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = (
        re.search(r"^VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if Path("/proc/self/status").is_file()
        else None
    )
    return [] if most == resource.RLIM_INFINITY or used is None else [most - int(used[1]) * 1024]
