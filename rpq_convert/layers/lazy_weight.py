"""ComputedWeight: what `layer.weight` returns, a tensor without memory.

Asked for its shape or dtype it answers; used by an operation in `HANDLERS` (operations.py fills it) it does just the work
that is needed; used by any other it decodes first. So a layer and a subclass keep their own forward, and no layer type needs
code. Writing to a computed weight, or to a view of it, would be lost in a temporary tensor, so it raises
(but for what operations.py can do to the codebooks instead).

Rejected: `torch.nn.utils.parametrize` (replaces the class's `weight` for every instance, decodes on every read and lets
in-place writes vanish) and rebuilding layers from their attributes (loses hooks, aliases and subclass behaviour).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import swap_tensors
from torch.utils._pytree import tree_leaves

from rpq_convert.layers.weight import RPQWeight
from rpq_convert.running.offload import onloaded

# Operations that do better than decode-then-call; a handler that returns NotImplemented falls back to decoding.
HANDLERS: dict[Any, Callable[..., Any]] = {}


def refuse(what: str, owner: str) -> RuntimeError:
    return RuntimeError(
        f"{owner} is computed from RPQ codes, so {what} would be lost. Train its codebooks (<name>_rpq.codebooks), or "
        "call rpq_convert.restore(model) first to get ordinary dense weights back."
    )


IN_PLACE = {"__setitem__"} | {
    f"__i{op}__"
    for op in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
}


HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")  # of a tensor that every call makes anew


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], guarded: type) -> bool:
    """Whether the call writes into a guarded tensor: an in-place method on it, or `out=` it."""
    name = getattr(func, "__name__", "")
    if name == "__set__":  # an attribute of the tensor; gradient bookkeeping on a computed weight is refused as well
        return bool(args) and isinstance(args[0], guarded)
    in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
    target = (
        next(iter(args), None) if args else kwargs.get("tensor", kwargs.get("input", kwargs.get("self")))
    )  # torch.nn.init says tensor=
    targets = target if isinstance(target, (list, tuple)) else [target]  # torch._foreach_add_ and its family take lists
    return (in_place and any(isinstance(t, guarded) for t in targets)) or isinstance(kwargs.get("out"), guarded)


class _ForParameter(Tensor):
    """A tensor that `nn.Parameter` may take: the parameter is a copy, with memory of its own.

    For a subclass, torch calls `detach()`, wants a tensor of the same class, calls `requires_grad_` and marks it as a parameter.
    """

    _wanted: bool | None = None  # whether the parameter will have a gradient

    def _begin(self) -> Tensor:
        """Return what `detach()` gives to `nn.Parameter`."""
        raise NotImplementedError

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        with torch.no_grad():
            swap_tensors(self, nn.Parameter(self.clone(), requires_grad=bool(self._wanted)))


def _becomes_parameter(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Return what `nn.Parameter` gets where it is what calls this function of a weight; None anywhere else."""
    if func is Tensor.detach and _asked_by_parameter(sys._getframe(2)):
        begun = args[0]._begin()
        begun._wanted = False
        return begun  # type: ignore[no-any-return]
    if func is Tensor.requires_grad_ and getattr(args[0], "_wanted", None) is not None:
        args[0]._wanted = args[1] if len(args) > 1 else True
        return args[0]  # type: ignore[no-any-return]
    return None


# What prints, copies or stores a tensor has no use for our class.
PLAIN = {Tensor.__format__, Tensor.__repr__, Tensor.__deepcopy__, Tensor.__reduce_ex__}


def _asked_by_parameter(frame: Any) -> bool:
    while frame.f_code.co_name == "__torch_function__":  # of a subclass
        frame = frame.f_back
    return frame.f_code is nn.Parameter.__new__.__code__


class DecodedView(_ForParameter):
    """A read-only alias of a decoded weight (a slice, a transpose): reads like any tensor, refuses writes."""

    _is_hf_initialized = True  # as below: transformers leaves a row alone, too

    def _begin(self) -> Tensor:
        return self.view_as(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (begun := _becomes_parameter(func, args)) is not None:
            return begun
        if func in PLAIN and isinstance(args[0], DecodedView):
            return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
        if _writes(func, args, kwargs, DecodedView):
            raise refuse(f"{getattr(func, '__name__', 'this')} on a view of it", "A weight")
        if any(issubclass(t, ComputedWeight) for t in types):
            return NotImplemented  # its turn: below, without it, that weight would be decoded outside autograd
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return _guard_alias(out, next((a for a in args if isinstance(a, DecodedView)), None))


def _guard_alias(out: Any, source: Tensor | None) -> Any:
    """Wrap a result that shares memory with the decoded tensor, so that a write to it raises too."""
    if source is None:
        return out
    if isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out):
        return type(out)([_guard_alias(o, source) for o in out]) if type(out) in (tuple, list) else out
    if isinstance(out, numpy.ndarray):
        out.flags.writeable = False  # as writes to a view raise
    if type(out) is not Tensor or out.device.type == "meta" or out.numel() == 0:
        return out
    if torch._C._functorch.is_functorch_wrapped_tensor(out) or torch._C._functorch.is_functorch_wrapped_tensor(source):
        return out  # torch.func's tensors have no memory to compare
    with torch._C.DisableTorchFunctionSubclass():
        if out.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            return out.as_subclass(DecodedView)
    return out


