"""Drawn: a checkpoint of which only config.json is read. Its tensors are drawn, as the model's class draws them before training.

Random codes and codebooks need no weights. What stays dense (norms, biases) is made when it is written, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rpq_convert.checkpoint.extra_state import plain_states
from rpq_convert.layers.initial import initial
from rpq_convert.planning.planner import job_seed
from rpq_convert.planning.slots import EXTRA


class Drawn(Mapping[str, Tensor]):
    """The tensors of a model whose weights nobody has.

    Args:
        model: the empty model. seed: decides every number. config: the file that the model was built of.
    """

    def __init__(self, model: nn.Module, seed: int, config: Path) -> None:
        self.model, self.seed, self.config = model, seed, config
        self.state = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        self.extra: dict[str, Any] = plain_states(model)

    def __len__(self) -> int:
        return len(self.state)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __getitem__(self, name: str) -> Tensor:
        found = self.state[name]
        return found if name.endswith(EXTRA) else initial(self.model, name, job_seed(self.seed, name))

    def notes(self) -> list[str]:
        """Return what must be known of a model that was made of these."""
        return [
            f"all weights are random: {self.config.name} alone was read, and numbers were drawn from seed {self.seed}; "
            "the model knows nothing before it is trained"
        ]
