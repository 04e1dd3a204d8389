"""Opened: a checkpoint that was found, with the empty model that it fills.

There are three kinds: a transformers checkpoint, whose config builds the model; weights and a factory, for every other model;
headers alone, from which a size can be planned but nothing converted. Each is a folder, a repository of the hub, or a file.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpq_convert.core.spec import dtype_name
from rpq_convert.errors import SourceError
from rpq_convert.hf import hub
from rpq_convert.hf.model_card import Base, base_in
from rpq_convert.layers import surgery
from rpq_convert.planning.holders import become_held, held_elsewhere, storage_of
from rpq_convert.planning.slots import Slot, walk, walk_headers
from rpq_convert.running.meta import parameters_on_meta
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.reader import open_folder, refuse_links, weight_files
from rpq_convert.storage.writer import CARD, CONFIG

Factory = Callable[[], nn.Module]
DEFAULT = SourceOptions()


class Opened:
    """A checkpoint that was found.

    Args:
        model: its empty model; None where only headers are known.
        source: its tensors; None where a plan was made from the config alone.
        src, options: where it was found.
        config: its config.json. files: what belongs beside the weights.
        base: what a model card says of it.
        notes: for the plan to say.
    """

    def __init__(
        self, model: nn.Module | None, source: Any, src: str | Path = "", options: SourceOptions = DEFAULT, *,
        config: Mapping[str, Any] | None = None, files: Sequence[Path] = (), base: Base | None = None, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.source, self.src, self.options = model, source, src, options
        self.config, self.files, self.base, self.notes = config, files, base, notes
        self.has_weights = False
        self._filled: nn.Module | None = None

    @property
    def title(self) -> str:
        """The last part of its name, whether a hub id or a path such as `.`."""
        path = Path(self.src)
        return path.resolve().name if path.exists() else path.name

    @property
    def origin(self) -> str:
        """What the weights come from, as text: the name, size and time of every file."""
        infos = getattr(self.source, "infos", None) or self.source.source.infos
        files = sorted({i.file for i in infos.values()})
        facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return json.dumps(facts, indent=1)

    def slots(self) -> tuple[Slot, ...]:
        """Return its parameters and buffers: the model's, or what tensor names and shapes suggest."""
        if self.model is not None:
            return walk(self.model)
        return walk_headers((i.name, i.dtype, i.shape) for i in self.source.infos.values())

    def fetched(self) -> Opened:
        """Return it with its weights on this machine. They are fetched now if only headers were read before."""
        return self if self.has_weights else open_checkpoint(self.src, self.options, model=self.model)

    def filled(self) -> nn.Module:
        """Return the model with its weights, read once; without a source it is as it came, perhaps on meta."""
        assert self.model is not None
        if self.source is None:
            return self.model
        if self._filled is None:
            factory = self.options.factory  # a copy of a model would share what its functions close over
            empty = copy.deepcopy(self.model) if factory is None else empty_from_factory(factory)
            self._filled = compute_buffers(fill(empty, self.source), factory)
        return self._filled

    def give_filled(self) -> nn.Module:
        """Return `filled()` to a caller who changes it, and keep it no longer."""
        model = self.filled()
        self.drop_filled()
        return model

    def drop_filled(self) -> None:
        """Free the weights that `filled()` keeps."""
        self._filled = None


def fill(model: nn.Module, source: Mapping[str, Tensor]) -> nn.Module:
    """Give an empty model the weights of its checkpoint, in place, and whatever else holds one."""
    held = held_elsewhere(model)
    for slot in walk(model):
        tensor = either(source, (slot.name, *slot.aliases))
        filled: Any = tensor if slot.buffer else nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for path in (slot.name, *slot.aliases):
            module, name = surgery.find(model, path)
            table: Any = module._buffers if slot.buffer else module._parameters
            if (empty := table[name]) is not filled:
                table[name] = filled = become_held(empty, filled, held.get(storage_of(empty), ()))
    return model


