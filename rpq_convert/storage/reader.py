"""Sources: a checkpoint as a lazy mapping from names to tensors, one tensor in memory at a time.

Tensors are read by position into new memory. They are not mapped, since a mapping of a large file counts against an
address-space limit and keeps its pages. The header is checked first: sizes, offsets, overlaps, the file's length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rpq_convert.errors import SourceError

MAX_AXES, MAX_SIZE = 32, 1 << 48  # of a tensor, and of one axis
MAX_HEADER = 100_000_000  # bytes; the format's own limit
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
    file: Path
    start: int
    end: int


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file from its header alone.

    Raises:
        SourceError: not a file, not safetensors, or shorter or longer than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise SourceError(f"{path} is not a safetensors file: its header would be {length:,} bytes of {size:,}")
            text = f.read(length)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise SourceError(f"{path} is a folder, not a safetensors file") from None
    try:
        table = json.loads(text)
        table.pop("__metadata__", None)
        infos = tensor_infos(table, path, 8 + length)
    except SourceError:
        raise
    except (ValueError, AttributeError, RecursionError) as e:
        raise SourceError(f"{path} has a broken safetensors header: {e!r}") from None
    at = max((i.end for i in infos.values()), default=8 + length)
    if at != size:
        what = f"truncated, {at - size:,} bytes are missing" if at > size else f"{size - at:,} bytes too long"
        raise SourceError(f"{path} is {what}; download or copy it again")
    return infos


def tensor_infos(table: Mapping[str, Mapping[str, object]], path: Path, base: int) -> dict[str, TensorInfo]:
    """Return the tensors that a header's table lists; `base` is where the file's data begins.

    Raises:
        SourceError: an entry that is broken, does not fill its bytes, or leaves a gap or an overlap.
    """
    try:
        infos = {k: _info(k, v, path, base) for k, v in table.items()}
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{path} has a broken safetensors header: {e!r}") from None
    at = base
    for info in sorted(infos.values(), key=lambda i: (i.start, i.end)):
        if info.start != at:
            raise SourceError(f"{path}: tensor {info.name} starts at byte {info.start}, expected {at}: overlap or gap")
        at = info.end
    return infos


def _info(name: str, entry: Mapping[str, object], path: Path, base: int) -> TensorInfo:
    kind = entry["dtype"]
    if kind not in DTYPES:
        raise SourceError(f"{path}: tensor {name} has dtype {kind!r}, which is not supported")
    dtype = DTYPES[str(kind)]
    shape = tuple(_whole(s) for s in entry["shape"])  # type: ignore[attr-defined]
    start, end = (_whole(i) for i in entry["data_offsets"])  # type: ignore[attr-defined]
    if len(shape) > MAX_AXES or max(shape, default=0) > MAX_SIZE:
        raise SourceError(
            f"{path}: tensor {name} has {len(shape)} axes of up to {max(shape):,}: more than any tensor has"
        )
    if min(shape, default=0) < 0 or end - start != dtype.itemsize * math.prod(shape):
        raise SourceError(f"{path}: tensor {name} {list(shape)} {kind} cannot fill {end - start} bytes")
    return TensorInfo(name, dtype, shape, path, base + start, base + end)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value


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
        self.infos: dict[str, TensorInfo] = {}
        for header in headers:
            for name, info in header.items():
                if name in self.infos:
                    raise SourceError(f"tensor {name} is in {self.infos[name].file.name} and in {info.file.name}")
                self.infos[name] = info
        if index is None:
            return
        for name, file in index.items():
            found = self.infos.get(name)
            if found is None or found.file.name != file:
                raise SourceError(f"{where}: the index says that {name} is in {file}, its header does not have it")
        extra = sorted(set(self.infos) - set(index))
        if extra:
            raise SourceError(f"{where}: {extra[0]} is in {self.infos[extra[0]].file.name} but not in the index")

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
        data = torch.empty(info.end - info.start, dtype=torch.uint8)
        with open(info.file, "rb") as f:
            f.seek(info.start)
            got = f.readinto(data.numpy().data) if len(data) else 0
        if got != len(data):
            raise SourceError(f"{info.file}: {name} ended after {got:,} of {len(data):,} bytes; was the file changed?")
        return data.view(info.dtype).reshape(info.shape) if len(data) else torch.empty(info.shape, dtype=info.dtype)
