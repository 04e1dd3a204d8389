"""Sources: a checkpoint as a lazy mapping from names to tensors, one tensor in memory at a time.

Tensors are read by position into fresh memory, not mapped: a mapping of a large file counts against an address-space
limit and keeps its pages. The header is checked before anything is trusted: sizes, offsets, overlaps, the file's length.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rpq_convert.errors import SourceError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json

INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
MAX_AXES, MAX_SIZE = 32, 1 << 48  # of a tensor, and of one axis
HUB = ("models--", "datasets--", "spaces--")  # folders of the hub's cache
BESIDE = ("additional_chat_templates", "chat_templates")  # folders that transformers reads
MAX_HEADER = 100_000_000  # bytes; the format's own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` to `end` of `file`."""

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
                raise SourceError(f"{path} is no safetensors file: its header would be {length:,} bytes of {size:,}")
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


class PickleSource(Mapping[str, Tensor]):
    """The tensors of old `pytorch_model*.bin` files, memory-mapped and unpickled by torch's weights-only reader."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for path in paths:
            try:
                self.tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as e:  # torch raises several kinds, from RuntimeError to UnpicklingError
                raise SourceError(f"{path} cannot be read as weights only: {e}") from None
        self.infos = {
            k: TensorInfo(k, t.dtype, tuple(t.shape), Path(str(path)), 0, t.numel() * t.element_size())
            for k, t in self.tensors.items()
        }

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].clone()


def weight_files(names: Collection[str], where: str | Path, *, allow_pickle: bool = False) -> list[str]:
    """Choose from a folder's file names what its weights are read from: an index alone, or the weight files.

    The same weights often lie there several times; safetensors go before pickles, and nothing is chosen twice.

    Raises:
        SourceError: no weights, or only pickled ones while `allow_pickle` is False.
    """
    for whole in (INDEX, "model.safetensors"):
        if whole in names:
            return [whole]
    top = sorted(n for n in names if "/" not in n)
    loose = [n for n in top if n.endswith(".safetensors")]
    if loose:
        return loose
    pickled = [n for n in top if n.startswith("pytorch_model") and n.endswith(".bin")]
    if pickled and not allow_pickle:
        raise SourceError(
            f"{where} has only pickled weights ({pickled[0]}); pass --allow-pickle to read them as tensors only, "
            "or take a repository with safetensors"
        )
    if pickled:
        return [PICKLE_INDEX] if PICKLE_INDEX in names else pickled
    others = [n for n in names if n.endswith(OTHERS)]
    which = f"; {others[0]} is of a kind that is not read: save it as safetensors" if others else ""
    raise SourceError(f"{where} has no weights: no model.safetensors, index or pytorch_model.bin{which}")


def open_folder(folder: str | Path, *, allow_pickle: bool = False) -> SafetensorsSource | PickleSource:
    """Open the weights of a folder (one file, or shards and an index), or a single safetensors file.

    Raises:
        SourceError: no weights, a missing shard, an index that disagrees with the headers or leaves the folder, or
            only pickled weights while `allow_pickle` is False.
    """
    folder = Path(folder)
    if folder.is_file():
        if folder.suffix == ".safetensors":
            return SafetensorsSource([read_header(folder)])
        if not allow_pickle:
            raise SourceError(f"{folder} is not a safetensors file; a pickled one needs --allow-pickle")
        return PickleSource([folder])
    if not folder.is_dir():
        raise SourceError(f"{folder} does not exist")
    refuse_links(folder)
    chosen = weight_files({p.name for p in folder.iterdir() if p.is_file()}, folder, allow_pickle=allow_pickle)
    index = read_index(folder / chosen[0]) if chosen[0].endswith(".json") else None
    paths = [_inside(folder, n) for n in (chosen if index is None else sorted(set(index.values())))]
    if pickled := [p for p in paths if p.suffix != ".safetensors"]:
        if not allow_pickle:
            raise SourceError(f"{pickled[0]} is not a safetensors file; a pickled one needs --allow-pickle")
        if len(pickled) < len(paths):
            raise SourceError(f"{folder}: its index names pickled files and others, such as {pickled[0].name}")
        return PickleSource(paths)
    return SafetensorsSource((read_header(p) for p in paths), index, folder)


def read_index(path: Path) -> dict[str, str]:
    """Return the map from tensors to files of an index.

    Raises:
        SourceError: it is none.
    """
    return read_json(path, kinds.INDEX, SourceError)["weight_map"]  # type: ignore[no-any-return]


def _inside(folder: Path, name: str) -> Path:
    """Return a shard's path, refusing one that leaves the folder."""
    path = folder / name
    if os.path.isabs(name) or Path(name).name != name:
        raise SourceError(f"{folder}: the index names {name!r}, which leaves the folder")
    if not path.is_file():
        raise SourceError(f"{path} is missing, the index names it")
    return path


def refuse_links(folder: str | Path) -> None:
    """Refuse a checkpoint's folder with a link that leaves it: what lies there would be read, copied or uploaded.

    Links of the hub's cache are as they should be: from `<repository>/snapshots/<commit>` to that repository's `blobs`.

    Raises:
        SourceError: which link, and where it leads.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    root = folder.resolve()
    for place in (folder, *(folder / name for name in BESIDE)):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.is_symlink() and not _stays(path, root):
                raise SourceError(
                    f"{path} is a link that leaves the folder, to {os.readlink(path)}; put the file itself in its place"
                )


def _stays(link: Path, root: Path) -> bool:
    try:
        real = link.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    repository = root.parent.parent
    cached = root.parent.name == "snapshots" and repository.name.startswith(HUB)
    return real.is_relative_to(root) or (cached and real.parent == repository / "blobs")
