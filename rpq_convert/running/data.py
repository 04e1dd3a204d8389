"""Calibration data as callers give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

Calibration = Iterable[Any] | Callable[[nn.Module], Iterable[Any]]


def inputs_of(calibration: Calibration | None, model: nn.Module) -> list[Any] | None:
    """Return calibration data, which the model may have to make itself, as a list."""
    if calibration is None:
        return None
    return list(calibration(model) if callable(calibration) else calibration)
