"""Remote: a model's folder that lies elsewhere, in a repository of the hub or at an address; only what is needed is read of it.

What is small (configs, tokenizers, reports) is fetched into a local folder. Of a `Bucket`, a folder or a file at an address, weights are
read where they lie, each tensor by its range of bytes (remote_file.py). What was fetched is deleted when the process ends.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from rpq_convert.errors import SourceError
from rpq_convert.storage.addresses import WEB, Address, asking, retried
from rpq_convert.storage.files import WEIGHTS, belongs, is_inside, module_weights, read_index, weight_files
from rpq_convert.storage.headers import read_entries
from rpq_convert.storage.remote_file import RemoteFile

if TYPE_CHECKING:  # a report is fetched without torch
    from rpq_convert.storage.pickles import PickleSource
    from rpq_convert.storage.reader import SafetensorsSource, TensorInfo

DEPTH, MOST = 4, 10_000  # folders in folders that are looked into, and files that a model's folder may have
READERS = 8  # headers that are read at once


@dataclass(frozen=True)
class Remote(ABC):
    """A model's folder that lies elsewhere.

    Args:
        name: its id or its address.
        folder: a local folder with what was fetched so far.
        files: its files' names and sizes.
    """

    name: str
    folder: Path
    files: Mapping[str, int | None]

    offline = ""  # why it cannot be asked now
    commit = ""  # the state that it is read in, where it has several

    @abstractmethod
    def fetch(self, names: Sequence[str]) -> Path:
        """Return the folder with these files in it; what is there is not fetched again."""

    @abstractmethod
    def header(self, file: str) -> dict[str, TensorInfo]:
        """Return the tensors of a safetensors file."""

    @abstractmethod
    def tensors(
        self, *, allow_pickle: bool = False, named: str | None = None, key: str | None = None
    ) -> SafetensorsSource | PickleSource:
        """Return its tensors, so that they can be read.

        Args:
            allow_pickle, named, key: as for `storage.folder.open_folder`.
        """

    def fetch_beside(self, *, allow_pickle: bool = False) -> Path:
        """Return the folder with what belongs beside the weights; nothing else is downloaded."""
        self.fetch([n for n in self.files if belongs(n)])
        modules = module_weights(self.files, self.folder, allow_pickle=allow_pickle)
        return self.fetch([*modules.values()])

    def weight_names(
        self, *, allow_pickle: bool = False, named: str | None = None
    ) -> tuple[list[str], dict[str, str] | None]:
        """Return the names of its weight files, and its index, which is fetched, if they have one."""
        chosen = weight_files(self.files, self.name, allow_pickle=allow_pickle, named=named)
        if not chosen[0].endswith(".json"):
            return chosen, None
        index = read_index(self.fetch(chosen) / chosen[0])
        return sorted(set(index.values())), index

    def fetch_weights(self, *, allow_pickle: bool = False, named: str | None = None) -> Path:
        """Return the folder with its weights, each tensor in one file."""
        return self.fetch(self.weight_names(allow_pickle=allow_pickle, named=named)[0])

    def headers(self, *, named: str | None = None) -> SafetensorsSource:
        """Return the tensors' names, types and shapes; their weights stay where they are.

        Raises:
            SourceError: no safetensors files, broken ones, or what the other side refuses.
        """
        from rpq_convert.storage.reader import SafetensorsSource

        chosen, index = self.weight_names(named=named)
        with ThreadPoolExecutor(READERS) as pool:
            return SafetensorsSource(pool.map(self.header, chosen), index, self.name)


@dataclass(frozen=True)
class Bucket(Remote):
    """A folder at an address, or one file.

    Args:
        places: name -> address of each file. is_file: whether it is the address of a file.
    """

    places: Mapping[str, Address] = field(default_factory=dict)
    is_file: bool = False

    def file(self, name: str) -> RemoteFile:
        return RemoteFile(self.places[name], self.files[name] or 0, self.folder / name)

    def fetch(self, names: Sequence[str]) -> Path:
        for name in names:
            if name not in self.files:
                raise SourceError(f"{self.name}/{name} is missing, the index names it")
            self.file(name).fetched()
        return self.folder

    def weight_names(
        self, *, allow_pickle: bool = False, named: str | None = None
    ) -> tuple[list[str], dict[str, str] | None]:
        if not self.is_file:
            return super().weight_names(allow_pickle=allow_pickle, named=named)
        (name,) = self.files
        if not name.endswith(".safetensors") and not allow_pickle:
            raise SourceError(f"{self.name} is not a safetensors file; a pickled one needs allow_pickle=True")
        return [name], None

    def header(self, file: str) -> dict[str, TensorInfo]:
        from rpq_convert.storage.reader import infos_of

        if file not in self.files:
            raise SourceError(f"{self.name}/{file} is missing, the index names it")
        return infos_of(read_entries(self.file(file)))

    def tensors(
        self, *, allow_pickle: bool = False, named: str | None = None, key: str | None = None
    ) -> SafetensorsSource | PickleSource:
        chosen, _ = self.weight_names(allow_pickle=allow_pickle, named=named)
        if all(n.endswith(".safetensors") for n in chosen):
            return self.headers(named=named)
        from rpq_convert.storage.folder import open_folder

        folder = self.fetch(chosen)
        return open_folder(
            folder / chosen[0] if self.is_file else folder, allow_pickle=allow_pickle, named=named, key=key
        )


def find(address: Address, wanted: Sequence[str] = ()) -> Bucket:
    """Find what lies at an address, and fetch those of these small files that are there.

    Raises:
        SourceError: nothing, too much, or what the store refuses.
    """
    system, root = address.store()
    with asking(address):
        system.invalidate_cache()
        found = retried(lambda: _listed(system, root, address))
    if len(found) > MOST:
        raise SourceError(f"{address} holds more than {MOST:,} files; give the folder of one model")
    places = {n: Address(address.protocol, _below(address, path, root)) for n, (path, _) in found.items()}
    sizes = {n: size for n, (_, size) in found.items()}
    single = [path for path, _ in found.values()] == [root]
    bucket = Bucket(str(address), _folder_of(address), sizes, places, single)
    bucket.fetch([n for n in wanted if n in sizes])
    return bucket


def _listed(system: Any, root: str, address: Address) -> dict[str, tuple[str, int]]:
    """Return name -> path and size of what lies at a place of a store."""
    if address.protocol not in WEB or address.name.endswith(WEIGHTS):
        info = system.info(root)
        if info["type"] == "file":
            return {address.name: (root, info["size"] or 0)}
    found = {}
    for path, info in system.find(root, maxdepth=DEPTH, detail=True).items():
        name = path.removeprefix(root).lstrip("/")
        name = unquote(name) if address.protocol in WEB else name
        if is_inside(name) and not any(part.startswith(".") for part in name.split("/")):
            size = info["size"] if info["size"] is not None else system.info(path)["size"]
            found[name] = (path, size or 0)
    if not found:
        raise FileNotFoundError(root)
    return found


def _below(address: Address, path: str, root: str) -> str:
    return address.path + path.removeprefix(root) if path != root else address.path


@cache
def _scratch() -> Path:
    """Return the folder of what this process fetches, which is deleted when it ends."""
    place = tempfile.mkdtemp(prefix="rpq-fetched-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return Path(place)


_names: dict[Path, str] = {}  # local folder -> the address that it was fetched from


def _folder_of(address: Address) -> Path:
    """Return a new local folder for what is fetched from an address."""
    number = hashlib.sha256(str(address).encode()).hexdigest()[:8]
    folder = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=_scratch())) / address.name
    folder.mkdir()
    _names[folder] = str(address)
    return folder


def fetched_from(folder: Path) -> str | None:
    """Return the address that a local folder was fetched from, or None."""
    return _names.get(folder)
