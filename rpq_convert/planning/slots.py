"""The module walker: every parameter and buffer of a model as a `Slot`, none left out.

A slot is one parameter *identity*: a module registered twice, or a tensor tied under several names, is one slot with
aliases. A slot that cannot be converted says why, so that the plan never skips in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _OrthMaps, _Orthogonal

from rpq_convert.core.axes import WeightView
from rpq_convert.errors import PlanError
from rpq_convert.planning.layer_types import class_names, find_view, is_rpq, original_class
from rpq_convert.running.holders import held_elsewhere, storage_of
from rpq_convert.running.hooked import hooked, source_of

EXTRA = "_extra_state"  # torch's name of what `get_extra_state` adds to a state dict
COMPUTED = "computed by its class, which does not store it"
ADAPTER = "of an adapter of PEFT, which is trained"


@dataclass(frozen=True)
class Slot:
    """One parameter or persistent buffer.

    Args:
        name: its dotted path; where several names share it, the one that files hold it under.
        aliases: the other paths of the same tensor.
        layer: class name of the module that owns it.
        kinds: dotted names of that class and its ancestors, for rules that match a type.
        shape, dtype: as stored.
        view: its axes, where the layer table knows them.
        reason: why it cannot be converted; empty where it can.
        unknown: why its axes are not known, where a rule may say them.
        buffer: whether it is a buffer.
        padding_idx: the padding row of an embedding.
        parts: the modules that hold it and that their own class can load; see `parts_of`.
    """

    name: str
    aliases: tuple[str, ...]
    layer: str
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: WeightView | None = None
    reason: str = ""
    unknown: str = ""
    buffer: bool = False
    padding_idx: int | None = None
    parts: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def looked_up(self) -> bool:
        """Say whether it is a table that no head shares: nothing is multiplied by it."""
        return any("Embedding" in k for k in self.kinds) and not any(k.endswith(".Linear") for k in self.kinds)


def _reason(module: nn.Module, name: str, tensor: Tensor) -> str:
    """Return why this parameter cannot be converted, or an empty text."""
    if isinstance(module, torch.jit.ScriptModule):
        return "inside a ScriptModule, whose class is compiled"
    if isinstance(module, torch.fx.GraphModule):
        return "owned by a GraphModule, whose class is made anew with its code"
    listed = isinstance(module, parametrize.ParametrizationList) and not _other_parametrizations(module)
    if listed or name in [f"{w}_g" for w in hooked(module)]:
        return "parametrized: a factor of the weight that is computed from it"
    if parametrize.is_parametrized(module, name) and any(map(_householder, module.parametrizations[name])):  # type: ignore[index]
        return "orthogonal by householder: whole numbers are read from its diagonal"
    codes = f"{name}_rpq"
    if hasattr(type(module), codes) or any(
        codes in own for own in (module.__dict__, module._modules, module._parameters, module._buffers)
    ):
        return f"its module has a {codes} of its own, which is where its codes would be"
    if not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')}: not a floating-point parameter"
    if tensor.ndim < 2:
        return "one axis: nothing to cut"
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        return "hooks on its gradient: nothing would call them"
    return ""


def extra_states(model: nn.Module) -> dict[str, Any]:
    """Return name -> what `get_extra_state` gives, of every module that has one."""
    return {
        f"{path}.{EXTRA}".lstrip("."): module.get_extra_state()
        for path, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _adapters(model: nn.Module) -> Iterator[str]:
    """Yield what the names of PEFT's own parameters begin with: adapters, copies of modules to save, prompts."""
    for path, module in model.named_modules():
        own: Any = getattr(module, "adapter_layer_names", None)
        own = own if isinstance(own, (tuple, list)) else ("prompt_encoder",) if hasattr(module, "peft_config") else ()
        yield from (f"{path}.{name}.".lstrip(".") for name in own)


