"""The error that each converted layer adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rpq_convert.core.keywords import keywords
from rpq_convert.errors import EvaluateError
from rpq_convert.evaluation.outputs import main_output
from rpq_convert.inputs.items import prepare
from rpq_convert.layers import surgery
from rpq_convert.layers.precision import fitting
from rpq_convert.running.call import call, without_padding
from rpq_convert.running.state import kept


@keywords()
@torch.inference_mode()
def layer_errors(base: nn.Module, model: nn.Module, data: Any) -> dict[str, float]:
    """Return, for every converted layer, the relative squared error of its output on the inputs that the base gives it.

    Args:
        base, model: the dense model and its conversion, modules under the same names.
        data: inputs as for `evaluate`.
    """
    homes: dict[str, list[str]] = {}
    for path in surgery.layers_of(model):
        homes.setdefault(path.rpartition(".")[0], []).append(path)
    if not homes:
        raise EvaluateError(f"{type(model).__name__} has no RPQ layer")
    sums = {home: [0.0, 0.0] for home in homes}
    hooks: list[Any] = []
    current: Any = None  # the input that runs

    def watch(home: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            layer = model.get_submodule(home)
            args, kwargs = fitting((args, kwargs), module, layer)
            wanted, found = main_output(output).double(), main_output(layer(*args, **kwargs)).double()
            wanted, found = (without_padding(current, x) for x in (wanted, found))
            sums[home][0] += float((found - wanted).square().sum())
            sums[home][1] += float(wanted.square().sum())

        return hook

    try:
        for home in homes:
            hooks.append(base.get_submodule(home).register_forward_hook(watch(home), with_kwargs=True))
        with kept(base, model) as restore:
            for item in prepare(data, base, "data", labels=True):
                restore()
                current = {k: v for k, v in item.items() if k != "labels"} if isinstance(item, Mapping) else item
                call(base, current)
    finally:
        for handle in hooks:
            handle.remove()
    return {
        path: rest / power if power else (math.inf if rest else 0.0)
        for home, (rest, power) in sums.items()
        for path in homes[home]
    }
