"""Precision: what a model computes in, and how one runs on the inputs of another that computes in something else.

A converted folder can be in 16 bits and its base in 32, or the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.layers.weight import RPQWeight

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what layers compute in
KEPT = "_rpq_kept"  # attribute of a widened tensor: the dtype that it has otherwise


def dtype_of(model: Any) -> torch.dtype:
    """Return what a model computes in; its first parameter may be a codebook, which says nothing of that."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, RPQWeight):
            return module.dtype
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


def widest(model: nn.Module, *others: Tensor) -> torch.dtype:
    """Return the dtype that holds every number of a model and of these tensors."""
    own = [t for module in model.modules() for _, t in _tensors(module)]
    return functools.reduce(torch.promote_types, {t.dtype for t in (*own, *others)})


def cast(item: Any, dtype: torch.dtype) -> Any:
    """Return an input with its tensors of floating point in this dtype."""
    if isinstance(item, Tensor):
        return item.to(dtype) if item.dtype in PLAIN else item
    if isinstance(item, Mapping):
        return {name: cast(value, dtype) for name, value in item.items()}
    return type(item)(cast(part, dtype) for part in item) if type(item) in (tuple, list) else item


def fitting(item: Any, base: nn.Module, model: nn.Module) -> Any:
    """Return an input of the base as one of the model: in its dtype, where that is not the base's."""
    own = dtype_of(model)
    return item if dtype_of(base) == own else cast(item, own)


def kept_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a tensor has, or has again after `widened`."""
    return getattr(tensor, KEPT, tensor.dtype)


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a model compute in a dtype at least, as long as the block lasts; what was narrower is so again afterwards.

    Codebooks and scales stay as they are: what they expand to is widened.
    """
    changed: list[Tensor] = []
    weights: list[tuple[RPQWeight, Tensor]] = []
    for module in model.modules():
        for name, tensor in _tensors(module):
            wide = torch.promote_types(tensor.dtype, dtype)
            if wide == tensor.dtype:
                continue
            if isinstance(module, RPQWeight):
                weights.append((module, tensor))
                setattr(module, name, tensor.to(wide))
            else:
                setattr(tensor, KEPT, tensor.dtype)
                changed.append(tensor)
                tensor.data = tensor.data.to(wide)
    try:
        yield
    finally:
        for weight, probe in weights:
            weight._probe = probe
        for tensor in changed:
            tensor.data = tensor.data.to(kept_dtype(tensor))
            delattr(tensor, KEPT)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors that say what a module computes in, with the names of the attributes that hold them."""
    if isinstance(module, RPQWeight):
        own: dict[str, Tensor | None] = {"_probe": module._probe}
    else:
        own = {**module._parameters, **module._buffers}
    return [(name, t) for name, t in own.items() if t is not None and t.dtype in PLAIN]
