"""Placing: the RPQ weights of a folder in the empty model that transformers is about to fill.

The folder was written from one class and may be read by another: names have other prefixes, transformers renames some, and a tied
tensor may lie in the files under a name that this class does not have. So every weight is looked for under all of its names, by
transformers' own renaming, and its tensors are sent to where it was found (`ToPlaces`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rpq_convert.core import description
from rpq_convert.core.description import Contents, Described
from rpq_convert.errors import SourceError
from rpq_convert.hf.loading import kept_dtype
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.slots import home_first
from rpq_convert.storage.names import plain
from rpq_convert.storage.reader import read_header
from rpq_convert.storage.sources import read_config

GUARD = "rpq.guard"  # where the empty tensors go that stop a loader which does not know RPQ


class ToPlaces(WeightRenaming):
    """A renaming of transformers' loading, of exact names: the tensors of RPQ weights to their places, guards out of the way."""

    def __init__(self, table: Mapping[str, str]) -> None:
        super().__init__("^$", "")
        self.table = table

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the new name; never a pattern that matched, which transformers would undo when it saves."""
        return self.table.get(source_key, source_key), None


@dataclass
class Placed:
    """Where the RPQ weights of a folder went in one model.

    Args:
        homes: name in the files -> first path in the model.
        dense: names in the files of what is not converted -> path in the model.
    """

    homes: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    def renaming(self, contents: Contents, transforms: list[Any], model: Any) -> ToPlaces:
        """Return what sends the tensors of the files to their places, after transformers' own renamings."""
        names, wanted = _Names(model, transforms), dict(self.dense)
        for name, home in self.homes.items():
            parts = contents.modules[contents.tied.get(name, name)].stored
            wanted |= {f"{name}_rpq.{part}": f"{home}_rpq.{part}" for part in parts}
        table = {names.renamed(name): GUARD for name in contents.modules}
        return ToPlaces(table | {names.renamed(k): path for k, path in wanted.items() if names.of(k) != path})


class _Names:
    """The name that transformers gives to a key of a checkpoint in this model.

    Args:
        keys: all names in the files; with them, the model may also be a part of the one that was saved.
    """

    def __init__(self, model: Any, transforms: list[Any], keys: Collection[str] = ()) -> None:
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.prefix, self.state = model.base_model_prefix, model.state_dict()
        self.own, self.whole = _part_of(keys, self.state)

    def of(self, key: str) -> str:
        found, _ = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if found not in self.state and key in self.state:
            found, _ = rename_source_key(key, [], [], self.prefix, self.state)
        return found

    def place(self, key: str) -> str | None:
        """Return the tensor of the model that a key stands for, with the base model's prefix or without it; None for none."""
        prefix = f"{self.prefix}." if self.prefix else ""
        part = self.own + key.removeprefix(self.whole)
        candidates = (self.of(key), key, key.removeprefix(prefix), prefix + key, part, plain(key))
        return next((path for path in candidates if path in self.state), None)

    def renamed(self, key: str) -> str:
        """Return it as it is before the base model's prefix is added or removed."""
        return rename_source_key(key, self.renamings, self.converters)[0]


def _part_of(keys: Collection[str], state: Collection[str]) -> tuple[str, str]:
    """Return what stands before the tensors of a model here, and in the files of a whole that it is a part of; empty texts for no such.

    transformers knows such a part by older names of the whole (`model.layers` of Qwen2-VL is `model.language_model.layers` now).
    A head may lie elsewhere.
    """
    first = next(iter(state), "")
    for own in ("", first.partition(".")[0] + "."):
        inner = [path.removeprefix(own) for path in state if path.startswith(own)]
        found = [key.removesuffix(inner[0]) for key in keys if inner and key.endswith("." + inner[0])]
        whole = [prefix for prefix in found if all(prefix + path in keys for path in inner)]
        if len(whole) == 1:
            return own, whole[0]
    return "", ""


def contents_of(stored: Mapping[str, Any], files: list[Any]) -> Contents:
    """Return the description of RPQ weights: what a config says, or what the config of the whole says beside the weight files."""
    if stored["modules"] is not None:
        return description.read_all(stored)
    if not files:
        raise SourceError("this config is of a part of a converted model; load it from the folder of the whole")
    return description.read_all(read_config(Path(files[0]).parent)["quantization_config"])


