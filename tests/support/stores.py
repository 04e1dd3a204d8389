"""A store in memory that notes what is asked of it, and that can fail: `unsure://`."""

import re

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Unsure(MemoryFileSystem):
    """A store in memory.

    Attributes:
        log: what was asked: kind, last part of the path, bytes.
        failing: (pattern of a path, how often it still fails, the error).
    """

    protocol = "unsure"
    store: dict = {}  # noqa: RUF012 - as its parent keeps them, for the whole process
    pseudo_dirs = [""]  # noqa: RUF012
    log: list = []  # noqa: RUF012
    failing: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("unsure://", "memory://", 1))

    def _ask(self, kind, path, size=0):
        for entry in self.failing:
            if re.search(entry[0], f"{kind} {path}") and entry[1] > 0:
                entry[1] -= 1
                raise entry[2]
        self.log.append((kind, path.rpartition("/")[2], size))

    def info(self, path, **kwargs):
        self._ask("info", path)
        return super().info(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start=start, end=end, **kwargs)
        self._ask("read", path, len(data))
        return data

    def get_file(self, rpath, lpath, **kwargs):
        self._ask("get", rpath, super().info(rpath)["size"])
        super().get_file(rpath, lpath, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self._ask("put", rpath)
        super().put_file(lpath, rpath, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self._ask("put", path)
        super().pipe_file(path, value, **kwargs)

    def rm_file(self, path):
        self._ask("remove", path)
        super().rm_file(path)


fsspec.register_implementation("unsure", Unsure, clobber=True)


def fails(pattern, error, times=10**6):
    """Let what matches this pattern (`read …/name`) fail so often."""
    Unsure.failing.append([pattern, times, error])


def heal():
    Unsure.failing.clear()
    Unsure.log.clear()


def fresh():
    """Let the store be empty and well."""
    heal()
    Unsure.store.clear()
    Unsure.pseudo_dirs[:] = [""]


def filled(folder, place):
    """Put a folder's files at a place of the store; return its address."""
    store = fsspec.filesystem("unsure")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            MemoryFileSystem.pipe_file(store, f"/{place}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return f"unsure://{place}"


def held(place):
    """Return name -> bytes of what lies at a place of the store."""
    store = fsspec.filesystem("unsure")
    return {p.removeprefix(f"/{place}/"): MemoryFileSystem.cat_file(store, p) for p in store.find(f"/{place}")}
