"""nn.Linear's forward for a few tokens, by the shortest way to its kernel.

`F.linear` of a computed weight asks torch's function protocol, which asks `operations`, which asks the weight for its kernel: some
90 microseconds on a slow core, where a dense layer of 576 x 576 takes 40 in all. A language model that writes a token pays that for
each of its layers. Here a weight keeps its `Product`. Whatever is not a few ordinary tokens of an ordinary layer goes the long way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from rpq_convert.layers.weight import RPQWeight, transformed
from rpq_convert.running.offload import is_hooked

# torch's own functions. Some libraries put others in their place, before or after a conversion: those are called then.
LINEAR = torch._C._nn.linear
FORWARD = nn.Linear.forward if nn.Linear.forward.__globals__ is vars(nn.modules.linear) else None


def forward(self: Any, input: Tensor) -> Tensor:
    """What `nn.Linear.forward` returns, to the bit."""
    if not torch.compiler.is_compiling():
        own = self._rpq_original.forward
        if own is not FORWARD:
            return own(self, input)  # type: ignore[no-any-return]
        if type(input) is Tensor and F.linear is LINEAR:
            weight, bias = self._modules["weight_rpq"], self.bias
            product = _product(weight, input, bias)
            if product is not None:
                return product(input, bias)  # type: ignore[no-any-return]
    return F.linear(input, self.weight, self.bias)


def _product(weight: RPQWeight, x: Tensor, bias: Any) -> Any:
    """Return the weight's Product where it serves x and bias as they are; else None."""
    caches = weight.caches
    if caches.product is False or x.dtype is not torch.float32 or not x.ndim or x.is_meta:
        return None
    if x.layout is not torch.strided or not x.is_contiguous():
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.trainable or (bias is not None and bias.requires_grad)):
        return None
    if _watched() or caches.expanded is not None or is_hooked(weight):
        return None
    if bias is not None and not (type(bias) is nn.Parameter and bias.dtype is torch.float32 and bias.is_contiguous()):
        return None
    find = weight.stored_tensor
    codes, given = find("codes"), (find("codebooks"), find("scales"), find("input_scales"))
    product = caches.product
    if product is None or not product.fits(codes, *given):
        product = caches.product = weight.product()
    if not product or x.shape[-1] != product.inputs or not x.is_cpu or not product.serves(x.numel() // product.inputs):
        return None
    return product if bias is None or (bias.numel() == product.outputs and bias.is_cpu) else None


def _watched() -> bool:
    """Whether anything records, changes or counts torch's operations just now."""
    return (
        torch._C._len_torch_dispatch_stack() != 0
        or torch._C._len_torch_function_stack() != 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or transformed()
        or forward_ad._current_level >= 0
    )
