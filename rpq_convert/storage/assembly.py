"""A weight file written tensor by tensor, so that a file of any size takes the memory of its largest tensor.

The safetensors library writes a file from tensors that are all in memory, under temporary names of its own that a killed run leaves. Here
the header is written first, since a plan knows it, and every tensor after it. The bytes are those that the library writes (a test holds
them together). What is written is hashed on its way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rpq_convert.core.safetensors import header, in_file_order
from rpq_convert.errors import FolderError
from rpq_convert.storage.swap import sync

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Digests:
    """SHA-256 of a weight file and of the bytes of each of its tensors."""

    sha256: str
    tensors: Mapping[str, str]


def write_tensors_to(
    path: Path, entries: Entries, tensor: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> Digests:
    """Write a safetensors file with one tensor in memory at a time, completely or not at all.

    Args:
        entries: key -> (dtype, shape). tensor: returns the contiguous tensor of a key; called once for each, in the file's order.
        metadata: texts for the header.

    Raises:
        FolderError: the operating system refuses.
    """
    head = header(entries, metadata)
    whole, own = hashlib.sha256(), {}
    partial = partial_of(path)
    with open_new(partial, path) as write:
        for part in (len(head).to_bytes(8, "little"), head):
            write(part)
            whole.update(part)
        for key in in_file_order(entries):
            data = raw(tensor(key))
            write(data)
            whole.update(data)
            own[key] = hashlib.sha256(data).hexdigest()
    put(partial, path)
    return Digests(whole.hexdigest(), own)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that are in memory as a safetensors file, completely or not at all."""
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors_to(path, entries, lambda name: tensors[name].detach().cpu().contiguous(), metadata)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file; a killed run leaves the old one or the new one."""
    partial = partial_of(path)
    with open_new(partial, path) as write:
        write(content.encode() if isinstance(content, str) else content)
    put(partial, path)


def copy_file(file: Path, path: Path) -> None:
    """Copy a file, completely or not at all."""
    partial = partial_of(path)
    with open(file, "rb") as source, open_new(partial, path) as write:
        while block := source.read(1 << 20):
            write(block)
    put(partial, path)


def partial_of(path: Path) -> Path:
    """Return the name under which a file is written before it is complete."""
    return path.with_name(path.name + ".partial")


def put(partial: Path, path: Path) -> None:
    """Give a complete file its name, once it is on the disk."""
    with writing(path):
        sync(partial)
        os.replace(partial, path)


@contextmanager
def open_new(partial: Path, path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Open a file to be written from its beginning; errors name the file that it will be."""
    with writing(path):
        file = open(partial, "wb", buffering=0)  # noqa: SIM115 - what is yielded to has errors of its own

    def write(data: bytes | memoryview) -> None:
        left = memoryview(data)
        with writing(path):
            while left:
                left = left[file.write(left) :]

    try:
        try:
            yield write
        finally:
            with writing(path):
                file.close()
    except BaseException:
        partial.unlink(missing_ok=True)  # it may have filled the disk
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in an error of the operating system: a failed write does not know it."""
    try:
        yield
    except OSError as e:
        if isinstance(e, FolderError):
            raise
        raise FolderError(e.errno, f"cannot write {path}: {e.strerror}") from e


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw(tensor.detach().cpu().contiguous())).hexdigest()
