"""Weights that old-style hooks of torch compute before every call: `weight_norm`, `spectral_norm` and `prune` of `torch.nn.utils`.

Such a weight is a plain attribute. The parameters that it is computed from, one of which has its shape, lie beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

KINDS = (WeightNorm, SpectralNorm, BasePruningMethod)


def hooked(module: nn.Module) -> dict[str, Any]:
    """Return the weights of a module that hooks compute: name -> hook."""
    hooks = module.__dict__.get("_forward_pre_hooks", {}).values()
    return {h.name if hasattr(h, "name") else h._tensor_name: h for h in hooks if isinstance(h, KINDS)}


def source_of(module: nn.Module, name: str) -> str:
    """Return the parameter of the weight's shape that the hooked weight `name` is computed from."""
    return f"{name}_v" if isinstance(hooked(module)[name], WeightNorm) else f"{name}_orig"


@torch.no_grad()
def compute_again(model: nn.Module) -> None:
    """Give every hooked weight the value that its next call would, where the parameters are real."""
    for module in model.modules():
        found = hooked(module)
        if not found or any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            continue
        for name, hook in found.items():
            if isinstance(hook, SpectralNorm):
                setattr(module, name, hook.compute_weight(module, do_power_iteration=False))
            else:
                hook(module, None)
