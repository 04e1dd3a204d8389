"""Evaluation mode without a cache of keys and values, which leaves a model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rpq_convert.running.state import kept


@contextmanager
def quiet(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Evaluation mode, and no cache of keys and values, as long as the block lasts; yields what puts the model's state back.

    State that runs within the block leave in the model (`running/state.py`) is put back at its end.
    """
    training = [m for m in model.modules() if m.training]
    configs: dict[int, Any] = {
        id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", False)
    }
    model.eval()
    for config in configs.values():
        config.use_cache = False
    try:
        with kept(model) as restore:
            yield restore
    finally:
        for module in training:
            module.training = True
        for config in configs.values():
            config.use_cache = True
