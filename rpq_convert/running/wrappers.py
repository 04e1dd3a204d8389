"""Wrappers: modules of torch that stand for another one, under whose names its parameters should not be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

AROUND = {  # class -> the name of what it wraps
    "OptimizedModule": "_orig_mod",  # torch.compile(model)
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
WITHIN = {"OptimizedModule": "_orig_mod"}  # of a submodule: all others are part of how a model is built


@contextmanager
def unwrapped(model: Any) -> Iterator[Any]:
    """Give the model inside torch's wrappers, its compiled submodules as they were before, as long as the block lasts.

    Parameters then have the names that they have in the model as it was built.

    Args:
        model: a module; anything else is given as it is.
    """
    model = _inside(model, AROUND)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    found = [
        (m, key, child) for m in modules for key, child in m._modules.items() if _inside(child, WITHIN) is not child
    ]
    for module, key, child in found:
        module._modules[key] = _inside(child, WITHIN)
    try:
        yield model
    finally:
        for module, key, child in found:
            if module._modules.get(key) is _inside(child, WITHIN):
                module._modules[key] = child


def _inside(model: Any, wrappers: dict[str, str]) -> Any:
    while (name := wrappers.get(type(model).__name__)) and isinstance(inner := model._modules.get(name), nn.Module):
        model = inner
    return model
