"""State: what a forward pass may change in a model besides its output, kept and put back.

Recurrent state, counters, caches and statistics lie in buffers, in attributes (numbers, tensors, lists, objects) and in random
generators. Parameters are left alone: nothing here trains, and a conversion replaces them meanwhile.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attributes that every module has; of these only buffers change in a forward pass. A recurrent layer's list of weights is
# surgery's, which must not be undone.
OWN = (frozenset(vars(nn.Module())) | {"_flat_weights"}) - {"_buffers"}
FOREIGN = {"accelerate", "rpq_convert"}  # hooks that hold offloaded weights; codes, and samples that blocks are run on
ATOMS = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, str, bytes, int, float, complex, type(None))
MISSING = object()


class State:
    """What a model's forward pass may change, as it is now; `restore` makes it so again.

    Containers and objects are filled again in place, so that whoever shares one still does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # holds what was seen, so that identities stay their own
        for module in model.modules():
            self._keep(module)

    def restore(self) -> None:
        for undo in self._undo:
            undo()

    def _keep(self, value: Any) -> None:
        if isinstance(value, (*ATOMS, nn.Parameter)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        undo = _undo(value)
        if undo is not None:
            self._undo.append(undo)
        for part in _parts(value):
            self._keep(part)


def _undo(value: Any) -> Callable[[], None] | None:
    """Return what gives a value back its present contents; None for what cannot change, or is not ours to change."""
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        array = value.copy()
        return (lambda: value.__setitem__(..., array)) if value.flags.writeable else None
    if isinstance(value, torch.Generator):
        drawn = value.get_state()
        return partial(_set_state, value, drawn)
    if isinstance(value, random.Random):
        state = value.getstate()
        return lambda: value.setstate(state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, np.random.RandomState):
        old = value.get_state()
        return lambda: value.set_state(old)
    if isinstance(value, (list, deque)):
        items = list(value)

        def refill() -> None:
            if len(value) != len(items) or any(a is not b for a, b in zip(value, items)):
                value.clear()
                value.extend(items)

        return refill
    if isinstance(value, set):
        members = set(value)
        return lambda: value.__init__(members)  # type: ignore[misc]
    if isinstance(value, dict):
        return _mapping(value, dict(value))
    names = _attributes(value)
    return (
        None if names is None else _mapping(names, {k: v for k, v in names.items() if k not in _skipped(value)}, value)
    )


def _set_state(generator: torch.Generator, drawn: Tensor) -> None:
    generator.set_state(drawn)


def _tensor(value: Tensor) -> Callable[[], None] | None:
    if value.is_meta or value.layout != torch.strided:
        return None
    before = value.detach().clone()

    @torch.no_grad()
    def undo() -> None:
        if value.shape != before.shape or value.dtype != before.dtype:
            value.data = before.clone()
        elif not torch.equal(value, before):
            with torch.inference_mode(value.is_inference()):
                value.detach().copy_(before)

    return undo


def _mapping(now: MutableMapping[Any, Any], before: dict[Any, Any], owner: Any = None) -> Callable[[], None]:
    kind = type(owner)

    def undo() -> None:
        for name in [n for n in now if n not in before and n not in _skipped(owner)]:
            del now[name]
        for name, value in before.items():
            found = now.get(name, MISSING)
            # what surgery took out of a module of another class now is not put back
            if found is not value and not (found is MISSING and type(owner) is not kind):
                now[name] = value

    return undo


def _skipped(owner: Any) -> frozenset[str]:
    return OWN if isinstance(owner, nn.Module) else frozenset()


class _Slots(MutableMapping[str, Any]):
    """The attributes of an object that has slots in the place of a `__dict__`."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        slots = [getattr(kind, "__slots__", ()) for kind in type(owner).__mro__]
        self.names = [n for own in slots for n in ((own,) if isinstance(own, str) else own) if not n.startswith("__")]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if hasattr(self.owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        if not hasattr(self.owner, name):
            raise KeyError(name)
        return getattr(self.owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.owner, name)


def _attributes(value: Any) -> MutableMapping[str, Any] | None:
    """Return an object's attributes, which can be written through; None where they are not a model's state."""
    home = type(value).__module__.partition(".")[0]
    if home in FOREIGN or (home in sys.stdlib_module_names and not isinstance(value, SimpleNamespace)):
        return None
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else _Slots(value) if hasattr(type(value), "__slots__") else None


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (Tensor, np.ndarray, torch.Generator, random.Random, np.random.Generator)):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    return [v for k, v in (_attributes(value) or {}).items() if k not in _skipped(value)]


def _random() -> Callable[[], None]:
    """Return what puts the random numbers of torch, numpy and Python back to where they are now."""
    here, plain, numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def undo() -> None:
        torch.set_rng_state(here)
        random.setstate(plain)
        np.random.set_state(numbers)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    return undo


@contextmanager
def kept(*models: Any) -> Iterator[Callable[[], None]]:
    """Let models run within the block and leave nothing behind; yields what puts their state back in between.

    Args:
        models: modules; any other callable has no state that is known.
    """
    states = [State(model) for model in models if isinstance(model, nn.Module)]
    numbers = _random()

    def restore() -> None:
        for state in states:
            state.restore()

    try:
        yield restore
    finally:
        restore()
        numbers()
