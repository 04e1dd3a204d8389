"""Opened: a checkpoint that was found, with the empty model that it fills.

There are three kinds: a transformers checkpoint, whose config builds the model; weights and a factory, for every other model;
headers alone, from which a size can be planned but nothing converted. Each is a folder, a repository of the hub, or a file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpq_convert.checkpoint.drawn import Drawn
from rpq_convert.checkpoint.extra_state import EXTRA, has_extra_state, set_extra_states
from rpq_convert.checkpoint.factories import Factory, find_factory
from rpq_convert.checkpoint.finding import find
from rpq_convert.core import description
from rpq_convert.core.spec import dtype_name
from rpq_convert.errors import SourceError
from rpq_convert.hf.model_card import Base, base_in
from rpq_convert.layers import surgery
from rpq_convert.planning.announced import refuse_config
from rpq_convert.planning.bounds import tensors_allowed
from rpq_convert.planning.quantized import refuse_parts
from rpq_convert.planning.slots import Slot, walk, walk_headers
from rpq_convert.report.schema import Dropped
from rpq_convert.running import meta
from rpq_convert.running.holders import become_held, held_elsewhere, storage_of
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.files import files_beside, files_in, refuse_links
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.names import missing, under_names, unwrapped
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.origin import Origin
from rpq_convert.storage.reader import mapped
from rpq_convert.storage.records import CARD, CONFIG
from rpq_convert.storage.remote import Remote
from rpq_convert.storage.sources import check_source, is_name, is_remote, located

DEFAULT = SourceOptions()
FILLED = "not in the checkpoint: filled as transformers fills it"


class Opened:
    """A checkpoint that was found.

    Args:
        model: its empty model; None where only headers are known.
        source: its tensors; None where a plan was made from the config alone.
        src, options: where it was found.
        config: its config.json. files: path in a new folder -> what belongs beside the weights.
        base: what a model card says of it.
        notes: for the plan to say.
    """

    def __init__(
        self, model: nn.Module | None, source: Any, src: str | Path = "", options: SourceOptions = DEFAULT, *,
        config: Mapping[str, Any] | None = None, files: Mapping[str, Path] | None = None, base: Base | None = None, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.source, self.src, self.options = model, source, src, options
        self.config, self.files, self.base, self.notes = config, files or {}, base, list(notes)
        self.remote: Remote | None = None  # where it lies, if that is elsewhere
        self.has_weights = False
        self._filled: nn.Module | None = None

    @property
    def title(self) -> str:
        """The last part of its name, whether a hub id or a path such as `.`."""
        path = Path(self.src)
        return path.resolve().name if path.exists() else path.name

    @property
    def companions(self) -> str | Path:
        """From where transformers reads its tokenizer and its processor."""
        if self.remote is None or is_name(self.src):
            return self.src
        return self.remote.fetch_beside(allow_pickle=self.options.allow_pickle)

    @property
    def origin(self) -> Origin:
        """What the weights come from."""
        where = (str(self.src), self.options.revision) if is_remote(self.src) else (None, None)
        if isinstance(self.source, Drawn):
            return Origin({self.source.config: ()}, *where)
        infos = getattr(self.source, "infos", None) or self.source.source.infos
        return Origin.of(infos.values(), *where)

    @property
    def is_drawn(self) -> bool:
        """Whether it has no weights of its own: they are drawn."""
        return isinstance(self.source, Drawn)

    def slots(self) -> tuple[Slot, ...]:
        """Return its parameters and buffers: the model's, or what tensor names and shapes suggest; and what is kept beside them."""
        if self.model is None:
            return walk_headers((i.name, i.dtype, i.shape) for i in self.source.infos.values())
        slots = walk(self.model)
        filled = getattr(self.source, "filled", ())
        slots = tuple(replace(s, view=None, reason=FILLED) if s.name in filled and not s.buffer else s for s in slots)
        infos = getattr(self.source, "infos", {})  # a state has the shape that the checkpoint gives it
        slots = tuple(
            replace(s, shape=infos[s.name].shape, dtype=infos[s.name].dtype)
            if s.name.endswith(EXTRA) and s.name in infos
            else s
            for s in slots
        )
        return slots + tuple(getattr(self.source, "extra_slots", list)())

    def kept(self) -> list[str]:
        """Return the names of tensors that are kept though the model has no place for them."""
        return [s.name for s in getattr(self.source, "extra_slots", list)()]

    def dropped(self) -> tuple[Dropped, ...]:
        """Return the tensors of the source that are left out."""
        return tuple(getattr(self.source, "dropped", tuple)())

    def fetched(self) -> Opened:
        """Return it with its weights on this machine. They are fetched now if only headers were read before."""
        return self if self.has_weights else open_checkpoint(self.src, self.options, model=self.model)

    def filled(self) -> nn.Module:
        """Return the model with its weights, mapped where files allow it; without a source it is as it came, perhaps on meta."""
        assert self.model is not None
        if self.source is None:
            return self.model
        if self._filled is None:
            factory = self.options.factory  # a copy of a model would share what its functions close over
            empty = copy.deepcopy(self.model) if factory is None else empty_from_factory(factory)
            with mapped(self.source):
                model = compute_buffers(fill(empty, self.source), factory)
            self._filled = set_extra_states(model, {**getattr(self.source, "extra", {})})
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
    """Give an empty model the weights of its checkpoint, in its own dtype, in place, and whatever else holds one."""
    held = held_elsewhere(model)
    for slot in walk(model):
        tensor = either(source, (slot.name, *slot.aliases))
        if tensor.is_floating_point() and slot.dtype.is_floating_point:
            tensor = tensor.to(slot.dtype)  # as `load_state_dict` does
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
    draw: int | None = None,
) -> Opened:
    """Find a checkpoint and pair it with its empty model.

    Args:
        src: a folder, a file, a hub id, or an address.
        options: how it is found and read.
        need: what for. `"headers"` is for a plan: a local config suffices, of a repository the headers are checked too.
        model: its empty model, where it was built before.
        draw: the seed of weights that are drawn, so that nothing but its config and what lies beside the weights is read.

    Raises:
        SourceError: nothing found, a broken file, keys that do not fit the model, an already quantized checkpoint.
    """
    src, options = located(src, options)
    check_source(src, options, weights=need == "weights" and draw is None)
    folder, repository = Path(src), None
    if is_remote(src):
        repository = find(src, (CONFIG,) if need != "weights" else (CONFIG, CARD), options)
        folder, options = repository.folder, replace(options, revision=repository.commit or None)
    refuse_links(folder)
    base = replace(
        base_in(folder, repository, options.factory), allow_pickle=options.allow_pickle, state_dict=options.state_dict
    )
    opened = Opened(model, None, src, options, base=base)
    opened.remote = repository
    has_config = (folder / CONFIG).is_file()
    is_bare = not has_config and (repository is not None or folder.is_dir() or folder.suffix == ".safetensors")
    if options.factory is not None or is_bare:
        names = repository.files if repository is not None else files_in(folder) if folder.is_dir() else {}
        refuse_config(read_json(folder / CONFIG, kinds.DENSE_CONFIG, SourceError) if has_config else {}, names, src)
        opened.source, opened.has_weights = _tensors(folder, repository, options, need)
        if has_config and opened.has_weights:
            _take_beside(opened, folder, repository)
        opened.notes += getattr(opened.source, "notes", [])
        if options.factory is not None:
            opened.model = model or empty_from_factory(options.factory)
            opened.config = read_json(folder / CONFIG, kinds.DENSE_CONFIG, SourceError) if has_config else None
            opened.source = _fitted(opened.model, opened.source)
        return opened
    if not folder.is_dir():
        raise SourceError(f"{src} is a file; give its folder, or a factory for a bare weight file")
    _open_transformers(opened, folder, repository, need, draw)
    return opened


