"""TuneOptions: how a converted model is tuned. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from rpq_convert.core.options import DTYPES, check_values, dtype_text, setting
from rpq_convert.errors import TuneError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How a converted model is tuned.

    Raises:
        TuneError: a value outside its range.
    """

    loss: str | Callable[[Any, Any], Any] | None = setting(
        None,
        "kl, the divergence of predicted distributions; mse, the squared distance of outputs, relative; or a function of (model's "
        "output, base's output). By default kl where outputs are logits.",
        choices=("kl", "mse"),
    )
    steps: int = setting(200, "At most so many, one batch each; fewer where held-out data no longer improves.", least=0)
    rate: float = setting(
        2e-3,
        "Learning rate: the size of a step, relative to the root mean square of the tensor that it changes. Where an evaluation "
        "finds the model worse than it came, tuning goes back to the best step and on with a quarter of it.",
        least=0,
    )
    every: int | None = setting(
        None,
        "Steps between two evaluations; by default a 25th of all, at least 20, since the learning rate falls as slowly.",
        least=1, flag=None,
    )  # fmt: skip
    patience: int = setting(
        5,
        "Evaluations without a new best before tuning goes back to it and on with a quarter of the learning rate, or, where it "
        "has done so, ends.",
        least=1, flag=None,
    )  # fmt: skip
    seed: int = setting(0, "Decides the order of the batches.", least=0)
    autocast: str | None = setting(
        None, "Dtype to multiply in, such as bfloat16; models of half precision need it.", choices=DTYPES, flag=None
    )
    recompute: bool = setting(
        False,
        "Gradient checkpointing: blocks keep only their inputs for the backward pass and run once more in it. Less memory, more "
        "time.",
    )
    recode: float = setting(
        0.0,
        "Code updates: the share of each layer's codes that may change at a time, e.g. 0.0005; 0 keeps them all. Takes more "
        "memory: the dense weights, their gradients and two more numbers for each.",
        least=0, most=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "autocast", dtype_text(self.autocast))
        check_values(self, TuneError)
        if self.rate == 0:
            raise TuneError("rate must be more than 0: no step of it changes anything")

    @property
    def interval(self) -> int:
        """Steps between two evaluations."""
        return self.every or max(20, self.steps // 25)


class BlockKeywords(TypedDict, total=False):
    """What callers may give for the fields of `TuneOptions` that `tune_blocks` takes as they are, for type checkers."""

    rate: float
    every: int | None
    patience: int
    autocast: str | torch.dtype | None
    recompute: bool
    recode: float


class TuneKeywords(BlockKeywords, total=False):
    """What callers may give for the fields of `TuneOptions`, for type checkers."""

    loss: str | Callable[[Any, Any], Any] | None
    steps: int
    seed: int