def either(source: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """Return the tensor that a source has under one of these names."""
    return source[next((n for n in names if n in source), names[0])]


def open_checkpoint(
    src: str | Path,
    options: SourceOptions = DEFAULT,
    *,
    need: Literal["headers", "weights"] = "weights",
    model: nn.Module | None = None,
) -> Opened:
    """Find a checkpoint and pair it with its empty model.

    Args:
        src: a folder, a file or a hub id.
        options: how it is found and read.
        need: what for. `"headers"` is for a plan: a local config suffices, of a repository the headers are checked too.
        model: its empty model, where it was built before.

    Raises:
        SourceError: nothing found, a broken file, keys that do not fit the model, an already quantized checkpoint.
    """
    folder, repository = Path(src), None
    if hub.is_name(src):
        wanted = (CONFIG,) if need != "weights" else (CONFIG, CARD, *(() if options.factory else _small()))
        repository = hub.find(src, wanted, options)
        folder, options = repository.folder, replace(options, revision=repository.commit)
    refuse_links(folder)
    base = base_in(folder, repository, options.factory)
    opened = Opened(model, None, src, options, base=base)
    has_config = (folder / CONFIG).is_file()
    is_bare = not has_config and (repository is not None or folder.is_dir() or folder.suffix == ".safetensors")
    if options.factory is not None or is_bare:
        opened.source, opened.has_weights = _tensors(folder, repository, options, need)
        if options.factory is not None:
            opened.model = model or empty_from_factory(options.factory)
            opened.config = read_json(folder / CONFIG, kinds.DENSE_CONFIG, SourceError) if has_config else None
            _check(opened.model, opened.source)
        return opened
    if not folder.is_dir():
        what = (
            "is a file; give its folder, or a factory for a bare weight file" if folder.exists() else "does not exist"
        )
        raise SourceError(f"{src} {what}")
    from rpq_convert.hf import loading

    config = loading.load_config(folder)
    opened.config = read_json(folder / CONFIG, kinds.DENSE_CONFIG, SourceError)
    method = (opened.config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise SourceError(f"{src} is quantized already ({method}); start from the original weights")
    opened.files = loading.extra_files(folder)
    if need == "weights":
        found, opened.has_weights = _tensors(folder, repository, options, need)
    else:
        found, opened.notes = _look(repository, options.allow_pickle)
    stored = loading.stored_dtype(config, found, folder)
    if stored is not None:
        opened.config = {**opened.config, "dtype": dtype_name(stored)}
    opened.model = model or loading.build_empty(config, stored)
    if found is not None:
        opened.source = loading.ModuleSource(opened.model, found)
        opened.source.check()
    return opened


def _tensors(folder: Path, repository: hub.Repository | None, options: SourceOptions, need: str) -> tuple[Any, bool]:
    """Return a checkpoint's tensors, and whether their weights are at hand; a plan needs the headers of a repository only."""
    seen = _look(repository, options.allow_pickle)[0] if need == "headers" else None
    if seen is not None:
        return seen, False
    if repository is not None:
        repository.fetch_weights(allow_pickle=options.allow_pickle)
    return open_folder(folder, allow_pickle=options.allow_pickle), True


def _look(repository: hub.Repository | None, allow_pickle: bool) -> tuple[Any, list[str]]:
    """Return a repository's headers, if they can be read remotely, and what will prevent a conversion."""
    if repository is None or repository.offline:
        return None, []
    try:
        chosen = weight_files(repository.files, repository.name, allow_pickle=allow_pickle)
    except SourceError as e:
        return None, [str(e)]
    return (repository.headers() if "safetensors" in chosen[0] else None), []


def _small() -> tuple[str, ...]:
    from rpq_convert.hf.loading import SMALL

    return SMALL


def empty_from_factory(factory: str | Factory) -> nn.Module:
    """Build a model with parameters on meta and real buffers, from a callable or `"package.module:callable"`.

    If the factory returns a converted model (`RPQViT`), its dense form is returned.
    """
    build = _callable(factory)
    with parameters_on_meta():
        model = build()
    if not isinstance(model, nn.Module):
        raise SourceError(f"factory {factory!r} returned {type(model).__name__}, not a module")
    for weight, places in surgery.places_of(model).items():
        places.remove(nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta")))
    return model.eval()


def compute_buffers(model: nn.Module, factory: str | Factory | None) -> nn.Module:
    """Give a model the buffers that no checkpoint holds and that an empty model cannot compute, in place.

    timm's Swin computes its masks on the device of a parameter, which is meta in an empty model. A real model is built once
    for them and dropped. Only during this time do its dense weights take memory.
    """
    empty = [n for n, b in model.named_buffers() if b.is_meta]
    if empty and factory is not None:
        real = dict(_callable(factory)().named_buffers())
        for path in empty:
            module, name = surgery.find(model, path)
            module._buffers[name] = real[path]
    return model


def _callable(factory: str | Factory) -> Factory:
    told = factory
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError) as e:
            raise SourceError(f"factory {factory!r}: {e}; write it as package.module:callable") from None
    if not callable(factory):
        raise SourceError(f"factory {told!r} is not callable; write it as package.module:callable")
    return factory


def _check(model: nn.Module, source: Any) -> None:
    """Refuse a source whose names are not the model's."""
    slots = walk(model)
    known = {n for s in slots for n in (s.name, *s.aliases)}
    missing = [s.name for s in slots if not any(n in source for n in (s.name, *s.aliases))]
    unused = [k for k in source if k not in known]
    if missing or unused:
        raise SourceError(
            f"the checkpoint does not fit the model: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unused)} unknown ({', '.join(unused[:3])})"
        )
