"""Extra state: what a module's `get_extra_state` adds to its state dict (scales of a float8 layer, counters).

A tensor is stored as a tensor. JSON values lie in config.json. Anything else, which torch would pickle, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rpq_convert.errors import SourceError
from rpq_convert.planning.slots import EXTRA, extra_states


def plain_states(model: nn.Module) -> dict[str, Any]:
    """Return name -> state of every module that has one which is no tensor.

    Raises:
        SourceError: one that JSON cannot hold.
    """
    return {n: check_plain(n, v) for n, v in extra_states(model).items() if not isinstance(v, Tensor)}


def check_plain(name: str, value: Any) -> Any:
    """Return a state that is no tensor, if JSON can hold it.

    Raises:
        SourceError: it cannot.
    """
    try:
        again = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        again = None
    if again != value:
        raise SourceError(
            f"{name} is a {type(value).__name__} that only pickle could keep; let get_extra_state return a tensor or JSON values"
        )
    return value


def has_extra_state(model: nn.Module, name: str) -> bool:
    """Return whether the module of this name takes an extra state."""
    path = name.removesuffix(EXTRA).removesuffix(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return type(module).set_extra_state is not nn.Module.set_extra_state


def set_extra_states(model: nn.Module, states: Mapping[str, Any]) -> nn.Module:
    """Give modules their extra states, in place.

    Raises:
        SourceError: a module that takes none.
    """
    for name, value in states.items():
        if not has_extra_state(model, name):
            raise SourceError(f"{name}: the model has no module that takes an extra state there")
        model.get_submodule(name.removesuffix(EXTRA).removesuffix(".")).set_extra_state(value)
    return model
