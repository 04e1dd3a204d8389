"""Bounds: what a config may say before a model is built from it. Free of torch.

A config of a hundred bytes can ask for a hundred million layers. Sizes of weights cost nothing, since an empty model has none; but
whatever counts parts makes one object for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rpq_convert.errors import SourceError

MOST_PARTS = 200_000  # layers, experts, labels
MOST_TENSORS = (
    50_000  # of a model of which only a config is known; the largest that people have published have some 50,000
)
TIMES, LEAST = 8, 4096  # as many tensors as a checkpoint has may a model have, and some more
PARTS = re.compile(  # not Gemma 3n's vocab_size_per_layer_input, a layer_rope_theta or a codebook_size
    r"(?!.*(?:^|_)(?:vocab|sizes?|dims?|theta|ids?|index|length|offset|scale)(?:_|$))"
    r"(?:^|.*_)(?:layers?|depths?|blocks?|labels?|experts?|stages?|heads?|languages?|codebooks?)(?:_.*|$)"
)


def check_config(config: Any, where: str, key: str = "") -> None:
    """Refuse a config that counts more parts of a model than any has.

    Raises:
        SourceError: the field, and where it is.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            check_config(value, where, str(name))
    elif isinstance(config, (list, tuple)):
        for value in config:
            check_config(value, where, key)
    elif isinstance(config, (int, float)) and config > MOST_PARTS and PARTS.fullmatch(key.lower()):
        raise SourceError(f"{where}: {key} is {str(config)[:24]}; no model has more than {MOST_PARTS:,}")


def tensors_allowed(known: int | None, most: int | None = None) -> int:
    """Return how many tensors a model may have that is built from a config.

    Args:
        known: of its checkpoint; None where only the config is there. most: what the user allows.
    """
    if most is not None:
        return most
    return MOST_TENSORS if known is None else max(LEAST, TIMES * known)
