"""Peers: one small file per tool.

Each file has

- `TITLE`: the tool's name, and `ENVIRONMENT`: the requirements file in ../requirements that it runs in (None: this project's);
- `SETTINGS`: what to run it with, a list per task; a task that is absent is one that the tool cannot do;
- `compress(model, settings, data)`: replace the model's weights, in place, by what the tool would store, decoded, and return
  the bytes of all that it would store; and, where the model takes more in memory, the bytes there. `data` is (calibration batches,
  the task's folder); data-free tools ignore it.

Bytes are those of the tensors in a checkpoint: codes packed to their bits, scales and zero points, and every untouched tensor;
floating-point numbers at 16 bits or fewer, as every tool's users keep them, whatever they were computed in.

Most tools leave the embedding alone. A tied one is a fifth of this language model's weights, so each tool also gets its best
shot: `embedding` is the number of bits that the tool's own quantizer, or plain rounding where it has none for a matrix that is
not a Linear's, spends on it; 16 leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

Quantizer = Callable[[Tensor], tuple[Tensor, int]]  # a weight [out, in] -> the same after decoding, and its bytes


def stored(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of what a tool keeps: floats at 16 bits or fewer, everything else as it is."""
    return sum(t.numel() * (min(2, t.element_size()) if t.is_floating_point() else t.element_size()) for t in tensors)


def untouched(model: nn.Module, except_for: Collection[int] = ()) -> int:
    """Return the bytes of all that a checkpoint of the model holds, shared tensors once, but for tensors of these ids."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return stored(t for key, t in tensors.items() if key not in except_for)


@torch.no_grad()
def by_matrix(
    model: nn.Module, linear: Quantizer, embedding: Quantizer | None = None, convolution: Quantizer | None = None
) -> int:
    """Quantize every Linear's weight, and those of embeddings and convolutions if asked; return the bytes of the whole model.

    A head that is tied to an embedding counts as the embedding, once. A convolution's weight is cut as [out, in * k * k].
    """
    quantizers = {nn.Linear: linear, nn.Conv2d: convolution, nn.Embedding: embedding}  # the last word on a tied weight
    chosen = {
        id(m.weight): (m.weight, quantize)
        for kind, quantize in quantizers.items()
        for m in model.modules()
        if isinstance(m, kind)
    }
    total = 0
    for weight, quantize in chosen.values():
        if quantize is None:
            total += stored([weight])
            continue
        decoded, size = quantize(weight.detach().float().flatten(1))
        weight.copy_(decoded.view_as(weight))
        total += size
    return total + untouched(model, chosen)


def rounding(bits: int, group: int) -> Quantizer:
    """Return plain rounding between each group's least and greatest value; for embeddings beside tools that leave them alone."""

    def quantize(weight: Tensor) -> tuple[Tensor, int]:
        rows = weight.reshape(-1, group)
        low = rows.amin(1, keepdim=True)
        scale = ((rows.amax(1, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-8).half().float()
        zero = (-low / scale).round().clamp_(0, 2**bits - 1)
        codes = (rows / scale + zero).round().clamp_(0, 2**bits - 1)
        decoded = (codes - zero) * scale
        return decoded.view_as(weight), packed(weight.numel(), bits) + 2 * len(rows) + packed(len(rows), bits)

    return quantize


def packed(count: int, bits: float) -> int:
    """Return the bytes of `count` codes without gaps."""
    return -int(-count * bits // 8)
