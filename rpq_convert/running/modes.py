"""Evaluation mode without a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no cache of keys and values, as long as the block lasts."""
    training = [m for m in model.modules() if m.training]
    configs: dict[int, Any] = {
        id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", False)
    }
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for config in configs.values():
            config.use_cache = True