def walk(model: nn.Module) -> tuple[Slot, ...]:
    """Return the slots of a model, in the order of its state dict, and tensors of extra states; the model may be on meta.

    Raises:
        PlanError: a lazy module that has not seen an input yet.
    """
    found: dict[int, list[_Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module._parameters.items():
            if tensor is not None:
                full = f"{path}.{name}".lstrip(".")
                found.setdefault(id(tensor), []).append((full, *_home(model, path, module, name), tensor, False))
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(tensor), []).append((f"{path}.{name}".lstrip("."), module, name, tensor, True))
    for (path, module, _, tensor, _), *_ in found.values():
        if is_lazy(tensor):
            raise PlanError(f"{path} of {type(module).__name__} has no shape yet; run the model once on data first")
    held = held_elsewhere(model)
    parts, tied = parts_of(model), tied_names(model)
    holders = {n: [h.place for h in held.get(storage_of(places[0][3]), ())] for n, places in found.items()}
    slots = [_slot(places, holders[n], parts, tied) for n, places in found.items()]
    computed = (
        getattr(model, "_keys_to_ignore_on_save", None) or ()
    )  # of transformers: tables that a class computes, such as positions
    slots = [replace(s, view=None, reason=COMPUTED) if s.name in computed and not s.buffer else s for s in slots]
    adapters = tuple(_adapters(model))
    slots = [
        replace(s, view=None, reason=ADAPTER) if s.name.startswith(adapters) and not s.reason else s for s in slots
    ]
    states = {n: t for n, t in extra_states(model).items() if isinstance(t, Tensor)}
    return (
        *slots,
        *(Slot(n, (), "", (), tuple(t.shape), t.dtype, reason="extra state", buffer=True) for n, t in states.items()),
    )


def parts_of(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules inside a model that are models themselves: their class can save and load them."""
    both = ("from_pretrained", "save_pretrained")
    return tuple(p for p, m in model.named_modules() if p and all(hasattr(type(m), name) for name in both))


def tied_names(model: nn.Module) -> set[str]:
    """Return the names that transformers ties to others: its files hold a tied tensor under none of them."""
    found = set()
    for path, module in model.named_modules():
        ties = module.__dict__.get("all_tied_weights_keys")
        found |= {f"{path}.{name}".lstrip(".") for name in ties} if isinstance(ties, dict) else set()
    return found


def home_first(names: Iterable[str], tied: set[str]) -> tuple[str, ...]:
    """Return the names of one tensor: first the one that files hold it under, which is the first that nothing ties to another."""
    return tuple(sorted(dict.fromkeys(names), key=lambda name: name in tied))


_Place = tuple[str, nn.Module, str, Tensor, bool]  # path, module, parameter name, tensor, whether it is a buffer


# A parametrization of torch whose weight follows small errors of the tensor that it is computed from, which has its shape and axes.
# Others may read signs, ranks or masks from theirs.
FOLLOWS = ("_WeightNorm", "_SpectralNorm", "_Orthogonal")


def _home(model: nn.Module, path: str, module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the layer and weight that a parameter stands for: its own, or those that torch computes from it.

    `weight_norm`, `spectral_norm`, `prune` and the like keep a tensor as large as the weight, read along the same axes, whether
    they are parametrizations or hooks.
    """
    if not isinstance(module, parametrize.ParametrizationList):
        return module, next((w for w in hooked(module) if name == source_of(module, w)), name)
    if is_rpq(module) or _other_parametrizations(module):
        return module, name
    largest = max(module._parameters, key=lambda n: module._parameters[n].numel())  # type: ignore[union-attr]
    owner, _, weight = f".{path}".rpartition(".parametrizations.")
    return (model.get_submodule(owner.lstrip(".")), weight) if name == largest else (module, name)


def _householder(parametrization: nn.Module) -> bool:
    return isinstance(parametrization, _Orthogonal) and parametrization.orthogonal_map == _OrthMaps.householder


def _other_parametrizations(module: nn.Module) -> str:
    """Return the parametrizations of a weight that are not known to follow its errors."""
    kinds = [type(m) for m in module.children()]
    known = [k.__name__ in FOLLOWS and k.__module__ == "torch.nn.utils.parametrizations" for k in kinds]
    return ", ".join(k.__name__ for k, ok in zip(kinds, known, strict=True) if not ok)


def _slot(places: list[_Place], holders: list[str], parts: tuple[str, ...], tied: set[str]) -> Slot:
    # a tensor shared by an embedding and a head is read by rows: the embedding's view serves both
    best = next((p for p in places if isinstance(p[1], (nn.Embedding, nn.EmbeddingBag))), places[0])
    _, module, name, tensor, is_buffer = best
    layer = original_class(module).__name__
    reason = "buffer" if is_buffer else _reason(module, name, tensor)
    if getattr(module, "is_rpq_weight", False):
        reason = "part of an RPQ weight already"
    reason = reason or next((r for _, m, n, t, b in places if not b and (r := _reason(m, n, t))), "")
    if holders and not reason:
        reason = f"held by {holders[0]} as well, which would go on with the dense weight"
    view = None if reason else find_view(module, name, tuple(tensor.shape))
    if view is not None and len(view.axes) != tensor.ndim:
        reason = f"stored with {tensor.ndim} axes where {layer} has {len(view.axes)}"
        view = None
    unknown = "" if reason or view else f"raw parameter of {layer}: no known axes"
    if unknown and isinstance(module, parametrize.ParametrizationList):
        unknown = f"parametrized by {_other_parametrizations(module)}, which may not follow its errors"
    names = home_first((p[0] for p in places), tied)
    return Slot(
        name=names[0],
        aliases=names[1:],
        layer=layer,
        kinds=tuple(dict.fromkeys(k for p in places for k in class_names(type(p[1])))),
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        view=view,
        reason=reason,
        unknown=unknown,
        buffer=is_buffer,
        padding_idx=getattr(module, "padding_idx", None) if view is not None and view.axis == "in" else None,
        parts=tuple(part for part in parts if names[0].startswith(f"{part}.")),
    )


HINTS = (("embed", "in"), ("wte", "in"), ("wpe", "in"), ("embeddings", "in"))


def walk_headers(infos: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[Slot, ...]:
    """Return slots guessed from tensor names and shapes alone, for a checkpoint whose model is not known.

    Two axes are read as a Linear's, or an Embedding's where the name says so; three to five as a convolution's. Good
    for a size; a conversion needs the model, which knows.
    """
    slots = []
    for name, dtype, shape in infos:
        view, reason = None, ""
        if not dtype.is_floating_point or len(shape) < 2:
            reason = "one axis: nothing to cut" if dtype.is_floating_point else "not a floating-point parameter"
        elif len(shape) == 2:
            view = WeightView("out in", "in" if any(h in name.lower() for h, _ in HINTS) else "out")
        elif name.endswith("weight") and len(shape) <= 5:
            view = WeightView(" ".join(["out", "in", "k1", "k2", "k3"][: len(shape)]))
        elif len(shape) == 3:
            view = WeightView("expert out in")
        slots.append(Slot(name, (), "tensor", ("tensor",), tuple(shape), dtype, view, reason))
    return tuple(slots)
