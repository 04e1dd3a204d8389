"""A digest of calibration data, for plans and resumption."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def describe(data: Sequence[Any]) -> dict[str, Any]:
    """Return what a plan keeps of its calibration data: how many items, and a digest of every tensor in them."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            tensor = value.detach().to("cpu").contiguous()
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (tuple, list)):
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(data)
    return {"items": len(data), "sha256": digest.hexdigest()}
