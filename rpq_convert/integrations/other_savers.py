"""Savers of other libraries that rebuild a dense model: they refuse a converted one instead of losing its weights.

`PyTorchModelHubMixin`, diffusers' `ModelMixin` and timm write a state dict, and load it into the model that their class builds.
Tensors that this model has no place for are passed over there, and those that it misses stay random. Each is changed when it is
imported. `PyTorchModelHubMixin` says the same where it is to load a converted folder.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOADED = "load it with rpq.load(folder, factory=…), where the factory builds the dense model"


def hub_mixin() -> None:
    """Let models of `huggingface_hub.PyTorchModelHubMixin` refuse."""
    module = importlib.import_module("huggingface_hub.hub_mixin")
    replace_method(module.PyTorchModelHubMixin, "_save_pretrained", _refuses_models("PyTorchModelHubMixin"))
    replace_method(module.PyTorchModelHubMixin, "_load_as_safetensor", _refuses_folders)


def diffusers() -> None:
    """Let models of diffusers refuse; a pipeline saves each of its models by it."""
    module = importlib.import_module("diffusers.models.modeling_utils")
    replace_method(module.ModelMixin, "save_pretrained", _refuses_models("ModelMixin"))


def timm() -> None:
    """Let `timm.models.save_for_hf` refuse, which `push_to_hf_hub` calls."""
    for name in ("timm.models._hub", "timm.models"):
        if hasattr(sys.modules.get(name), "save_for_hf"):
            replace_method(sys.modules[name], "save_for_hf", _refuses_models("timm"))


def replace_method(owner: Any, name: str, guarded: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a guard before a function of a class or module, once."""
    found = vars(owner)[name]
    plain = found.__func__ if isinstance(found, classmethod) else found
    if hasattr(plain, "_rpq"):
        return
    guard: Any = functools.wraps(plain)(guarded(plain))
    guard._rpq = True
    setattr(owner, name, classmethod(guard) if isinstance(found, classmethod) else guard)


def _refuses_models(library: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def guarded(plain: Callable[..., Any]) -> Callable[..., Any]:
        def save(model: Any, *args: Any, **kwargs: Any) -> Any:
            from rpq_convert.errors import SourceError
            from rpq_convert.layers.surgery import layers_of

            if layers_of(model):
                raise SourceError(
                    f"{type(model).__name__} holds RPQ weights, which {library} does not load again: save it with "
                    f"rpq.save(model, folder) and {LOADED}; or make it dense first (rpq.restore(model))"
                )
            return plain(model, *args, **kwargs)

        return save

    return guarded


def _refuses_folders(plain: Callable[..., Any]) -> Callable[..., Any]:
    def load(cls: Any, model: Any, model_file: str, *args: Any, **kwargs: Any) -> Any:
        from rpq_convert.errors import SourceError
        from rpq_convert.storage.sources import is_converted

        if is_converted(folder := Path(model_file).parent):
            raise SourceError(f"{folder} is converted, which {cls.__name__}.from_pretrained does not read: {LOADED}")
        return plain(cls, model, model_file, *args, **kwargs)

    return load
