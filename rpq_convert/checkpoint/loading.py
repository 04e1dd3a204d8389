"""Load a converted folder. docs/checkpoint-format.md describes the files.

`config.json` holds `quantization_config`: the format's version and, for every RPQ weight, the description from which an
empty `RPQWeight` is rebuilt. No field names code: a transformers model is rebuilt through its own config and
transformers' own classes, any other through a factory that the caller gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rpq_convert.checkpoint.described import recall_evaluations
from rpq_convert.checkpoint.extra_state import has_extra_state, set_extra_states
from rpq_convert.checkpoint.finding import find_converted
from rpq_convert.checkpoint.opening import compute_buffers, empty_from_factory
from rpq_convert.core import description
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.errors import SourceError
from rpq_convert.layers import surgery
from rpq_convert.layers.initial import initial
from rpq_convert.layers.surgery import AFTER
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.running.holders import Held, become_held, held_elsewhere, storage_of
from rpq_convert.running.wrappers import unwrapped
from rpq_convert.storage.files import GENERATION, weight_paths
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.names import plain
from rpq_convert.storage.names import unwrapped as without_wrappers
from rpq_convert.storage.options import SourceKeywords, SourceOptions
from rpq_convert.storage.records import CONFIG, MANIFEST, REPORT
from rpq_convert.storage.sources import is_remote, located, read_config
from rpq_convert.storage.unpacking import checked
from rpq_convert.storage.verified import unchanged, verified


@keywords(SourceOptions)
def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    verify: bool | None = None,
    **source: Unpack[SourceKeywords],
) -> nn.Module:
    """Rebuild a converted model from its folder, in eval mode.

    Args:
        path: the folder, the id of a repository on the hub, or an address such as s3://bucket/folder.
        device: where to put it.
        verify: compare every tensor with its hash in the manifest, about a second for a gigabyte; by default it is, unless RPQ_VERIFY=0 is
            in the environment.
        source: fields of `SourceOptions`: `factory` builds the dense model where it is not transformers', and its weights are
            never allocated; `revision`, `token`, `local_files_only` are for a repository.

    Raises:
        SourceError: not an RPQ folder, a newer format, missing or unexpected tensors, a damaged one, or a folder that was replaced while
            it was read.
    """
    (options,) = take(source, SourceOptions)
    path, options = located(path, options)
    factory = options.factory
    if is_remote(path):
        found = find_converted(path, (GENERATION, MANIFEST, REPORT), options)
        folder = found.folder
        model = _read(folder, found.tensors(), factory, verify)
    else:
        folder = Path(path)
        read_config(folder)  # raises where it is none
        with unchanged([folder / CONFIG, *weight_paths(folder)[0]]):
            model = _read(folder, open_folder(folder), factory, verify)
    for act in AFTER:
        act(model)
    recall_evaluations(model, folder)
    return model.to(device) if device is not None else model


def _read(folder: Path, tensors: Any, factory: Any, verify: bool | None) -> nn.Module:
    """Return the model of a folder.

    Args:
        folder: what lies beside its weights. tensors: the weights.
    """
    config = read_config(folder)
    if factory is not None:
        model = empty_from_factory(factory)
    elif "model_type" in config:
        from rpq_convert.hf import loading

        plain = loading.load_config(folder)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        model = loading.build_empty(plain)
    else:
        raise SourceError(
            f"{folder} is not a transformers model: pass factory=, the function that builds the dense model"
        )
    with unwrapped(model) as inside:
        fill(inside, config["quantization_config"], without_wrappers(verified(tensors, folder, verify)))
    compute_buffers(model, factory)
    if hasattr(model, "generation_config") and (folder / GENERATION).is_file():
        from rpq_convert.hf import loading

        loading.read_generation(model, folder)
    return model


def fill(model: nn.Module, config: Mapping[str, Any], source: Any) -> None:
    """Give an empty model its RPQ weights and dense tensors."""
    contents = description.read_all(config).renamed(plain)
    source = checked(source, contents)
    tied = contents.aliases()
    if contents.extra:
        model._rpq_extra = dict.fromkeys(contents.extra, source)  # type: ignore[assignment]  # what `save` keeps, unread till then
    used = {*contents.extra, *(k for k in source if contents.is_guard(k, source.infos[k]))}
    _untie(model, contents, source)
    for name, what in contents.modules.items():
        paths = (name, *tied.get(name, []))
        for path in paths:
            description.check_place(path, what, surgery.parameter_at(model, path))
        surgery.places(model, paths).install(RPQWeight.of(what, "meta"))
    homes: dict[int, tuple[Tensor, list[tuple[nn.Module, str, bool]], str]] = {}
    for path, module in model.named_modules():
        for table, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, value in table.items():
                if value is not None and not (is_buffer and key in module._non_persistent_buffers_set):
                    full = f"{path}.{key}".lstrip(".")
                    homes.setdefault(id(value), (value, [], full))[1].append((module, key, is_buffer))
    missing: list[str] = []
    held = held_elsewhere(model)
    for value, places, full in homes.values():
        stem, parted, part = full.rpartition("_rpq.") if "_rpq." in full else (full, "", "")
        names = [name + parted + part for name in (stem, contents.tied.get(stem, stem), *tied.get(stem, []))]
        key = next((n for n in names if n in source), None)
        if key is None and fills_itself(model, full):
            _put(places, initial(model, full), value, held)
            continue
        if key is None:
            missing.append(full)
            continue
        used.add(key)
        description.check_dense(key, source.infos[key], value)
        _put(places, source[key], value, held)
    states = {k: source[k] for k in source if k not in used and has_extra_state(model, k)}
    set_extra_states(model, {**states, **contents.extra_state})
    unused = [k for k in source if k not in used and k not in states]
    if missing or unused:
        raise SourceError(
            f"the checkpoint does not fit the model: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unused)} unexpected ({', '.join(unused[:3])})"
        )
    for module in model.modules():
        if isinstance(module, RPQWeight):
            module.guard()
            module._probe = torch.empty(0, dtype=module.dtype, device=module.codes.device)


def fills_itself(model: nn.Module, name: str) -> bool:
    """Return whether a transformers model's class makes a tensor that files need not hold, such as a table of positions."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _put(
    places: list[tuple[nn.Module, str, bool]], tensor: Tensor, instead_of: Tensor, held: Mapping[int, Sequence[Held]]
) -> None:
    filled: Any = tensor if places[0][2] else nn.Parameter(tensor, requires_grad=instead_of.requires_grad)
    filled = become_held(instead_of, filled, held.get(storage_of(instead_of), ()))
    for module, key, is_buffer in places:
        (module._buffers if is_buffer else module._parameters)[key] = filled


def _untie(model: nn.Module, contents: description.Contents, source: Any) -> None:
    """Give names that the model ties, and that the folder holds apart, a parameter each."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        own = [
            n
            for n in names
            if n not in contents.tied
            and (n in contents.modules or (n in source and not contents.is_guard(n, source.infos[n])))
        ]
        for name in own[1:]:
            module, key = surgery.find(model, name)
            shared: Any = module._parameters[key]
            module._parameters[key] = nn.Parameter(torch.empty_like(shared), requires_grad=shared.requires_grad)
