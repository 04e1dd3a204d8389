"""transformers checkpoints: read their config, build their model empty.

No code of a checkpoint is ever run: classes come from transformers itself.
"""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpq_convert.errors import SourceError
from rpq_convert.hf import torchvision
from rpq_convert.planning.bounds import check_config
from rpq_convert.running.meta import parameters_on_meta
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.files import refuse_links

torchvision.fix()

import transformers  # noqa: E402


def load_config(folder: str | Path) -> Any:
    """Return a folder's config; one that needs code of the checkpoint is refused."""
    refuse_links(folder)
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise SourceError(f"{path} does not exist")
    raw = read_json(path, kinds.DENSE_CONFIG, SourceError)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        hint = (
            "it needs code from the checkpoint, which is never run" if "auto_map" in raw else "unknown to transformers"
        )
        raise SourceError(f"{path}: model type {kind!r}: {hint}; for your own model give factory='package:callable'")
    check_config(raw, str(path))
    if named := _code_named(raw):
        raise SourceError(f"{path}: {named} is code of a repository, which is never run; remove it from the file")
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as e:  # its validators raise many kinds
        raise SourceError(f"{path}: transformers {transformers.__version__} refuses it: {e}") from e


def _code_named(config: Any) -> str:
    """Return the repository of kernels that a config or a part of it names, or an empty text; transformers would run it."""
    parts = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in parts:
        if str(key).endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            return f"{key} {value!r}"
        if named := _code_named(value):
            return named
    return ""


def model_class(config: Any) -> Any:
    """Return the class that `config.architectures` names: transformers' own, or one that the user registered with it."""
    for named in config.architectures or ():
        name = named.removeprefix("FSDP")
        for found in (getattr(transformers, name, None), *_registered(config), getattr(_home(config), name, None)):
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.__name__ == name:
                return found
        raise SourceError(
            f"transformers {transformers.__version__} has no model class {name!r}; register your own "
            "(AutoModel.register), or give factory='package:callable'"
        )
    try:
        found = transformers.MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    except KeyError:
        raise SourceError(f"config {type(config).__name__} names no architecture") from None


def _home(config: Any) -> Any:
    """Return the file of transformers that defines the models of a config, also those without a public name; None for none."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    there = name.startswith("transformers.models.") and importlib.util.find_spec(name) is not None
    return importlib.import_module(name) if there else None


def _registered(config: Any) -> list[Any]:
    """Return the classes that `AutoModel.register` and its like have for this kind of config in this process."""
    autos = vars(transformers.models.auto.modeling_auto).values()
    extra = (getattr(getattr(auto, "_model_mapping", None), "_extra_content", {}) for auto in autos)
    found = (content[type(config)] for content in extra if type(config) in content)
    return [kind for one in found for kind in (one if isinstance(one, tuple) else (one,))]


def is_pretrained(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers."""
    return isinstance(module, transformers.PreTrainedModel)


def copy_code(model: Any, folder: Path) -> dict[str, Any]:
    """Copy the files that define a model of the user's or a repository's own code, as `save_pretrained` does.

    Nothing is copied, and nothing said, for other models. No code is run: the model was made of it.

    Returns:
        What config.json says of them: the fields with which `from_pretrained(…, trust_remote_code=True)` finds the code.
    """
    if not (is_pretrained(model) and model.is_remote_code()):
        return {}
    for own in (model, model.config):
        if own._auto_class is not None:
            transformers.dynamic_module_utils.custom_object_save(own, folder, config=model.config)  # type: ignore[arg-type]
    return {"auto_map": model.config.auto_map}


def stored_dtype(config: Any, source: Any) -> torch.dtype | None:
    """Return the dtype that transformers loads a checkpoint in whose config names none: that of its first floating-point tensor.

    Args:
        source: its tensors or their headers; None for a config alone.

    Returns:
        None where the config names a dtype, or there is nothing to go by.
    """
    if source is None or getattr(config, "dtype", None) is not None:
        return None
    whole = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    first = sorted(source.infos.values(), key=lambda i: (i.file.name, i.name))
    return next((i.dtype for i in first if i.dtype in whole), None)


def build_empty(config: Any, dtype: torch.dtype | None = None, most: float = math.inf) -> Any:
    """Return the model with its parameters on meta and its buffers real, in eval mode.

    Args:
        most: how many tensors it may have.
    """
    try:
        kind: Any = model_class(config)
        wanted = dtype or getattr(config, "dtype", None) or torch.float32
        with parameters_on_meta(most, bounded=True):
            model = kind._from_config(config, dtype=wanted)
        model.tie_weights()
        keep_dtypes(model, wanted)
    except SourceError:
        raise
    except Exception as e:  # a model's constructor finds what the config's validators did not
        raise SourceError(f"transformers cannot build the model of this {type(config).__name__}: {e}") from e
    return model.eval()


def keep_dtypes(model: Any, dtype: Any) -> None:
    """Give an empty model's parameters the dtypes that `from_pretrained` gives them."""
    changed: dict[int, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, old in module._parameters.items():
            kept = None if old is None else kept_dtype(model, f"{path}.{name}".lstrip("."), dtype)
            if old is not None and (kept is not None or id(old) in changed):
                new = torch.nn.Parameter(old.detach().to(kept), requires_grad=old.requires_grad)
                module._parameters[name] = changed.setdefault(id(old), new)


def kept_dtype(model: Any, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that an architecture keeps a parameter in when the model is loaded in `dtype`; None for no other.

    T5 keeps `wo` in float32 in a float16 model, whose range its products leave.
    """
    kept = model._get_dtype_plan(dtype).items() if dtype is not None else ()
    return next((wanted for pattern, wanted in kept if re.search(pattern.replace("*", ".*"), name)), None)


def read_generation(model: Any, folder: str | Path) -> None:
    """Give a model that generates the settings that lie in its folder.

    Raises:
        SourceError: they cannot be read.
    """
    if not model.can_generate():
        return
    try:
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    except Exception as e:  # its validators raise many kinds
        raise SourceError(f"{folder}/generation_config.json: transformers refuses it: {e}") from e
