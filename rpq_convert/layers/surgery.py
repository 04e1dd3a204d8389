"""Surgery on modules: change the parameter, inherit the layer.

A converted module stays the object that it was. Its parameter `weight` becomes a child module `weight_rpq`, and its class
becomes a generated `RPQ<Name>` that differs in one thing: `weight` is a read-only property that returns a `ComputedWeight`.
Forward, hooks, aliases and attributes are inherited. `Places` does this under all names of a parameter at once, and undoes
it; `rollback.py` undoes a conversion that fails. The file is long because all that a converted class differs in is here.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace

from rpq_convert.layers import linear_forward
from rpq_convert.layers.encoders import padded_where_converted
from rpq_convert.layers.lazy_weight import ComputedWeight, DecodedView, OffloadedWeight, refuse
from rpq_convert.layers.traced_weight import TracedWeight
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.layer_types import original_class
from rpq_convert.running.hooked import compute_again, hooked, source_of
from rpq_convert.running.offload import is_hooked


def widen(model: nn.Module) -> None:
    """Hold what trains in float32 where files hold it in fewer bits.

    What changed its dtype only in `train()` would be lost to hooks on gradients that were set before, those of
    DistributedDataParallel among them. And `next(model.parameters()).dtype` is what weights expand to: much code casts its inputs to that.
    """
    for weight in (m for m in model.modules() if isinstance(m, RPQWeight)):
        weight.widen()


def make_ahead(model: nn.Module) -> None:
    """Make what the first call of every layer would keep with it: views, tables, addresses.

    Made in the middle of a forward pass, these small things come to lie in memory that activations left, into which no activation fits
    any more: a ViT-B/16 with a batch of 32 took 2.2 GB where it takes 1.2.
    """
    for layer in (m for m in model.modules() if isinstance(m, RPQLayer)):
        for name, weight in layer.rpq_weights().items():
            if not is_hooked(weight) and weight.stored_tensor("codes").is_cpu:
                getattr(layer, name)
                weight.parts()
                if type(layer).forward is linear_forward.forward:
                    weight.caches.product = weight.product()


# called with every model whose layers were converted, loaded or restored
AFTER: list[Callable[[nn.Module], None]] = [compute_again, padded_where_converted, widen, make_ahead]


SUFFIX = "_rpq"


class RPQLayer:
    """Mixed into the class of a converted module; the weights it names are computed, not stored."""

    __slots__ = ()
    _rpq_names: tuple[str, ...] = ()
    _rpq_original: Any  # the class it had

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an ordinary layer: code that builds another one with `type(layer)(…)`, as PEFT does, means that."""
        return cls._rpq_original(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Tell the original's hook of no class but those that somebody derives from a generated one."""
        if "_rpq_original" not in vars(cls):
            super().__init_subclass__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._rpq_names:
            return super().__setattr__(name, value)
        if isinstance(value, ComputedWeight):  # tying: share the module, which is where the weight lives
            self._modules[name + SUFFIX] = object.__getattribute__(value, "_rpq")  # type: ignore[attr-defined]
            return None
        raise refuse("assigning to it", f"{type(self).__name__}.{name}")

    def __delattr__(self, name: str) -> None:
        """Refuse the first step of `remove_weight_norm` and its like, which would fail at the second one."""
        if name in hooked(self) and source_of(self, name) in self._rpq_names:  # type: ignore[arg-type]
            raise refuse("removing its hook", f"{type(self).__name__}.{source_of(self, name)}")  # type: ignore[arg-type]
        if name in self._rpq_names:
            raise refuse("deleting it", f"{type(self).__name__}.{name}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Any) -> None:
        """Refuse a computed weight: pruning and its like would keep it under another name."""
        if isinstance(param, ComputedWeight):
            raise refuse("pruning or reparametrizing it", object.__getattribute__(param, "_name"))
        super().register_parameter(name, param)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} is converted, and torch.jit.script compiles no RPQ weights: use torch.export or torch.jit.trace, or "
            "rpq_convert.restore(model) first"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Pass over a checkpoint's guard, so that its weight files load by `load_state_dict` too (Trainer resumes so)."""
        for key in [prefix + name for name in self._rpq_names]:
            if key in state_dict and state_dict[key].shape == (0,):
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._rpq_original, self._rpq_names), self.__getstate__()

    def rpq_weights(self) -> dict[str, RPQWeight]:
        """Return parameter name -> its RPQWeight."""
        return {n: self._modules[n + SUFFIX] for n in self._rpq_names}  # type: ignore[attr-defined]


