"""Pictures of a plain module: of which size it takes them, found by trying on meta, where an operation costs nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rpq_convert.running.modes import quiet

Shape = tuple[int, int, int]  # channels, height and width of a picture
USUAL = 224  # pixels of a side; convnets take most sizes
LARGEST, STEP = 512, 4  # of the sides that are tried
ODD = (331, 299)  # sides that are no multiple of STEP


def picture_shape(model: nn.Module) -> Shape | None:
    """Return what pictures a module of one tensor takes; None where nothing tells.

    A network that begins with convolutions says how many channels. The side is the usual one, or else the largest that runs: a
    table of positions may hold more than a smaller picture needs.
    """
    if not _takes_one(model):
        return None
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))), None)
    convolves = isinstance(first, nn.Conv2d)
    channels = (first.in_channels,) if isinstance(first, nn.Conv2d) else (3, 1)
    sides = (*((USUAL,) if convolves else ()), *range(LARGEST, 0, -STEP), *ODD)
    empty = {n: t.to("meta") for n, t in (*model.named_parameters(), *model.named_buffers())}
    shapes = ((c, side, side) for side in sides for c in channels)
    with quiet(model):
        return next((s for s in shapes if _runs(model, empty, torch.empty(1, *s, device="meta"))), None)


def _takes_one(model: nn.Module) -> bool:
    """Whether a module can be called on one tensor."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:  # compiled functions have none
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1 and not any(p.kind == p.KEYWORD_ONLY and p.default is p.empty for p in parameters)


class _NoPicture(Exception):
    """Raised where a layer of vectors is given a picture as such: it would take its last axis for channels."""


def _runs(model: nn.Module, tensors: dict[str, Tensor], picture: Tensor) -> bool:
    def check(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == picture.shape:
            raise _NoPicture

    with ExitStack() as stack, torch.no_grad():
        for layer in _vector_layers(model):
            stack.callback(layer.register_forward_pre_hook(check).remove)
        try:
            functional_call(model, tensors, (picture,))
        except Exception:  # of a size that it does not take: modules raise what they like
            return False
    return True


def _vector_layers(model: nn.Module) -> Iterator[nn.Module]:
    kinds = (nn.Linear, nn.LayerNorm, nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return (m for m in model.modules() if isinstance(m, kinds))