def place(model: Any, contents: Contents, files: list[Any], *, resized: bool) -> Placed:
    """Install empty RPQ weights in an empty model.

    Args:
        files: the weight files that will be read.
        resized: leave a weight of another shape than the model's dense, to be made anew (`ignore_mismatched_sizes`).

    Raises:
        SourceError: a description that does not fit the model or the files, or files that have nothing for the model.
    """
    infos = {k: i for f in files if str(f).endswith(".safetensors") for k, i in read_header(f).items()}
    keys, aliases = {*infos, *contents.modules, *contents.tied}, contents.aliases()
    names = _Names(model, get_model_conversion_mapping(model), keys)
    dense = {k: names.place(k) for k, i in infos.items() if not contents.is_guard(k, i)}
    found = Placed(dense={k: path for k, path in dense.items() if path is not None})
    tied = dict(model.all_tied_weights_keys)
    groups: dict[str, list[str]] = {}
    for name, what in contents.modules.items():
        places = (names.place(n) for n in (name, *aliases.get(name, ())))
        paths = list(home_first((p for p in places if p is not None), set(tied)))
        paths = [p for p in paths if p == paths[0] or tied.get(p) not in paths]  # the others follow by `_tie`
        if not paths:
            continue  # a head that a base model does not have
        if resized and any(tuple(surgery.parameter_at(model, p).shape) != what.shape for p in paths):  # type: ignore[union-attr]
            continue
        for path in paths:
            description.check_place(path, what, surgery.parameter_at(model, path), type(model).__name__)
        held = next((n for n in (name, *aliases.get(name, ())) if f"{n}_rpq.codebooks" in infos), name)
        if infos and (wrong := description.misfit(what.stored, description.of_weight(held, infos))):
            raise SourceError(f"{name}_rpq.{wrong}")
        _install(model, paths, what)
        found.homes[held] = paths[0]
        groups[paths[0]] = paths[1:]
    if contents.modules and not groups and not found.dense:
        raise SourceError(f"no weight of the checkpoint has a place in {type(model).__name__}")
    model.all_tied_weights_keys = _tie(model, groups, set(found.dense.values()))
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*ignored, "^" + GUARD.replace(".", r"\.") + "$"}
    return found


def _install(model: Any, paths: list[str], what: Described) -> None:
    given: Any = surgery.parameter_at(model, paths[0])
    wanted = kept_dtype(model, paths[0], model.config.dtype) or given.dtype
    weight = RPQWeight.of(replace(what, dtype=wanted), "meta")
    weight.unguard(what.stored)
    surgery.places(model, paths).install(weight)


def _tie(model: Any, groups: dict[str, list[str]], dense: set[str]) -> dict[str, str]:
    """Share RPQ weights with the names that transformers ties to them; return the ties as its loading then needs them.

    Args:
        groups: first path -> other paths, of every weight that was installed; gains what is tied to them.
        dense: parameters whose dense values are in the files, such as a head that was restored and is its own now.
    """
    together: dict[str, list[str]] = {}
    for alias, source in model.all_tied_weights_keys.items():
        together.setdefault(source, [source]).append(alias)
    ties: dict[str, str] = {}
    for source, shared in together.items():
        old = next((path for path in shared if is_computed(model, path)), None)
        if old is None:
            ties |= dict.fromkeys(shared[1:], source)
            continue
        home = next(first for first, others in groups.items() if old in (first, *others))
        new = [path for path in shared if path not in dense and not is_computed(model, path)]
        surgery.places(model, new).install(surgery.layers_of(model)[home])
        groups[home] += new
    for home, others in groups.items():
        parts = surgery.layers_of(model)[home].state_dict()
        ties |= {f"{other}_rpq.{p}": f"{home}_rpq.{p}" for other in others for p in parts}
    return ties


def is_computed(model: nn.Module, path: str) -> bool:
    """Say whether the parameter at this path of the model is an RPQ weight."""
    try:
        module, name = surgery.find(model, path)
    except AttributeError:
        return False
    return surgery.is_rpq(module, name)
