"""numba's cache on disk for the kernels: valid only for the sources that it was made from.

numba keeps a compiled function until the file that holds it changes. A kernel also contains the functions that it calls, from
other files, so a stale copy of these would go on being used. Here the stamp of every cache entry is a hash of all the
kernels' sources: after any edit everything is compiled again, and overwrites what was there. `njit` and `cfunc` are numba's own
but for that; nothing is set for other users of numba in the process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.misc.appdirs import AppDirs

PACKAGE = Path(__file__).resolve().parents[2]
SOURCES = ("kernels", "fit/loops")  # folders of compiled functions


@functools.cache
def stamp() -> str:
    """Return the sha256 of all sources of compiled functions, by name and content."""
    found = hashlib.sha256()
    for file in sorted(file for folder in SOURCES for file in (PACKAGE / folder).rglob("*.py")):
        found.update(
            f"{file.relative_to(PACKAGE).as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return found.hexdigest()


def _own(path: Path) -> bool:
    """Whether a folder belongs to this user alone: what is read from a cache is run."""
    if not hasattr(os, "getuid"):
        return True
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _usual() -> Iterator[Path]:
    """Yield the folders that are tried in turn: where the user wants numba's cache, beside the package, the user's own."""
    name = f"{PACKAGE.name}-{hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:16]}"
    if chosen := getattr(numba.config, "CACHE_DIR", ""):
        yield Path(chosen) / name
    yield PACKAGE / "__pycache__" / "numba"
    user = Path(AppDirs(PACKAGE.name, appauthor=False).user_cache_dir)
    if user.is_absolute():  # not so where nobody knows a home folder
        yield user / name


def _writable(path: Path, mode: int = 0o777) -> str:
    """Make a folder and write a file into it; return why that fails, or nothing."""
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return ""


@functools.cache
def folder() -> Path | None:
    """Return where compiled kernels are kept, or None where nothing can be written; chosen once per process.

    A temporary folder, and none at all, are announced by one line on stderr: compiling takes up to a minute.
    """
    why = ""
    for path in _usual():
        failed = _writable(path)
        if not failed:
            return path
        why = why or failed
    user = os.getuid() if hasattr(os, "getuid") else "user"
    path = Path(tempfile.gettempdir()) / f"{PACKAGE.name}-kernels-{user}"
    if not _writable(path, 0o700) and _own(path):
        _say(
            f"compiled kernels are kept in {path}, as nothing can be written to {why}; set NUMBA_CACHE_DIR to a folder of yours"
        )
        return path
    _say(
        f"compiled kernels cannot be kept and are compiled again in every process, up to a minute each: nothing can be written "
        f"to {why}, nor to {path}; set NUMBA_CACHE_DIR to a folder of yours"
    )
    return None


def _say(what: str) -> None:
    print(f"rpq-convert: {what}", file=sys.stderr, flush=True)


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Where and under which names numba keeps the functions of one file."""

    def __init__(self, file: str) -> None:
        self._py_file = file  # numba's name, for a warning

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator:
        return cls(py_file)

    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> str:
        return stamp()

    def get_disambiguator(self) -> str:
        """Return the folder of the file: numba adds the names of file and function."""
        return Path(self._py_file).parent.name


class _Impl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes: ClassVar[list[Any]] = [_Locator]  # type: ignore[misc]


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _Impl


def njit(*, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return `numba.njit(**options)`, whose functions are kept in `folder()` with `cache`."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(**options)(function)
        if cache and folder():
            compiled._cache = _Cache(function)
        return compiled

    return decorate


def cfunc(signature: Any, function: Callable[..., Any]) -> Any:
    """Return a function compiled to be called from C, read from `folder()` where it is there."""
    compiled: Any = CFunc(function, normalize_signature(signature), locals={}, options={})
    if folder():
        compiled._cache = _Cache(function)
    compiled.compile()
    return compiled
