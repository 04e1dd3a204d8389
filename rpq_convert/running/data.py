"""Calibration data as callers give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Calibration = Iterable[Any] | Callable[[nn.Module], Iterable[Any]]


def inputs_of(calibration: Calibration | None, model: nn.Module) -> list[Any] | None:
    """Return calibration data, which the model may have to make itself, as a list."""
    if calibration is None:
        return None
    return [_ordinary(item) for item in (calibration(model) if callable(calibration) else calibration)]


def _ordinary(item: Any) -> Any:
    """Return an item whose tensors count what is written to them; those that inference mode made do not."""
    if isinstance(item, Tensor):
        return item.clone() if item.is_inference() else item
    if isinstance(item, Mapping):
        return {name: _ordinary(value) for name, value in item.items()}
    return type(item)(map(_ordinary, item)) if type(item) in (tuple, list) else item
