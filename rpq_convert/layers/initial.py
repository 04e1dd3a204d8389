"""The values that a module's own class gives its parameters before they are trained, one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.layers import surgery
from rpq_convert.planning import layer_types


def initial(model: nn.Module, name: str, seed: int = 0) -> Tensor:
    """Return what the class of a model fills a tensor with: a table of positions, zeros, seeded random numbers.

    Args:
        model: the empty model. name: of a parameter, which is initialised as its class does, or of a buffer, which is there.
        seed: decides every random number of this tensor.
    """
    module, key = surgery.find(model, name)
    if (buffer := module._buffers.get(key)) is not None and not buffer.is_meta:
        return buffer.detach().clone()
    path, owner = name.rpartition(".")[0], model
    while path:
        if hasattr(found := model.get_submodule(path), "_init_weights"):
            owner = found
            break
        path = path.rpartition(".")[0]
    twin = twin_of(module, [key])
    made: Tensor = torch.empty_like(getattr(module, key), device="cpu")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if key in module._buffers:
            twin._buffers[key] = made.zero_()
            initialise(owner, twin, [], seed)
        else:
            twin._parameters[key] = nn.Parameter(made, requires_grad=made.is_floating_point())
            initialise(owner, twin, [key], seed)
    return getattr(twin, key).detach().clone()  # type: ignore[no-any-return]


@torch.no_grad()
def initialise(model: nn.Module, module: nn.Module, names: Sequence[str], seed: int | None = None) -> None:
    """Give parameters of a module their initial values, in place.

    A transformers model initialises each module by its `_init_weights`; elsewhere a module's `reset_parameters` does. What neither
    knows (a class token, position embeddings) is drawn from N(0, 1).

    Args:
        model: which perhaps has `_init_weights`. seed: given anew to torch's generator; None leaves it as it is.
    """
    _restart(seed)
    for name in names:
        parameter: Any = module._parameters[name]
        parameter.normal_() if parameter.is_floating_point() else parameter.zero_()
    _restart(seed)
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if hasattr(model, "_init_weights"):
        model._init_weights(module)  # type: ignore[operator]
    elif reset is not None:
        reset()


def _restart(seed: int | None) -> None:
    if seed is not None:  # the layers' own initialisers know only the global generator
        torch.random.default_generator.manual_seed(seed)


def twin_of(module: nn.Module, names: list[str]) -> nn.Module:
    """Return a stand-in of the original class that shares just these parameters; all its other tensors are on meta.

    So that the layer's own initialiser runs as it was written: on meta it writes nothing and reads shapes alone.
    """
    twin = object.__new__(layer_types.original_class(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        n: p if n in names or p is None else nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for n, p in module._parameters.items()
    }
    twin._buffers = {n: None if b is None else b.to("meta") for n, b in module._buffers.items()}
    twin._modules = dict(module._modules)
    if isinstance(module, surgery.RPQLayer):
        for name, rpq in module.rpq_weights().items():
            twin._parameters[name] = nn.Parameter(torch.empty(rpq.shape, dtype=rpq.dtype, device="meta"))
            del twin._modules[name + surgery.SUFFIX]
    return twin
