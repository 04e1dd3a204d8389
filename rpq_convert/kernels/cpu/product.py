"""The product of a few tokens with a coded weight, with all that stays the same from call to call looked up before.

A small layer takes as long to find its kernel as to run it: a token of a language model is some two hundred calls. What `linear`
looks up is held here by the weight that owns the tensors, which are asked only whether they have changed.
"""

from __future__ import annotations

import functools

from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.cpu import linear
from rpq_convert.kernels.cpu.cost import cost
from rpq_convert.kernels.cpu.prepared import cached_float32, held, pointer

MOST = 16  # tokens: the time of more is that of their kernel


class Product:
    """`x W^T + bias` for a few tokens in float32: the same bits as `backend.linear` of x times the input scales.

    Args:
        codes: uint8 [stages, blocks, n], any strides, of the same memory as `stored`, which the weight holds.
        codebooks: [stages, books, 256, dim] (one stage may lack the axis).
        scales: [outputs]; input_scales: [inputs].
    """

    def __init__(
        self, codes: Tensor, stored: Tensor, codebooks: Tensor, scales: Tensor | None, input_scales: Tensor | None, layout: Layout
    ) -> None:  # fmt: skip
        self.codes, self.layout, self.outputs, self.inputs = codes, layout, layout.outputs, layout.inputs
        self.stored, self.place = stored, stored.data_ptr()
        self.launch = linear.launch_of_one(layout.axis == "in", codes, codebooks, layout)
        self.kept = cached_float32(scales), cached_float32(input_scales)
        self.scales, self.input_scales = map(pointer, self.kept)
        self.tensors = codebooks, scales, input_scales
        self.held = [None if t is None else held(t) for t in self.tensors]

    def fits(self, stored: Tensor, *tensors: Tensor | None) -> bool:
        """Whether it was made of these codes, codebooks, scales and input scales, and none has changed since."""
        if stored is not self.stored or stored.data_ptr() != self.place:
            return False
        for one, known, given in zip(self.held, self.tensors, tensors):
            if given is not known or (one is not None and given is not None and not one.unchanged(given)):
                return False
        return True

    def serves(self, tokens: int) -> bool:
        """Whether so many tokens are few, and are multiplied by codes."""
        return tokens == 1 or (1 < tokens <= MOST and by_codes(self.layout, tokens))

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product for x [..., inputs], float32, contiguous, of a number of tokens that it serves; bias [outputs] the same."""
        if x.numel() > self.inputs:
            codebooks, scales, input_scales = self.tensors
            out = linear.apply(
                self.layout.axis == "in", x.view(-1, self.inputs), self.codes, codebooks, self.layout,
                factors=input_scales, scales=scales, bias=bias,
            )  # fmt: skip
            return out.view(*x.shape[:-1], self.outputs)
        out = x.new_empty((1, self.outputs) if x.ndim == 2 else (*x.shape[:-1], self.outputs))
        self.launch.one_token(x, self.scales, pointer(bias), out.data_ptr(), self.input_scales)
        return out


@functools.cache
def by_codes(layout: Layout, tokens: int) -> bool:
    return cost(layout, tokens) <= 1
