"""Headers of safetensors files: names, types, shapes and places of tensors, checked. Free of torch.

Sizes, offsets, overlaps and the file's length are held against each other before anything is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from rpq_convert.errors import SourceError
from rpq_convert.showing import one_line
from rpq_convert.storage.remote_file import File, read_span, size_of

MAX_AXES, MAX_SIZE = 32, 1 << 48  # of a tensor, and of one axis
MAX_HEADER = 100_000_000  # bytes; the format's own limit
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "C64": 8, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor is stored: bytes `start` to `end` of `file`. `kind` is the format's name of its dtype."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: File
    start: int
    end: int


def read_entries(path: str | File) -> dict[str, Entry]:
    """Return the tensors of a safetensors file from its header alone.

    Raises:
        SourceError: not a file, not safetensors, or shorter or longer than its header says.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        size = size_of(path)
        length = int.from_bytes(read_span(path, 0, min(8, size)), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise SourceError(f"{path} is not a safetensors file: its header would be {length:,} bytes of {size:,}")
        text = read_span(path, 8, 8 + length)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise SourceError(f"{path} is a folder, not a safetensors file") from None
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{path} has a broken safetensors header: {one_line(str(e))}") from None
    if not isinstance(table, dict):
        raise SourceError(f"{path} has a broken safetensors header: no mapping from names to tensors")
    table.pop("__metadata__", None)
    entries = entries_of(table, path, 8 + length)
    at = max((i.end for i in entries.values()), default=8 + length)
    if at != size:
        what = f"truncated, {at - size:,} bytes are missing" if at > size else f"{size - at:,} bytes too long"
        raise SourceError(f"{path} is {what}; download or copy it again")
    return entries


def entries_of(table: Mapping[str, Mapping[str, object]], path: File, base: int) -> dict[str, Entry]:
    """Return the tensors that a header's table lists; `base` is where the file's data begins.

    Raises:
        SourceError: an entry that is broken, does not fill its bytes, or leaves a gap or an overlap.
    """
    try:
        entries = {k: _entry(k, v, path, base) for k, v in table.items()}
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{path} has a broken safetensors header: {e!r}") from None
    at = base
    for entry in sorted(entries.values(), key=lambda i: (i.start, i.end)):
        if entry.start != at:
            raise SourceError(
                f"{path}: tensor {entry.name} starts at byte {entry.start}, expected {at}: overlap or gap"
            )
        at = entry.end
    return entries


class Placed(Protocol):
    """What knows its file."""

    @property
    def file(self) -> File: ...


Item = TypeVar("Item", bound=Placed)


def joined(
    headers: Iterable[Mapping[str, Item]], index: Mapping[str, str] | None = None, where: str | Path = ""
) -> dict[str, Item]:
    """Return the tensors of several files as one table.

    Args:
        headers: of every file.
        index: tensor -> file, if there is one, and the place where it lies, for messages.

    Raises:
        SourceError: a tensor in two files, or an index that the headers do not bear out.
    """
    found: dict[str, Item] = {}
    for header in headers:
        for name, item in header.items():
            if name in found:
                raise SourceError(f"tensor {name} is in {found[name].file.name} and in {item.file.name}")
            found[name] = item
    if index is None:
        return found
    for name, file in index.items():
        if name not in found or found[name].file.name != file:
            raise SourceError(f"{where}: the index says that {name} is in {file}, its header does not have it")
    if extra := sorted(set(found) - set(index)):
        raise SourceError(f"{where}: {extra[0]} is in {found[extra[0]].file.name} but not in the index")
    return found


def _entry(name: str, entry: Mapping[str, object], path: File, base: int) -> Entry:
    kind = str(entry["dtype"])
    if kind not in ITEM_BYTES:
        raise SourceError(f"{path}: tensor {name} has dtype {kind!r}, which is not supported")
    shape = tuple(_whole(s) for s in entry["shape"])  # type: ignore[attr-defined]
    start, end = (_whole(i) for i in entry["data_offsets"])  # type: ignore[attr-defined]
    if len(shape) > MAX_AXES or max(shape, default=0) > MAX_SIZE:
        raise SourceError(
            f"{path}: tensor {name} has {len(shape)} axes of up to {max(shape):,}: more than any tensor has"
        )
    if min(shape, default=0) < 0 or end - start != ITEM_BYTES[kind] * math.prod(shape):
        raise SourceError(f"{path}: tensor {name} {list(shape)} {kind} cannot fill {end - start} bytes")
    return Entry(name, kind, shape, path, base + start, base + end)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a whole number")
    return value
