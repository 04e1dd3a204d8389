"""Faults: let the Nth file operation below a folder fail, be cut short, or be the last that this process does.

The library writes every file by Python's own functions, so these are replaced, in a process that was forked for one trial. Operations are
counted in the order in which a run does them, which is the same every time with the serial executor.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODES = (
    "EIO",
    "ENOSPC",
    "short",
    "kill",
)  # short: half of the bytes are written before the disk is full, or before the kill
CALLS = ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync", "open", "ftruncate", "pwrite")


class Faults:
    """Counts operations below `root`; the operation number `at` fails in the way of `mode`.

    Attributes:
        seen: what was done: (operation, path).
    """

    def __init__(self, root: Path, at: int = -1, mode: str = "") -> None:
        self.root, self.at, self.mode = str(root.resolve()), at, mode
        self.seen: list[tuple[str, str]] = []

    def install(self) -> None:
        """Replace the functions, for the rest of this process."""
        for name in CALLS:
            setattr(os, name, self._call(name, getattr(os, name)))
        plain = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, (str, os.PathLike)) or not self._inside(file, None):
                return plain(file, mode, *args, **kwargs)
            self.meet("open to write" if set(mode) & set("wax+") else "open to read", str(file))
            return _File(plain(file, mode, *args, **kwargs), self, str(file))

        builtins.open = io.open = opened  # type: ignore[assignment]
        from rpq_convert.storage import swap

        exchange = swap.exchange

        def exchanged(one: Path, other: Path) -> bool:
            self.meet("exchange", str(other))
            return exchange(one, other)

        swap.exchange = exchanged

    def meet(self, operation: str, path: str, part: Callable[[], Any] | None = None) -> None:
        """Count an operation, and fail in its place if it is its turn.

        Args:
            part: does half of it.
        """
        self.seen.append((operation, path))
        if len(self.seen) - 1 != self.at:
            return
        if self.mode in ("short", "kill") and part is not None:
            part()
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.EIO if self.mode == "EIO" else errno.ENOSPC
        raise OSError(code, os.strerror(code), path)

    def _call(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside(path, kwargs.get("dir_fd")) and (name != "open" or (args and args[0] & os.O_CREAT)):
                half = (lambda: plain(path, args[0][: len(args[0]) // 2], *args[1:])) if name == "pwrite" else None
                self.meet(name, _named(path, kwargs.get("dir_fd")), half)
            return plain(path, *args, **kwargs)

        return call

    def _inside(self, path: Any, folder: int | None) -> bool:
        return os.path.abspath(_named(path, folder)).startswith(self.root)


class _File:
    """An open file whose reads and writes are operations."""

    def __init__(self, file: Any, faults: Faults, path: str) -> None:
        self._file, self._faults, self._path = file, faults, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def write(self, data: Any) -> Any:
        self._faults.meet("write", self._path, lambda: self._file.write(data[: len(data) // 2]))
        return self._file.write(data)

    def read(self, *args: Any) -> Any:
        self._faults.meet("read", self._path)
        return self._file.read(*args)

    def readinto(self, buffer: Any) -> Any:
        self._faults.meet("read", self._path)
        return self._file.readinto(buffer)


def _named(path: Any, folder: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    if folder is not None:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return os.fsdecode(path)
