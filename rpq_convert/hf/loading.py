"""transformers checkpoints: read their config, build their model empty.

No code of a checkpoint is ever run: classes come from transformers itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rpq_convert.errors import SourceError
from rpq_convert.hf import torchvision
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
        raise SourceError(f"{path}: model type {kind!r}: {hint}; for your own model give factory=package:callable")
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
    """Return the class that `config.architectures` names, from transformers itself."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        raise SourceError(f"transformers {transformers.__version__} has no model class {name!r}")
    try:
        found = transformers.MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    except KeyError:
        raise SourceError(f"config {type(config).__name__} names no architecture") from None


def build_empty(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the model with its parameters on meta and its buffers real, in eval mode."""
    try:
        kind: Any = model_class(config)
        wanted = dtype or getattr(config, "dtype", None) or torch.float32
        with parameters_on_meta():
            model = kind._from_config(config, dtype=wanted)
        model.tie_weights()
    except SourceError:
        raise
    except Exception as e:  # a model's constructor finds what the config's validators did not
        raise SourceError(f"transformers cannot build the model of this {type(config).__name__}: {e}") from e
    return model.eval()


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
