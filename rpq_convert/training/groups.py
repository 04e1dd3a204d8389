"""What an optimizer is given for a converted model, and how what it trained is rounded to what files store."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rpq_convert.errors import TuneError
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight

# A multiple of a dense weight's learning rate: what codebooks of random codes want (docs/training.md)
CODEBOOK_RATE = 3.0


def parameter_groups(
    model: nn.Module, rate: float, *, weight_decay: float = 0.0, codebook_rate: float = CODEBOOK_RATE
) -> list[dict[str, Any]]:
    """Return groups of parameters for a torch optimizer: codebooks, what is dense, and what does not decay.

    A codeword stands for many weights, whose gradients it sums, and takes larger steps than a weight. Where scales multiply codewords,
    steps are as much larger as scales are small, so that expanded weights take the same ones. The decay of codebooks is smaller by as
    much, so that AdamW makes expanded weights decay as it does dense ones: a weight is linear in its codebook. Scales, norms and
    biases do not decay. A parameter that is held under several names is in one group, and one that is frozen in none.

    Args:
        model: any model; without RPQ layers the groups are those of a dense one.
        rate: learning rate of dense weights, as for the dense model.
        weight_decay: of dense weights, a step's share being `rate * weight_decay` (torch.optim.AdamW).
        codebook_rate: learning rate of what codebooks expand to, as a multiple of `rate`.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`: `codebooks` for each weight that has scales and one for all others,
        `dense`, `vectors`; those that are empty are left out. Their order is that of names, then of the model, so that an optimizer's
        state can be loaded into groups that were made anew.

    Raises:
        TuneError: a rate, a decay or a multiple that is no positive number (a decay may be 0).

    Example:
        >>> optimizer = torch.optim.AdamW(rpq.parameter_groups(model, 1e-3, weight_decay=0.05))
    """
    if not (rate > 0 and codebook_rate > 0 and weight_decay >= 0):
        raise TuneError(
            f"rate and codebook_rate must be above 0 and weight_decay at least 0, not {rate}, {codebook_rate}, {weight_decay}"
        )
    books = {id(rpq.codebooks): rpq for rpq in surgery.layers_of(model).values()}
    others = {id(p) for rpq in books.values() for p in rpq.parameters()}
    groups: dict[Any, dict[str, Any]] = {}  # by what does not change in training, so that a later run has the same ones

    def add(key: Any, name: str, p: nn.Parameter, multiple: float, decay: float) -> None:
        group = {"name": name, "params": [], "lr": rate * multiple, "weight_decay": decay / multiple}
        groups.setdefault(key, group)["params"].append(p)

    for p in model.parameters():
        if not p.requires_grad:
            continue
        if rpq := books.get(id(p)):
            scaled = rpq.scales is not None or rpq.input_scales is not None
            add(id(p) if scaled else "codebooks", "codebooks", p, codebook_rate / _size(rpq), weight_decay)
        elif p.ndim > 1 and id(p) not in others:
            add("dense", "dense", p, 1.0, weight_decay)
        else:
            add("vectors", "vectors", p, 1.0, 0.0)
    return sorted(groups.values(), key=lambda group: group["name"])


def _size(rpq: RPQWeight) -> float:
    """Return the root mean square of what codewords are multiplied by; 1 where nothing does."""
    size = 1.0
    for scales in (rpq.scales, rpq.input_scales):
        if scales is not None and not scales.is_meta:
            size *= float(scales.detach().float().square().mean().sqrt()) or 1.0
    return size


@torch.no_grad()
def round_to_stored(model: nn.Module) -> nn.Module:
    """Round codebooks, scales and outliers to the dtypes of their specs, in place; they stay float32 in memory.

    What trains is float32. A file keeps it so unless nothing is lost, so a trained float16 codebook takes twice its bytes. Round at
    the end of training, then measure and save: files are as small as planned, and hold what was measured.

    Returns:
        The model.

    Example:
        >>> rpq.save(rpq.round_to_stored(model), "trained")
    """
    for rpq in surgery.layers_of(model).values():
        for name, (dtype, _) in rpq.spec.tensors(rpq.view, rpq.shape).items():
            tensor = rpq.stored_tensor(name)
            if tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.copy_(tensor.to(dtype))
    return model