def _open_transformers(opened: Opened, folder: Path, repository: Remote | None, need: str, draw: int | None) -> None:
    """Pair a transformers checkpoint with its model, if it had none, and account for its tensors."""
    from rpq_convert.hf import loading
    from rpq_convert.hf.module_source import ModuleSource

    names = files_in(folder) if repository is None else repository.files
    raw = read_json(folder / CONFIG, kinds.DENSE_CONFIG, SourceError)
    refuse_config(raw, names, opened.src)
    if "adapter_config.json" in names:
        raise SourceError(f"{opened.src} holds an adapter (adapter_config.json): merge it into its base and save that")
    config, named = loading.load_config(folder), raw.get("transformers_weights")
    opened.config = {k: v for k, v in raw.items() if k != "transformers_weights"}
    if draw is not None:
        _take_beside(opened, folder, repository)
        found = None
    elif need == "weights":
        _take_beside(opened, folder, repository)
        found, opened.has_weights = _tensors(folder, repository, opened.options, need, named)
    else:
        found, said = _look(folder, repository, opened.options, named)
        opened.notes += said
    if (stored := loading.stored_dtype(config, found)) is not None:
        opened.config["dtype"] = dtype_name(stored)
    if opened.model is None:
        most = tensors_allowed(None if found is None else len(found), opened.options.max_tensors)
        opened.model = loading.build_empty(config, stored, most)
    if draw is not None:
        opened.source, opened.has_weights = Drawn(opened.model, draw, folder / CONFIG), True
        opened.notes += opened.source.notes()
    if found is not None:
        opened.notes += getattr(found, "notes", [])
        at_hand = opened.has_weights or repository is None
        opened.source = ModuleSource(opened.model, unwrapped(found), at_hand=at_hand)
        opened.source.check()
        opened.notes += opened.source.notes()