class ComputedWeight(_ForParameter):
    """What `layer.weight` returns: the shape and dtype of the dense parameter, its values decoded when they are used."""

    # transformers' initialisers leave a tensor alone that says so: there is nothing to initialise in a computed weight.
    _is_hf_initialized = True
    _rpq: RPQWeight
    _name: str

    @staticmethod
    def __new__(cls, rpq: RPQWeight, name: str) -> ComputedWeight:
        self = torch.Tensor._make_wrapper_subclass(cls, rpq.shape, dtype=rpq.dtype, device=rpq.codes.device)
        self._rpq, self._name = rpq, name
        return self

    def _begin(self) -> Tensor:
        return type(self)(rpq_of(self), self._name)

    def __getattr__(self, name: str) -> Any:
        """Find what was set on the dense parameter (a mark that optimizers read, say): the codebooks have it."""
        found = rpq_of(self).codebooks.__dict__
        if name in found and not name.startswith("_"):
            return found[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(Tensor, name):
            super().__setattr__(name, value)
        else:
            rpq_of(self).keep_attributes({name: value})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (begun := _becomes_parameter(func, args)) is not None:
            return begun
        if func in ATTRIBUTES and isinstance(args[0], ComputedWeight):
            return ATTRIBUTES[func](args[0])
        handler = HANDLERS.get(func)
        if handler is not None:
            done = handler(*args, **kwargs)
            if done is not NotImplemented:
                return done
        if _writes(func, args, kwargs, ComputedWeight) or getattr(func, "__name__", "") in HOOKS:
            first = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
            target = next(a for a in (*first, *kwargs.values()) if isinstance(a, ComputedWeight))
            raise refuse(f"{getattr(func, '__name__', 'this')} on it", object.__getattribute__(target, "_name"))
        decoded: dict[int, Tensor] = {}
        args, kwargs = _decode_in(args, decoded), _decode_in(kwargs, decoded)
        out = func(*args, **kwargs)
        for source in decoded.values():
            out = _guard_alias(out, source)
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only below autograd (code that switches __torch_function__ off): decoding here would cut the gradient.
        decoded: dict[int, Tensor] = {}
        with torch.no_grad():
            return func(*_decode_in(args, decoded), **_decode_in(kwargs or {}, decoded))


class OffloadedWeight(ComputedWeight):
    """A computed weight whose tensors accelerate keeps elsewhere: they come for the time of each operation."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTRIBUTES and func not in PLACES:
            return ATTRIBUTES[func](args[0])
        weights = [w for w in tree_leaves((args, kwargs)) if isinstance(w, ComputedWeight)]
        with onloaded(*{id(rpq): rpq for rpq in map(rpq_of, weights)}.values()):
            return super().__torch_function__(func, types, args, kwargs)


def _decode_in(value: Any, decoded: dict[int, Tensor]) -> Any:
    """Return the argument tree with every computed weight decoded, each module once."""
    if isinstance(value, ComputedWeight):
        rpq = object.__getattribute__(value, "_rpq")
        if id(rpq) not in decoded:
            decoded[id(rpq)] = rpq()
        return decoded[id(rpq)]
    if type(value) in (tuple, list):
        return type(value)(_decode_in(v, decoded) for v in value)
    if type(value) is dict:
        return {k: _decode_in(v, decoded) for k, v in value.items()}
    return value


def rpq_of(weight: ComputedWeight) -> RPQWeight:
    return object.__getattribute__(weight, "_rpq")


def _freeze(weight: ComputedWeight, wanted: bool = True) -> ComputedWeight:
    """Freeze what the weight is computed from, or let it train again: `weight.requires_grad_(…)`."""
    rpq_of(weight).requires_grad_(wanted)
    return weight


def _copy(weight: ComputedWeight, memo: dict[int, Any]) -> Tensor:
    """Return what a copy of a parameter is: a parameter with memory of its own."""
    with torch.no_grad():
        copied = nn.Parameter(rpq_of(weight)().clone(), requires_grad=rpq_of(weight).trainable)
    memo[id(weight)] = copied
    return copied


def _size(weight: ComputedWeight, dim: int | None = None) -> Any:
    size = torch.Size(rpq_of(weight).shape)
    return size if dim is None else size[dim]


# Questions that need no values. Everything not listed decodes.
ATTRIBUTES: dict[Any, Callable[[ComputedWeight], Any]] = {
    Tensor.shape.__get__: _size,  # type: ignore[attr-defined]
    Tensor.dtype.__get__: lambda w: rpq_of(w).dtype,  # type: ignore[attr-defined]
    Tensor.device.__get__: lambda w: rpq_of(w).codes.device,  # type: ignore[attr-defined]
    Tensor.ndim.__get__: lambda w: len(rpq_of(w).shape),  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__: lambda w: rpq_of(w).trainable,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: lambda w: rpq_of(w).codes.is_meta,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda w: rpq_of(w).codes.is_cuda,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__: lambda w: False,  # type: ignore[attr-defined]
    Tensor.grad.__get__: lambda w: None,  # type: ignore[union-attr]
    Tensor.dim: lambda w: len(rpq_of(w).shape),
    Tensor.numel: lambda w: _size(w).numel(),
    Tensor.nelement: lambda w: _size(w).numel(),
    Tensor.element_size: lambda w: rpq_of(w).dtype.itemsize,
    Tensor.is_floating_point: lambda w: True,
    Tensor.is_complex: lambda w: False,
    Tensor.is_contiguous: lambda w: True,
}
HANDLERS |= {
    Tensor.requires_grad_: _freeze,
    Tensor.requires_grad.__set__: _freeze,  # type: ignore[attr-defined]
    Tensor.__deepcopy__: _copy,
}
PLACES = {Tensor.device.__get__, Tensor.is_meta.__get__, Tensor.is_cuda.__get__}  # type: ignore[attr-defined]
