"""What tuning trains: codebooks, scales and vectors, in fp32 meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from rpq_convert.layers import surgery
from rpq_convert.layers.precision import kept_dtype


def trained_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained: codebooks and scales, and every vector (norms, biases) beside them."""
    inside = {id(p) for rpq in surgery.layers_of(model).values() for p in rpq.parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if p.is_floating_point() and (id(p) in inside or p.ndim <= 1) and not p.is_meta
    }


def stored_dtypes(model: nn.Module, values: Mapping[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """Return the dtype that a file keeps each of these values in; in memory it may be wider."""
    weights = surgery.layers_of(model).values()
    kept = {id(getattr(w, part)): tensor.dtype for w in weights for part, tensor in w.stored().items()}
    return {name: kept.get(id(p), kept_dtype(p)) for name, p in values.items()}


@contextmanager
def training(model: nn.Module, values: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for these values alone, and those in fp32, as long as the block lasts."""
    asked = {p: p.requires_grad for p in model.parameters()}
    stored = {p: p.dtype for p in values.values()}
    try:
        for p in asked:
            p.requires_grad_(False)
        for p in values.values():
            p.data = p.data if p.dtype == torch.float64 else p.data.float()
            p.requires_grad_(True)
        yield
    finally:
        for p, dtype in stored.items():
            p.data = p.data.to(dtype)
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
