"""Fresh models: build without weights, convert with random codes, initialise what is left.

The dense model is never allocated: its parameters are born on meta, `convert(fit="random")` gives large ones codes and
codebooks, and `materialise` gives the rest (biases, norms, tokens) real memory and their own initialisation.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from rpq_convert.conversion.memory import convert
from rpq_convert.layers.initial import initialise, twin_of
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.running.meta import parameters_on_meta


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Draw a seed from the generator; by default from torch's global one, as any torch layer's init does."""
    return int(torch.randint(2**31, (), generator=generator, device="cpu"))


def fresh(kind: Any, *args: Any, seed: int | None = None, grow: bool = False, **kwargs: Any) -> Any:
    """Return `kind(*args, **kwargs)` with random RPQ weights by the rule `codebooks="heads"`.

    Args:
        kind: a class or function that builds the dense model.
        seed: decides every number; by default drawn from torch's global generator.
        grow: convert small layers as well, which codebooks make larger.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with parameters_on_meta(), torch.random.fork_rng([], enabled=seed is not None):
        model = kind(*args, **kwargs)  # a constructor may draw numbers before they go to meta
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    report = convert(model, codebooks="heads", fit="random", grow=grow, seed=draw_seed(generator))
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=3)
    return materialise(model, generator=generator)


def materialise(model: nn.Module, *, generator: torch.Generator | None = None) -> nn.Module:
    """Give every parameter that is still on meta real memory on the CPU and its module's own initialisation, in place.

    A transformers model initialises each module by its `_init_weights`; elsewhere a module's `reset_parameters` does.
    A raw parameter whose module has neither (a class token, position embeddings) is drawn from N(0, 1). Parameters that
    are real, and RPQ weights, stay as they are.
    """
    real: dict[int, nn.Parameter] = {}
    seed = None if generator is None else draw_seed(generator)
    with torch.random.fork_rng([], enabled=seed is not None), torch.device("cpu"):
        if seed is not None:  # the layers' own initialisers know only the global generator
            torch.random.default_generator.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, RPQWeight):
                continue
            new = []
            for name, empty in module._parameters.items():
                if empty is None or not empty.is_meta:
                    continue
                if id(empty) not in real:
                    real[id(empty)] = nn.Parameter(
                        torch.empty_like(empty, device="cpu"), requires_grad=empty.requires_grad
                    )
                    new.append(name)
                module._parameters[name] = real[id(empty)]
            if new:
                initialise(model, twin_of(module, new), new)
    return model
