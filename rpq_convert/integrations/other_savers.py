"""Savers of other libraries that rebuild a dense model: they refuse a converted one instead of losing its weights.

`PyTorchModelHubMixin` and diffusers' `ModelMixin` write a state dict, and load it into the model that their class builds. Tensors
that this model has no place for are passed over there, and those that it misses stay random. Each is changed when it is imported.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any


def hub_mixin() -> None:
    """Let models of `huggingface_hub.PyTorchModelHubMixin` refuse."""
    _refuse("huggingface_hub.hub_mixin", "PyTorchModelHubMixin", "_save_pretrained")


def diffusers() -> None:
    """Let models of diffusers refuse; a pipeline saves each of its models by it."""
    _refuse("diffusers.models.modeling_utils", "ModelMixin", "save_pretrained")


def _refuse(module: str, name: str, method: str) -> None:
    kind: Any = getattr(importlib.import_module(module), name)
    plain = getattr(kind, method)
    if hasattr(plain, "_rpq"):
        return

    @functools.wraps(plain)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        from rpq_convert.errors import SourceError
        from rpq_convert.layers.surgery import layers_of

        if layers_of(self):
            raise SourceError(
                f"{type(self).__name__} holds RPQ weights, which {name} does not load again: save it with rpq.save(model, folder) "
                "and load it with rpq.load(folder, factory=…), or rpq.restore(model) first"
            )
        return plain(self, *args, **kwargs)

    save._rpq = True  # type: ignore[attr-defined]
    setattr(kind, method, save)
