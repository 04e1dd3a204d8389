"""Build a model without its weights: parameters go to meta the moment they are registered, buffers stay real.

`torch.device("meta")` would lose non-persistent buffers (rotary frequencies, masks), which no checkpoint holds. Here a
layer's constructor allocates its parameter (untouched memory), registration replaces it by a meta one, and the
initialisation that follows does nothing, so a model of any size is built in seconds and without memory. An uninitialised
tensor of more than `LARGE` bytes is on meta from the start: the system refuses fused experts (30 GB in one parameter of
DeepSeek-V3) even where nobody would touch them, and only a parameter is made that way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGE = 1 << 30  # bytes
_LOCK = threading.RLock()


class _LargeOnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None and kwargs.get("out") is None:
            planned: Tensor = func(*args, **{**kwargs, "device": "meta"})
            if planned.nbytes > LARGE:
                return planned
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within the block, every parameter that any module registers is moved to meta; shared ones stay shared."""
    original = nn.Module.register_parameter
    if hasattr(original, "to_meta"):  # a block within a block
        yield
        return
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the originals alive, so that ids stay unique

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is None or param.is_meta or isinstance(param, nn.parameter.UninitializedParameter):
            return
        if id(param) not in moved:
            kind, attributes = type(param), dict(param.__dict__)
            meta = param.detach().to("meta")
            empty = nn.Parameter(meta, requires_grad=param.requires_grad) if kind is nn.Parameter else kind(meta)
            empty.__dict__.update(attributes)
            param.data = param.data.new_empty(
                0
            )  # frees the memory; the object stays, so that a second registration is known
            moved[id(param)] = (param, empty)
        self._parameters[name] = moved[id(param)][1]

    register.to_meta = True  # type: ignore[attr-defined]
    with _LOCK:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            with _LargeOnMeta():
                yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]
