"""Sources: a checkpoint as a lazy mapping from names to tensors, one tensor in memory at a time.

Tensors are read by position into new memory. Conversions that look at one tensor after another do not map files, since a mapping counts
against an address-space limit and keeps its pages. A model that runs is larger than its memory may be: its tensors are `mapped`, so
that the system reads what is used, and drops it again. The header is checked first (headers.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rpq_convert.errors import SourceError
from rpq_convert.showing import one_line
from rpq_convert.storage.assembly import digest
from rpq_convert.storage.headers import Entry, joined, read_entries
from rpq_convert.storage.remote_file import PART, File, RemoteFile, size_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored: bytes `start` to `end` of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: File
    start: int
    end: int


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file from its header alone; see `read_entries`. The library must accept it too.

    Raises:
        SourceError: as `read_entries`; or what the library says against the header.
    """
    found = infos_of(read_entries(path))
    try:
        with safe_open(path, "np"):  # which maps the file for reading alone
            return found
    except SafetensorError as e:
        raise SourceError(f"{path} has a broken safetensors header: {one_line(str(e))}") from None
    except (OSError, MemoryError):  # no address space to map it in, which is not needed
        return found


def infos_of(entries: Mapping[str, Entry]) -> dict[str, TensorInfo]:
    """Return the entries of a header with torch's dtypes."""
    return {k: TensorInfo(e.name, DTYPES[e.kind], e.shape, e.file, e.start, e.end) for k, e in entries.items()}


class SafetensorsSource(Mapping[str, Tensor]):
    """The tensors of one or many safetensors files; each access reads one tensor. Safe to use from several threads.

    Args:
        headers: of every file.
        index: tensor -> file, if there is one, and the place where it lies, for messages.

    Raises:
        SourceError: a tensor in two files, or an index that the headers do not bear out.
    """

    def __init__(
        self,
        headers: Iterable[Mapping[str, TensorInfo]],
        index: Mapping[str, str] | None = None,
        where: str | Path = "",
    ) -> None:
        self.infos = joined(headers, index, where)
        self.maps: dict[File, Tensor] | None = None  # file -> its bytes, while tensors are mapped

    def __len__(self) -> int:
        return len(self.infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        info = self.infos[name]
        if self.maps is not None and info.end > info.start and _map(info.file, self.maps):
            return _mapped(info, self.maps[info.file])
        data = torch.empty(info.end - info.start, dtype=torch.uint8)
        got = _read_into(data, info) if len(data) else 0
        if got != len(data):
            raise SourceError(f"{info.file}: {name} ended after {got:,} of {len(data):,} bytes; was the file changed?")
        return data.view(info.dtype).reshape(info.shape) if len(data) else torch.empty(info.shape, dtype=info.dtype)


def _read_into(data: Tensor, info: TensorInfo) -> int:
    """Fill a tensor of bytes, and return how many there were."""
    if isinstance(info.file, RemoteFile):
        for at in range(0, len(data), PART):
            part = data[at : at + PART]
            read = info.file.read(info.start + at, info.start + at + len(part))
            part.numpy()[:] = np.frombuffer(read, np.uint8)
        return len(data)
    with open(info.file, "rb") as f:
        f.seek(info.start)
        return f.readinto(data.numpy().data)


def _map(file: File, maps: dict[File, Tensor]) -> bool:
    """Map a file that was not yet, which is fetched first if it lies elsewhere; return whether it is. The system may have no address space."""
    if file not in maps:
        place = file.fetched() if isinstance(file, RemoteFile) else file
        try:
            maps[file] = torch.from_file(str(place), shared=False, size=size_of(place), dtype=torch.uint8)
        except RuntimeError:
            return False
    return True


def _mapped(info: TensorInfo, whole: Tensor) -> Tensor:
    """Return a tensor in the pages of its file. Writing to it copies a page, and never changes the file."""
    data = whole[info.start : info.end]
    if len(data) != info.end - info.start:
        raise SourceError(f"{info.file}: {info.name} ended after {len(data):,} bytes; was the file changed?")
    if info.start % info.dtype.itemsize:  # no number may lie across
        data = data.clone()
    return data.view(info.dtype).reshape(info.shape)


@contextmanager
def mapped(source: Any) -> Iterator[None]:
    """Let tensors of a source lie in the pages of their files where that is possible, so that unused ones can be dropped.

    Args:
        source: of safetensors files, perhaps under other names or a model's; pickled ones stay as they are.
    """
    inner = source
    while not isinstance(inner, SafetensorsSource):
        if (inner := getattr(inner, "source", None)) is None:
            yield
            return
    inner.maps = {}
    try:
        yield
    finally:
        inner.maps = None


class Over(Mapping[str, Tensor]):
    """A source that reads another one, and does something beside."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __contains__(self, name: object) -> bool:
        return name in self.source


class Witnessed(Over):
    """A source that remembers the hash of every tensor that was read."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self.source, self.digests = source, dict[str, str]()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.source[name]
        if not tensor.is_meta:
            self.digests[name] = digest(tensor)
        return tensor

    def digest(self, names: Iterable[str]) -> str | None:
        """Return the hash of a tensor that was read under one of these names, if it was."""
        return next((self.digests[n] for n in names if n in self.digests), None)
