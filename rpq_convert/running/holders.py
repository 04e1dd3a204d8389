"""Holders: what besides a module's own table of parameters keeps hold of a weight.

A list, a closure or a hidden module that holds a weight goes on using it after the module computes another one from codes, and
gets nothing from a checkpoint. Such a weight stays dense. The search starts at the modules of a model and follows what Python
code can reach from them: attributes, containers, partial functions, closures, defaults, and the global variables that their own
functions name. Optimizers are no such holders: they are made after conversion.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rpq_convert.running.hooked import hooked
from rpq_convert.running.meta import become

MOST = 300_000  # objects that are looked at, a fraction of a second: a model may hold a dataset
TABLES = ("_parameters", "_buffers", "_modules")
ATOMS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, range)
CLOSED = (type, types.ModuleType, types.BuiltinFunctionType, torch.optim.Optimizer, LRScheduler)
ITEMS = (list, tuple, set, frozenset, deque)


@dataclass(frozen=True)
class Held:
    """A tensor, and the place where it is held besides the tables of the model's modules."""

    place: str
    tensor: Tensor


def held_elsewhere(model: nn.Module) -> dict[int, list[Held]]:
    """Return the tensors that are held besides the modules' tables of parameters, by `storage_of`."""
    modules = dict(model.named_modules())
    found: dict[int, list[Held]] = {}
    waiting: list[tuple[Any, Any]] = []
    for path, module in modules.items():
        start = (None, path or type(module).__name__)
        skipped = {
            *TABLES,
            *hooked(module),
            "_flat_weights",
            "_flat_weight_refs",
        }  # surgery gives a recurrent layer a list of its own
        if not getattr(module, "is_rpq_weight", False):
            waiting += [(v, (start, f".{k}")) for k, v in module.__dict__.items() if k not in skipped and not _empty(v)]
            waiting += [(f, (start, f".{k}")) for k, f in _methods(type(module))]
            for name, buffer in module._buffers.items():  # one that is a view of a parameter
                if buffer is not None:
                    found.setdefault(storage_of(buffer), []).append(Held(f"{start[1]}.{name}", buffer))
    seen = {id(m) for m in modules.values()}
    for _ in range(MOST):
        if not waiting:
            break
        value, place = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.setdefault(storage_of(value), []).append(Held(_words(place), value))
        else:
            waiting += [(v, (place, label)) for label, v in _inside(value) if not _empty(v)]
    return found


def become_held(tensor: Tensor, other: Tensor, held: Iterable[Held]) -> Tensor:
    """Make a tensor another one, in whatever holds it or a view of it; return the object that is `other` now.

    Args:
        held: of this tensor's memory, as it was before.
    """
    views = [h.tensor for h in held if h.tensor is not tensor and h.tensor.untyped_storage().nbytes() == tensor.nbytes]
    if views and other.stride() != tensor.stride():
        placed = torch.empty_strided(tensor.size(), tensor.stride(), dtype=other.dtype, device=other.device)
        other.data = placed.copy_(other.detach())
    now = become(tensor, other)
    for view in views:
        same = now.detach().as_strided(view.size(), view.stride(), view.storage_offset())
        become(view, same.requires_grad_(view.requires_grad))
    return now


def storage_of(tensor: Tensor) -> int:
    """Return what names the memory of a tensor, on meta too: views of one tensor give the same."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or of a kind of its own
        return id(tensor)


def optimizers_of(model: nn.Module) -> list[tuple[str, frozenset[int]]]:
    """Return the optimizers of this process that hold parameters of a model: (class name, ids of all that it holds).

    Python's heap is searched for them only where something beside the modules counts as a holder.
    """
    shared = {
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None and getrefcount(p) > ALONE
    }
    found = []
    for each in gc.get_objects() if shared else ():
        if issubclass(type(each), torch.optim.Optimizer) and hasattr(each, "param_groups"):
            held = frozenset(id(p) for group in each.param_groups for p in group["params"])
            found += [(type(each).__name__, held)] if held & shared else []
    return found


ALONE = 3  # references to a parameter that one table holds, as the loop above counts them


def _empty(value: Any) -> bool:
    return isinstance(value, ATOMS) or (isinstance(value, (dict, *ITEMS)) and not value)


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield what classes that are not torch's add: their functions close over variables, too."""
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] not in ("torch", "builtins", "rpq_convert"):
            yield from ((name, value) for name, value in vars(cls).items() if not _empty(value))


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds: (label, value)."""
    if isinstance(value, CLOSED):
        return
    if isinstance(value, dict):
        yield from ((f"[{k!r}]" if isinstance(k, ATOMS) else "[…]", v) for k, v in list(value.items()))
    elif isinstance(value, ITEMS):
        if not isinstance(next(iter(value)), ATOMS):  # a list of a million numbers is no holder
            yield from ((f"[{i}]", v) for i, v in enumerate(list(value)))
    elif isinstance(value, functools.partial):
        yield from (("'s function", value.func), ("'s arguments", value.args), ("'s arguments", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("", value.__func__), ("'s object", value.__self__))
    elif isinstance(value, weakref.ref):
        yield "()", value()
    elif isinstance(value, (staticmethod, classmethod)):
        yield "", value.__func__
    elif isinstance(value, property):
        yield from (("", f) for f in (value.fget, value.fset))
    elif isinstance(value, types.FunctionType):
        yield from _variables(value)
    else:
        yield from _attributes(value)


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function closes over, its defaults, and the tensors among the global variables that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"'s variable {name}", cell.cell_contents
        except ValueError:  # not set yet
            continue
    yield "'s defaults", function.__defaults__
    yield "'s defaults", function.__kwdefaults__
    if function.__module__ and function.__module__.partition(".")[0] not in ("torch", "transformers"):
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            some: Any = list(value.values()) if type(value) is dict else value
            if isinstance(value, Tensor) or (type(some) in (list, tuple) and any(isinstance(v, Tensor) for v in some)):
                yield f"'s global {name}", value


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        tables = TABLES if isinstance(value, nn.Module) else ()  # a module that is not registered
        for table in ({k: v for k, v in own.items() if k not in tables}, *(own[t] for t in tables)):
            yield from ((f".{k}", v) for k, v in list(table.items()))
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield f".{name}", getattr(value, name, None)


def _words(place: Any) -> str:
    words: list[str] = []
    while place is not None:
        place, label = place
        words.append(label)
    return "".join(reversed(words))
