"""Modules whose tensors accelerate keeps elsewhere (`cpu_offload`, `disk_offload`, a device map with "cpu" or "disk")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rpq_convert.errors import SourceError

HOOK = "_hf_hook"  # where accelerate keeps a module's hook


def is_placed(module: nn.Module) -> bool:
    """Return whether accelerate places this module's own tensors, or is about to."""
    return "_old_forward" in module.__dict__


def is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate brings this module's own tensors for each call."""
    return HOOK in module.__dict__


def is_offloaded(model: nn.Module) -> bool:
    """Return whether a tensor of the model lies elsewhere between calls."""
    hooks = [m.__dict__[HOOK] for m in model.modules() if is_hooked(m)]
    return any(getattr(hook, "offload", False) for one in hooks for hook in getattr(one, "hooks", (one,)))


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Raise a SourceError for an offloaded model, whose weights are not there to `what`."""
    if is_offloaded(model):
        raise SourceError(
            f"{type(model).__name__} is offloaded by accelerate, so there are no weights to {what}: call "
            "accelerate.hooks.remove_hook_from_submodules(model) first, or use its folder"
        )


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Have these modules' own tensors where they compute, as long as the block lasts."""
    hooked = [m for m in modules if is_hooked(m)]
    for module in hooked:
        module.__dict__[HOOK].pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            module.__dict__[HOOK].post_forward(module, None)
