"""torch's TransformerEncoder: padded inputs stay padded where some of its layers are converted.

In evaluation it turns them into nested tensors if its first layer could take these. Only dense layers can.
"""

from __future__ import annotations

from torch import nn

from rpq_convert.planning.layer_types import is_rpq

STASH = "_rpq_nested"  # marks an encoder that used nested tensors when it was dense


def padded_where_converted(model: nn.Module) -> None:
    """Turn nested tensors off in encoders with a converted layer, and on again in those that are dense again."""
    for encoder in _encoders(model):
        if any(map(is_rpq, encoder.modules())):
            padded(encoder)
        elif encoder.__dict__.pop(STASH, False):
            encoder.use_nested_tensor = True


def padded(model: nn.Module) -> None:
    """Turn nested tensors off in all encoders of a model."""
    for encoder in _encoders(model):
        if encoder.use_nested_tensor:
            encoder.__dict__[STASH], encoder.use_nested_tensor = True, False


def _encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
