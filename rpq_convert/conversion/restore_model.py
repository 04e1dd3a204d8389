"""Turn a converted model in memory back into a dense one."""

from __future__ import annotations

import torch
from torch import nn

from rpq_convert.core.keywords import keywords
from rpq_convert.layers import surgery
from rpq_convert.layers.rollback import unchanged_on_failure
from rpq_convert.layers.surgery import AFTER
from rpq_convert.running.offload import refuse_offloaded


@keywords()
def restore(model: nn.Module) -> nn.Module:
    """Turn a converted model back into a dense one, in place: every class and parameter as before conversion."""
    refuse_offloaded(model, "restore")
    with unchanged_on_failure(model), torch.inference_mode(False):
        for rpq, places in surgery.places_of(model).items():
            with torch.no_grad():
                places.remove(nn.Parameter(rpq(), requires_grad=rpq.trainable))
        for act in AFTER:
            act(model)
    return model


def model_size(model: nn.Module) -> float:
    """Return the size of parameters and buffers in MiB (2**20 bytes), shared tensors once, as RPQ-pytorch counts it."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