def _take_beside(opened: Opened, folder: Path, repository: Remote | None) -> None:
    """Note what belongs beside the weights of a model's folder; of a repository it is fetched."""
    if repository is not None:
        repository.fetch_beside(allow_pickle=opened.options.allow_pickle)
    opened.files = files_beside(folder, allow_pickle=opened.options.allow_pickle)


def _tensors(
    folder: Path, repository: Remote | None, options: SourceOptions, need: str, named: str | None = None
) -> tuple[Any, bool]:
    """Return a checkpoint's tensors, and whether their weights are at hand; a plan needs the headers of a repository only."""
    if repository is not None:
        seen = _look(folder, repository, options, named)[0] if need == "headers" else None
        if seen is not None:
            return seen, False
        return repository.tensors(allow_pickle=options.allow_pickle, named=named, key=options.state_dict), True
    return open_folder(folder, allow_pickle=options.allow_pickle, named=named, key=options.state_dict), True


def _look(folder: Path, repository: Remote | None, options: SourceOptions, named: str | None) -> tuple[Any, list[str]]:
    """Return a checkpoint's tensors as far as a plan looks at them, if that is possible, and what will prevent a conversion."""
    if repository is not None and repository.offline:
        return None, []
    try:
        if repository is None:
            return open_folder(folder, allow_pickle=options.allow_pickle, named=named, key=options.state_dict), []
        chosen, _ = repository.weight_names(allow_pickle=options.allow_pickle, named=named)
    except SourceError as e:
        return None, [str(e)]
    return (repository.headers(named=named) if chosen[0].endswith(".safetensors") else None), []


def empty_from_factory(factory: str | Factory) -> nn.Module:
    """Build a model with parameters on meta and real buffers, from a callable or its name (factories.py).

    If the factory returns a converted model (`RPQViT`), its dense form is returned.
    """
    build = find_factory(factory)
    try:
        model = meta.build_empty(build)
    except Exception as e:  # the user's code
        raise SourceError(f"factory {factory!r} raised {type(e).__name__}: {e}") from e
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
        real = dict(find_factory(factory)().named_buffers())
        for path in empty:
            module, name = surgery.find(model, path)
            module._buffers[name] = real[path]
    return model


def _fitted(model: nn.Module, source: Any) -> Any:
    """Return a source under the model's names; refuse one that is quantized or does not fit.

    Raises:
        SourceError: tensors that are missing or unknown, of another shape, or scales and packed weights.
    """
    slots = [s for s in walk(model) if not s.name.endswith(EXTRA)]
    wanted = [(s.name, *s.aliases) for s in slots]
    source = under_names(source, wanted)
    known = {n for names in wanted for n in names}
    lacks, infos = missing(source, wanted), source.infos
    unused = [k for k in source if k not in known and not (k.endswith(EXTRA) and has_extra_state(model, k))]
    found = {s.name: (next((infos[n] for n in (s.name, *s.aliases) if n in infos), None), s) for s in slots}
    used: Any = {
        n: (i, torch.empty(s.shape, dtype=s.dtype, device="meta")) for n, (i, s) in found.items() if i is not None
    }
    refuse_parts({k: infos[k] for k in unused}, used, {n: t for n, (_, t) in used.items()}, "the checkpoint")
    if lacks or unused:
        raise SourceError(
            f"the checkpoint does not fit the model: {len(lacks)} missing ({', '.join(lacks[:3])}), "
            f"{len(unused)} unknown ({', '.join(unused[:3])})"
        )
    for name, (info, tensor) in used.items():
        description.check_dense(name, info, tensor)
    return source