def _blank(original: Any, names: tuple[str, ...]) -> nn.Module:
    return object.__new__(rpq_class(original, names))


def _computed(name: str) -> property:
    def read(self: nn.Module) -> torch.Tensor:
        rpq: Any = self._modules[name + SUFFIX]
        compiling = torch.compiler.is_compiling()
        caches = rpq.caches
        if caches.expanded is not None and caches.expanded.requires_grad:
            return caches.expanded
        if caches.expanded is not None and not (torch.is_grad_enabled() and rpq.trainable):
            return caches.expanded if compiling else caches.read_only
        if compiling and (isinstance(self, nn.utils.parametrize.ParametrizationList) or name.endswith(("_v", "_orig"))):
            return rpq()  # torch's own functions that compute a weight from it take tensors alone
        if compiling:
            return TracedWeight(rpq, f"{type(self).__name__}.{name}")  # type: ignore[return-value]
        if _symbolic_trace._is_fx_tracing_flag and (
            tracer := getattr(rpq.codebooks, "tracer", None)
        ):  # a proxy of a parameter
            return tracer.create_proxy("call_module", tracer.path_of_module(rpq), (), {})  # type: ignore[no-any-return]
        if is_hooked(rpq):
            return OffloadedWeight(rpq, f"{type(self).__name__}.{name}")
        kind = (rpq._probe.dtype, rpq.stored_tensor("codes").device, type(self), name)
        lazy = caches.lazy
        if lazy is None or lazy[0] != kind:
            with torch.inference_mode(False):  # used later where gradients are recorded
                lazy = (kind, ComputedWeight(rpq, f"{type(self).__name__}.{name}"))
            if torch._C._get_tracing_state() is None:
                caches.lazy = lazy
        return lazy[1]

    return property(read, doc=f"The expanded {name}; read-only.")


def _flat(self: Any) -> list[Any]:
    """Return a recurrent layer's weights in the order in which torch's C++ takes them."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _some(self: Any, index: Any) -> Any:
    """Return a list of the parameters in a slice that shares their weights, as torch's would share parameters."""
    if not isinstance(index, slice):
        return nn.ParameterList.__getitem__(self, index)
    names = [str(i) for i in range(*index.indices(len(self)))]
    some = nn.ParameterList([None] * len(names))
    for number, name in enumerate(names):
        if is_rpq(self, name):
            delattr(some, str(number))
            some._parameters[str(number)] = None
            install(some, str(number), self._modules[name + SUFFIX])
        else:
            some[number] = getattr(self, name)
    return some


def _refuse_inverse(self: Any, value: Any) -> None:
    raise refuse("assigning to it", type(self).__name__)


# What a generated class needs besides its computed parameters.
EXTRAS: dict[type, dict[str, Any]] = {
    nn.RNNBase: {"_flat_weights": property(_flat, lambda self, value: None), "flatten_parameters": lambda self: None},
    nn.ParameterList: {"__getitem__": _some},
    nn.utils.parametrize.ParametrizationList: {"right_inverse": _refuse_inverse},  # how `layer.weight = x` ends
}


class _Before:
    """Puts `RPQLayer` before the original class in the order of methods, though the original is the only base.

    So a generated class has the memory layout of its original, which Python asks of an object that changes its class, whatever
    the original's bases are (ABC, Generic, classes with `__slots__`). `RPQLayer` as the first base would give another one.
    """

    def mro(cls: Any) -> list[type]:
        if (original := vars(cls).get("_rpq_original")) is not None:
            return [cls, RPQLayer, *original.__mro__]
        return type.mro(cls)  # type: ignore[no-any-return]  # a class that someone derives from a generated one


@functools.cache
def _metaclass(kind: Any) -> Any:
    return type.__new__(type, f"RPQ{kind.__name__}", (_Before, kind), {"__module__": __name__})


