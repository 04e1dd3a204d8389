"""Wrappers: modules of torch that stand for another model, under whose names its parameters should not be saved."""

from __future__ import annotations

from torch import nn

INSIDE = {  # class -> the name of what it wraps
    "OptimizedModule": "_orig_mod",  # torch.compile(model)
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch's wrappers: what `torch.compile`, data parallelism or averaging was given."""
    while (name := INSIDE.get(type(model).__name__)) and isinstance(inner := model._modules.get(name), nn.Module):
        model = inner
    return model
