"""The classes of transformers that a config serves: those of the Auto classes, and all others of its module."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from rpq_convert.hf import composite


def modeling(config: Any) -> ModuleType | None:
    """Return the module that defines the models of a config; None where there is none."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def auto_classes() -> dict[str, Any]:
    """Return name -> Auto class of models."""
    return {
        name: kind
        for name, kind in vars(modeling_auto).items()
        if isinstance(kind, type)
        and issubclass(kind, _BaseAutoModelClass)
        and getattr(kind, "_model_mapping", None) is not None
    }


def by_auto(config: Any) -> dict[str, list[Any]]:
    """Return the name of each Auto class that knows a config -> the model classes that it may choose."""
    found = {}
    for name, auto in auto_classes().items():
        try:
            known = auto._model_mapping[type(config)]
        except (KeyError, ValueError):
            continue
        found[name] = list(known) if isinstance(known, (tuple, list)) else [known]
    return found


def classes_of(config: Any) -> list[Any]:
    """Return the model classes that are built from a config."""
    named = {k for kinds in by_auto(config).values() for k in kinds}
    found = [*_in_module(config), *sorted(named, key=lambda k: k.__name__)]
    return list(dict.fromkeys(k for k in found if k.config_class is type(config)))


def loaders_of(config: Any, source: Any) -> list[Any]:
    """Return what may load a folder of a class.

    The class itself, each Auto class that gives another, what no Auto class gives, and the classes of parts.
    """
    autos, found, seen = auto_classes(), [source], {source}
    for name, kinds in by_auto(config).items():
        if not seen.issuperset(kinds):
            found.append(autos[name])
            seen.update(kinds)
    parts = {type(part) for part in composite.parts(config)}
    own = (k for k in _in_module(config) if k.config_class in parts)
    return [*found, *(k for k in (*classes_of(config), *own) if k not in seen)]


def _in_module(config: Any) -> list[Any]:
    """Return the model classes of the module that a config's models are in."""
    module = modeling(config)
    names = () if module is None else getattr(module, "__all__", dir(module))
    kinds = (getattr(module, name, None) for name in names)
    return [
        k
        for k in kinds
        if isinstance(k, type) and issubclass(k, PreTrainedModel) and not k.__name__.endswith("PreTrainedModel")
    ]
