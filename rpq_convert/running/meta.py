"""Build a model without its weights: parameters go to meta the moment they are registered, buffers stay real.

`torch.device("meta")` would lose non-persistent buffers (rotary frequencies, masks), which no checkpoint holds. Here a
layer's constructor allocates its parameter (untouched memory), registration replaces it by a meta one, and the
initialisation that follows does nothing, so a model of any size is built in seconds and without memory. An uninitialised
tensor of more than `LARGE` bytes is on meta from the start: the system refuses fused experts (30 GB in one parameter of
DeepSeek-V3) even where nobody would touch them, and only a parameter is made that way.

Other threads are not affected, and several threads may build at once. torch calls a registration hook in every thread, so the
hook first looks whether its own thread is building. It is registered with the first model that is built and stays: torch
iterates over its hooks without a lock, so removing one could break a registration in another thread.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

from rpq_convert.errors import SourceError
from rpq_convert.running.hooked import hooked

LARGE = 1 << 30  # bytes
TABLE, TABLES = 512 << 20, 2 << 30  # bytes of a table that a constructor computes, such as a mask, and of all of them
# Their memory is the system's until it is written to: fused experts are made so.
UNTOUCHED = frozenset((torch.empty, torch.zeros))
MAKERS = frozenset(
    (
        torch.ones,
        torch.full,
        torch.arange,
        torch.linspace,
        torch.eye,
        torch.rand,
        torch.randn,
        torch.randint,
    )
)


class _Building(threading.local):
    """The parameters that this thread has moved: id -> (the parameter, what is registered for it). None where it builds nothing."""

    moved: dict[int, tuple[nn.Parameter, Any]] | None = None
    most: float = math.inf  # how many it may register
    left: float = math.inf


_BUILDING = _Building()


class _Careful(TorchFunctionMode):
    """Puts what is large and uninitialised on meta; where it is `bounded`, it refuses tables of a size that no model has.

    Raises:
        SourceError: such a table.
    """

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.bounded, self.made = bounded, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None and kwargs.get("out") is None:
            planned: Tensor = func(*args, **{**kwargs, "device": "meta"})
            if planned.nbytes > LARGE:
                return planned
        if not self.bounded:
            return func(*args, **kwargs)
        if (
            func in MAKERS
            and kwargs.get("device") is None
            and kwargs.get("out") is None
            and not kwargs.get("generator")
        ):
            self.note(func(*args, **{**kwargs, "device": "meta"}))
            return func(*args, **kwargs)
        found = func(*args, **kwargs)
        if (
            func not in UNTOUCHED
            and isinstance(found, Tensor)
            and not found.is_meta
            and found.nbytes > TABLE
            and found.is_contiguous()
        ) and not any(
            isinstance(a, Tensor) and a.data_ptr() == found.data_ptr() for a in args
        ):  # a view, or filled in place
            self.note(found)
        return found

    def note(self, table: Tensor) -> None:
        self.made += table.nbytes
        if table.nbytes > TABLE or self.made > TABLES:
            raise SourceError(
                f"its model computes a table of {list(table.shape)} when it is built, {table.nbytes / 1e9:.1f} GB: more than any model has; "
                "look at the sizes in its config"
            )


@contextmanager
def parameters_on_meta(most: float = math.inf, *, bounded: bool = False) -> Iterator[None]:
    """Within the block, every parameter that this thread registers in a module is moved to meta; shared ones stay shared.

    Args:
        most: how many may be registered.
        bounded: refuse tables that are larger than any model has: the sizes are a stranger's, not those of the user's own code.

    Raises:
        SourceError: more parameters, or such a table.
    """
    if _BUILDING.moved is not None:  # a block within a block
        yield
        return
    _register_hook()
    _BUILDING.moved, _BUILDING.left, _BUILDING.most = {}, most, most
    try:
        with _Careful(bounded):
            yield
    finally:
        _BUILDING.moved = None


def build_empty(build: Callable[[], Any]) -> Any:
    """Return what a function builds, with parameters on meta and real buffers.

    A constructor that looks at weights (a trial run for a size, an orthogonal start, `.item()`) fails on meta, or keeps a tensor
    that it computed from them. Such a model is built for real, which takes the memory of its weights for a moment.

    Raises:
        MemoryError: it is too large for that. Whatever the function raises.
    """
    first: Exception | None = None
    try:
        with parameters_on_meta():
            model = build()
    except SourceError:
        raise
    except Exception as e:  # what fails on meta is of many kinds; what fails for another reason fails again
        first = e
    else:
        if not isinstance(model, nn.Module) or not _holds_meta(model):
            return model
    try:
        model = build()
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or "allocate memory" in str(e):
            why = "it keeps tensors computed from weights" if first is None else str(first).strip().splitlines()[0]
            raise MemoryError(f"its constructor looks at weights ({why}), and they do not fit in memory: {e}") from None
        raise
    if isinstance(model, nn.Module):
        _move_to_meta(model)
    return model


def _holds_meta(model: nn.Module) -> bool:
    """Return whether a module has a plain attribute that was computed from weights on meta.

    Views of weights are none: loading fills them too. Nor are weights that a hook computes again before every call.
    """
    from rpq_convert.running.holders import storage_of  # it needs `become`

    own = {storage_of(p) for p in model.parameters()}
    values: list[Any] = []
    for module in model.modules():
        computed = hooked(module)
        values += [v for k, v in module.__dict__.items() if k not in computed]
        values += module._buffers.values() if computed else ()  # masks of `prune`
    return any(isinstance(v, Tensor) and v.is_meta and storage_of(v) not in own for v in values)


def _move_to_meta(model: nn.Module) -> None:
    """Move all parameters to meta; each stays the object that it is, whoever else holds it or a view of it."""
    from rpq_convert.running.holders import become_held, held_elsewhere, storage_of

    held, moved = held_elsewhere(model), {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter):
                continue
            if id(parameter) not in moved:
                empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                now: Any = become_held(parameter, empty, held.get(storage_of(parameter), ()))
                moved[id(parameter)] = parameter, now
            module._parameters[name] = moved[id(parameter)][1]


@functools.cache
def _register_hook() -> None:
    register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]  # its stub forgets what it returns


def _to_meta(module: nn.Module, name: str, param: nn.Parameter) -> nn.Parameter | None:
    """Return what to register instead of a parameter; None leaves it as it is."""
    moved = _BUILDING.moved
    if moved is None or param.is_meta or isinstance(param, nn.parameter.UninitializedParameter):
        return None
    if id(param) not in moved:
        _BUILDING.left -= 1
        if _BUILDING.left < 0:
            raise SourceError(
                f"its config describes a model of more than {_BUILDING.most:,.0f} tensors, which its weights do not have; correct the config, "
                "or allow more with max_tensors"
            )
        kind = type(param)
        meta = param.detach().to("meta")
        empty = nn.Parameter(meta, requires_grad=param.requires_grad) if kind is nn.Parameter else kind(meta)
        moved[id(param)] = (param, become(param, empty))
    return moved[id(param)][1]


def become(tensor: Tensor, other: Tensor) -> Tensor:
    """Make a tensor object another tensor, so that whoever holds it has that one; return the object that is `other` now.

    Where that cannot be (another class, weak references, a recorded graph), the memory of the tensor is freed, and holders keep an
    empty one.
    """
    if type(tensor) is not type(other):
        return other
    other.__dict__.update(tensor.__dict__)
    try:
        swap_tensors(tensor, other)
    except RuntimeError:
        if not tensor.is_meta:
            tensor.data = tensor.data.new_empty(0)
        return other
    return tensor
