"""transformers checkpoints: build their model empty, read their tensors under the model's names.

Checkpoint keys are not module names: prefixes differ, old names remain, and mixture-of-experts files keep one tensor per expert
where the model has one fused parameter. transformers knows the mapping (`get_model_conversion_mapping`). Its own rename and
conversion steps run here for one parameter at a time, so nothing larger is in memory. No code of a checkpoint is ever run:
classes come from transformers itself.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpq_convert.errors import SourceError
from rpq_convert.hf import torchvision
from rpq_convert.running.meta import parameters_on_meta
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.reader import read_header, refuse_links

torchvision.fix()

import transformers  # noqa: E402
from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: E402
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key  # noqa: E402
from transformers.utils.loading_report import LoadStateDictInfo  # noqa: E402

SMALL = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template*", "*.model",
    "spiece.model", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "LICENSE*", "README.base.md",
)  # fmt: skip


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
    """Return the class that `config.architectures` names: transformers' own, or one that the user registered with it."""
    for named in config.architectures or ():
        name = named.removeprefix("FSDP")
        for found in (getattr(transformers, name, None), *_registered(config), getattr(_home(config), name, None)):
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.__name__ == name:
                return found
        raise SourceError(
            f"transformers {transformers.__version__} has no model class {name!r}; register your own "
            "(AutoModel.register), or give factory=package:callable"
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


def copy_code(model: Any, folder: Path) -> dict[str, Any]:
    """Copy the files that define a model of the user's or a repository's own code, as `save_pretrained` does.

    Nothing is copied, and nothing said, for other models. No code is run: the model was made of it.

    Returns:
        What config.json says of them: the fields with which `from_pretrained(…, trust_remote_code=True)` finds the code.
    """
    if not (isinstance(model, transformers.PreTrainedModel) and model.is_remote_code()):
        return {}
    for own in (model, model.config):
        if own._auto_class is not None:
            transformers.dynamic_module_utils.custom_object_save(own, folder, config=model.config)  # type: ignore[arg-type]
    return {"auto_map": model.config.auto_map}


def stored_dtype(config: Any, source: Any, folder: Path) -> torch.dtype | None:
    """Return the dtype that transformers loads a checkpoint in whose config names none: that of its first floating-point tensor.

    Args:
        source: its tensors or their headers; None to read them from its folder, if there are any.

    Returns:
        None where the config names a dtype, or there is nothing to go by.
    """
    if getattr(config, "dtype", None) is not None:
        return None
    files = [] if source is not None else sorted(folder.glob("model*.safetensors"))[:1]
    infos = [i for f in files for i in read_header(f).values()] if source is None else source.infos.values()
    first = sorted(infos, key=lambda i: (i.file.name, i.name))
    return next(
        (i.dtype for i in first if i.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)), None
    )


def build_empty(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the model with its parameters on meta and its buffers real, in eval mode."""
    try:
        kind: Any = model_class(config)
        wanted = dtype or getattr(config, "dtype", None) or torch.float32
        with parameters_on_meta():
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


class ModuleSource(Mapping[str, Tensor]):
    """A checkpoint's tensors under the names of the model's state dict, renamed and converted one parameter at a time.

    Args:
        model: the empty model.
        source: checkpoint key -> tensor.
    """

    def __init__(self, model: Any, source: Mapping[str, Tensor]) -> None:
        self.model, self.source = model, source
        state = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix = model.base_model_prefix
        groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        self.unused: list[str] = []
        for key in sorted(source, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
            if name not in state:
                self.unused.append(key)
            elif pattern is not None:
                groups.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern))
            else:
                groups.setdefault(name, (WeightRenaming(key, name), []))[1].append((key, key))
        self.plans: dict[str, tuple[str, Any, list[tuple[str, str]]]] = {}
        for first, (transform, parts) in groups.items():
            names = (
                [first] if type(transform) is WeightRenaming else list(self._run(first, transform, parts, shapes=True))
            )
            self.plans |= {n: (first, transform, parts) for n in names if n in state}
        for names in self._tied():
            home = next((n for n in names if n in self.plans), None)
            if home:
                self.plans |= {
                    n: self.plans[home] if n == home else ("", home, []) for n in names if n not in self.plans
                }
        self.unresolved = [n for n in state if n not in self.plans]

    def _tied(self) -> list[list[str]]:
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        return [g for g in groups.values() if len(g) > 1]

    def _run(self, first: str, transform: Any, parts: list[tuple[str, str]], *, shapes: bool) -> dict[str, Any]:
        """Run one conversion; with `shapes` on meta tensors, to learn its names."""
        transform = deepcopy(transform)
        for key, pattern in parts:
            transform.add_tensor(first, key, pattern, partial(self._meta if shapes else self.source.__getitem__, key))
        info = LoadStateDictInfo(
            missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), conversion_errors={}, error_msgs=[],
            skipped_pp_keys=set(),
        )  # fmt: skip
        out = transform.convert(first, model=self.model, config=self.model.config, loading_info=info)
        if info.conversion_errors:
            raise SourceError(f"{first}: {next(iter(info.conversion_errors.values()))}")
        return {n: v[0] if isinstance(v, list) else v for n, v in out.items()}

    def _meta(self, key: str) -> Tensor:
        info = self.source.infos[key]  # type: ignore[attr-defined]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def check(self) -> None:
        """Raise before the first tensor is read if the checkpoint does not fill the model."""
        if self.unresolved:
            raise SourceError(
                f"the checkpoint has no tensor for {len(self.unresolved)} of {type(self.model).__name__}'s: "
                f"{', '.join(self.unresolved[:4])}; convert the architecture that the checkpoint was saved from"
            )

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __contains__(self, name: object) -> bool:
        return name in self.plans

    def __getitem__(self, name: str) -> Tensor:
        first, transform, parts = self.plans[name]
        if not first:
            return self[transform]
        return self._run(first, transform, parts, shapes=False)[name]


def extra_files(folder: str | Path) -> list[Path]:
    """Return the small files that a folder needs beside its weights: tokenizer, generation settings, processors. Never code."""
    refuse_links(folder)
    found = {p for pattern in SMALL for p in Path(folder).glob(pattern) if p.is_file()}
    return sorted(p for p in found if p.suffix != ".py" and "safetensors" not in p.name)
