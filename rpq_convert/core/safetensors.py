"""The safetensors format, as far as a plan needs it: dtypes, headers and exact file sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

# In the order of the library's own list, by which it sorts tensors in a file, last first.
SAFETENSORS_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64",
    torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
RANKS = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_NAMES)}


def in_file_order(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """Return the keys in the order in which a file holds their tensors, which is that of the library."""
    return sorted(entries, key=lambda key: (-RANKS.get(entries[key][0], 0), key))


def header(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the safetensors header of these tensors, padded as the library writes it (metadata format=pt, and what is given).

    A dtype that the format lacks is named as torch names it: such a model can be planned and converted, but not written.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for key in in_file_order(entries):
        dtype, shape = entries[key]
        end = at + dtype.itemsize * math.prod(shape)
        table[key] = {
            "dtype": SAFETENSORS_NAMES.get(dtype, str(dtype)),
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def file_size(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Return the size in bytes of a safetensors file that holds these tensors."""
    return 8 + len(header(entries)) + sum(d.itemsize * math.prod(s) for d, s in entries.values())
