"""A weight file written tensor by tensor, so that a file of any size takes the memory of its largest tensor.

The safetensors library writes a file from tensors that are all in memory. Here the header is written first, since a plan knows it,
and every tensor after it. The bytes are those that the library writes (a test holds them together).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rpq_convert.core.safetensors import header, in_file_order
from rpq_convert.errors import FolderError


def write_tensors_to(
    path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensor: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Args:
        path: where; what is there is written over.
        entries: key -> (dtype, shape). tensor: returns the contiguous tensor of a key; called once for each, in the file's order.

    Raises:
        FolderError: the operating system refuses.
    """
    head = header(entries)
    parts: Iterator[bytes | memoryview] = (raw(tensor(key)) for key in in_file_order(entries))
    with open(path, "wb", buffering=0) as file:
        for part in itertools.chain([len(head).to_bytes(8, "little"), head], parts):
            left = memoryview(part)
            with writing(path):  # not around the reading of a tensor, whose error names its own file
                while left:
                    left = left[file.write(left) :]


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
