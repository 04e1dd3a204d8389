"""Any model on any input: how an input is passed, and which tensor of what comes back, or goes in, is the main one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def call(model: nn.Module, item: Any) -> Any:
    """Run a model on one input: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(item, Mapping):
        return model(**item)
    return model(*item) if isinstance(item, (tuple, list)) else model(item)


def first_tensor(value: Any) -> Tensor | None:
    """Return the tensor itself, or the first one of a tuple, a mapping or a transformers output; None where none is."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def counted(item: Any, value: Tensor | None) -> Tensor | None:
    """Return which vectors of a tensor [batch, tokens, …] an input's attention mask counts, bool [batch * tokens]; None for all."""
    mask = item.get("attention_mask") if isinstance(item, Mapping) else None
    if (
        not isinstance(mask, Tensor)
        or mask.ndim != 2
        or value is None
        or value.ndim < 3
        or value.shape[:2] != mask.shape
    ):
        return None
    return None if bool(mask.all()) else mask.flatten().bool()


def without_padding(item: Any, output: Tensor) -> Tensor:
    """Return an output [batch, tokens, …] without what its input's attention mask leaves out, as [vectors, …]."""
    rows = counted(item, output)
    return output if rows is None else output.flatten(0, 1)[rows]
