"""What one RPQWeight keeps between calls, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Caches:
    """What one RPQWeight keeps between calls. A copy, a pickle or a file of the weight has none of it.

    What kernels make of a tensor of codebooks or scales (`kernels.cpu.prepared`) is kept with that tensor, not here: a compiled or
    exported graph calls kernels with tensors alone. It goes when the tensor does, or changes.
    """

    def __init__(self) -> None:
        # the stored codes, their address, the shapes of codebooks and scales, and the view [stages, blocks, n] of the codes: made
        # anew, and checked again, when one of the others differs
        self.codes: tuple[Tensor, int, torch.Size, torch.Size | None, Tensor] | None = None
        # what `layer.weight` returns (a tensor without memory takes 2 microseconds to make), and what that depends on
        self.lazy: tuple[Any, Tensor] | None = None
        # what multiplies a few tokens by the weight; False where nothing does (linear_forward.py)
        self.product: Any = None
        # the expanded weight, from `keep` to `drop`: inside `rpq_convert.decoded`, and while codes are tuned
        self.expanded: Tensor | None = None
        self.read_only: Tensor | None = None  # the same memory, as eager code gets it

    def keep(self, expanded: Tensor, read_only: Tensor | None = None) -> None:
        """Let layers multiply by this expanded weight until `drop`."""
        self.expanded, self.read_only = expanded, read_only

    def drop(self) -> None:
        """Go back to codes."""
        self.expanded = self.read_only = None
