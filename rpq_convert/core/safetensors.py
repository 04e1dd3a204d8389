"""The safetensors format, as far as a plan needs it: dtypes, headers and exact file sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from rpq_convert.errors import PlanError

# In the order of the library's own list, by which it sorts tensors in a file, last first.
SAFETENSORS_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64",
    torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
RANKS = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_NAMES)}


def header(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return the safetensors header of these tensors, padded as the library writes it (metadata format=pt).

    A dtype that the format lacks is named as torch names it: such a model can be planned and converted, but not written.
    """
    order = sorted(entries.items(), key=lambda e: (-RANKS.get(e[1][0], 0), e[0]))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, (dtype, shape) in order:
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


def parse_size(text: str | int) -> int:
    """Return bytes from `5GB`, `300MiB`, `1e6` or a number."""
    if isinstance(text, int):
        value = text
    else:
        units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
        upper = text.strip().upper()
        unit = next((u for u in sorted(units, key=len, reverse=True) if upper.endswith(u)), "")
        try:
            value = int(float(upper.removesuffix(unit)) * units.get(unit, 1))
        except (ValueError, OverflowError):
            raise PlanError(f"size {text!r} is not a number with an optional unit such as 5GB or 300MiB") from None
    if value < 1:
        raise PlanError(f"size {text!r} must be positive")
    return value