@functools.cache
def rpq_class(original: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Return the class `RPQ<original>` in which these parameters are computed; the same class for the same question.

    It is announced to nobody: neither the original's `__init_subclass__` nor its metaclass is called, which may ask for arguments,
    refuse, or keep a register.
    """
    space: dict[str, Any] = {name: _computed(name) for name in names}
    space |= {
        "_rpq_names": names,
        "_rpq_original": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__slots__": (),
    }
    for kind, more in EXTRAS.items():
        space |= more if issubclass(original, kind) else {}
    if names == ("weight",) and getattr(original, "forward", None) is linear_forward.FORWARD:
        space["forward"] = linear_forward.forward
    meta: Any = _metaclass(original.__class__)
    make: Any = ABCMeta.__new__ if issubclass(meta, ABCMeta) else type.__new__
    return make(meta, f"RPQ{original.__name__}", (original,), space)


# The attribute of `object`: a class may refuse assignments, or have a property of this name.
set_class = object.__dict__["__class__"].__set__


def install(module: nn.Module, name: str, rpq: nn.Module) -> None:
    """Replace the parameter `name` of this module by an RPQWeight, in place."""
    names = (*module._rpq_names, name) if isinstance(module, RPQLayer) else (name,)
    kind = rpq_class(original_class(module), names)
    dense = module._parameters.pop(name)
    if dense is not None and isinstance(rpq, RPQWeight):
        rpq.keep_attributes(dense.__dict__)
    set_class(module, kind)
    module.__dict__.pop("_flat_weights", None)  # a recurrent layer's list, which would keep the dense weight alive
    module.add_module(name + SUFFIX, rpq)


def remove(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Undo `install`: give the module an ordinary parameter again."""
    assert isinstance(module, RPQLayer)
    names = tuple(n for n in module._rpq_names if n != name)
    original = module._rpq_original
    del module._modules[name + SUFFIX]  # type: ignore[attr-defined]
    set_class(module, rpq_class(original, names) if names else original)
    module.register_parameter(name, parameter)  # type: ignore[attr-defined]
    if isinstance(module, nn.RNNBase) and not names:
        module._init_flat_weights()


def is_rpq(module: nn.Module, name: str) -> bool:
    """Return whether this parameter of the module is an RPQWeight."""
    return isinstance(module, RPQLayer) and name in module._rpq_names


@dataclass(frozen=True)
class Places:
    """Where one parameter lies in a model: (module, parameter name) for each of its paths, which may lead to one module."""

    places: tuple[tuple[nn.Module, str], ...]

    @property
    def module(self) -> nn.Module:
        """The module under the first path."""
        return self.places[0][0]

    @property
    def parameter(self) -> nn.Parameter | None:
        """The dense parameter; None where the module has none of that name, or it is an RPQWeight."""
        module, name = self.places[0]
        return module._parameters.get(name)

    def install(self, rpq: nn.Module) -> None:
        """Replace the dense parameter by one RPQWeight, under all of its names."""
        for module, name in self.places:
            if name in module._parameters:
                install(module, name, rpq)

    def remove(self, parameter: nn.Parameter) -> None:
        """Make the RPQWeight this dense parameter again, under all of its names."""
        for module, name in self.places:
            if is_rpq(module, name):
                remove(module, name, parameter)


def places(model: nn.Module, paths: Iterable[str]) -> Places:
    """Return where the parameter with these dotted paths lies. AttributeError: a path leads to no module."""
    return Places(tuple(find(model, path) for path in paths))


def places_of(model: nn.Module) -> dict[RPQWeight, Places]:
    """Return every RPQWeight of a model -> where it lies."""
    return {rpq: places(model, paths) for rpq, paths in paths_of(model).items()}


def paths_of(model: nn.Module) -> dict[RPQWeight, list[str]]:
    """Return every RPQWeight of a model -> the dotted paths under which it lies; tied ones have several."""
    paths: dict[RPQWeight, list[str]] = {}
    for path, rpq in layers_of(model).items():
        paths.setdefault(rpq, []).append(path)
    return paths


@contextmanager
def decoded(model: nn.Module) -> Iterator[nn.Module]:
    """Keep a converted model's weights expanded within the block, for code that reads them again and again.

    Takes the memory of the dense model meanwhile. For inference: where gradients must reach codebooks, they are decoded as
    ever. Codebooks that change within the block are not seen.

    Example:
        >>> with torch.no_grad(), rpq.decoded(model):
        ...     model(x)
    """
    weights = {id(w): w for w in layers_of(model).values()}.values()
    try:
        with torch.no_grad():
            for weight in weights:
                expanded = weight()
                weight.caches.keep(expanded, expanded.as_subclass(DecodedView))
        yield model
    finally:
        for weight in weights:
            weight.caches.drop()


def find(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return (module, parameter name) of a dotted parameter path."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def parameter_at(model: nn.Module, path: str) -> nn.Parameter | None:
    """Return the parameter at a dotted path, or None where the model has none there."""
    try:
        module, name = find(model, path)
    except AttributeError:
        return None
    return module._parameters.get(name)


def layers_of(model: nn.Module) -> dict[str, RPQWeight]:
    """Return every dotted parameter path under RPQ -> its RPQWeight, tied ones under each of their names."""
    return {
        f"{path}.{name}".lstrip("."): rpq
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RPQLayer)
        for name, rpq in module.rpq_weights().items()
    }
