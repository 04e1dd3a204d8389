"""Losses of tuning: divergence of predictions, squared distance of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rpq_convert.errors import TuneError
from rpq_convert.running.call import first_tensor

Loss = Callable[[Any, Any], Tensor]  # (model's output, base's output) -> scalar


class _Divergence(torch.autograd.Function):
    """Divergence and its gradient, some predictions at a time, so that they stay in the cache.

    In plain operations on whole logits it was a third of a step of SmolLM2 (49,152 classes), and several times their memory.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, wanted: Tensor) -> Tensor:  # both [predictions, classes]
        ctx.gradient = torch.empty_like(output) if ctx.needs_input_grad[0] else None
        rows = max(1, (1 << 18) // output.shape[1])
        total = 0.0
        for low in range(0, len(output), rows):
            q, p = (x[low : low + rows].float().log_softmax(-1) for x in (output, wanted))
            chances = p.exp()
            total += float((chances * p.sub_(q)).sum(dtype=torch.float64))
            if ctx.gradient is not None:
                ctx.gradient[low : low + rows] = q.exp_().sub_(chances)
        return output.new_tensor(total / len(output), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.gradient * (gradient / len(ctx.gradient)).to(ctx.gradient.dtype), None


def divergence(output: Any, wanted: Any) -> Tensor:
    """Return the mean divergence (nats) of predicted distributions [..., classes] from the wanted ones."""
    found: Tensor = _Divergence.apply(*(_main(x).flatten(0, -2) for x in (output, wanted)))
    return found


def distance(output: Any, wanted: Any) -> Tensor:
    """Return the squared distance of outputs, relative to the wanted ones' square."""
    a, b = _main(output).float(), _main(wanted).float()
    return (a - b).square().sum() / b.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


LOSSES: dict[str, Loss] = {"kl": divergence, "mse": distance}


def _main(output: Any) -> Tensor:
    found = first_tensor(output)
    if found is None:
        raise TuneError(f"{type(output).__name__} holds no tensor to compare; pass loss=")
    return found
