"""Save a converted model to a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.checkpoint.described import evaluations_of, facts_of, plan_of
from rpq_convert.checkpoint.extra_state import plain_states
from rpq_convert.checkpoint.metadata import write_rest
from rpq_convert.core import description
from rpq_convert.core.keywords import keywords
from rpq_convert.core.results import MEASURED, Encoded
from rpq_convert.core.spec import dtype_name
from rpq_convert.errors import SourceError
from rpq_convert.hf.model_card import Base, base_of
from rpq_convert.layers import surgery
from rpq_convert.planning import layer_types
from rpq_convert.planning.plan import Skip
from rpq_convert.planning.planner import warnings_of
from rpq_convert.planning.slots import EXTRA, extra_states
from rpq_convert.report.schema import Report
from rpq_convert.running.offload import is_hooked, onloaded
from rpq_convert.running.wrappers import unwrapped
from rpq_convert.storage.delivery import delivered
from rpq_convert.storage.files import GENERATION, files_beside, named_files
from rpq_convert.storage.records import CONFIG
from rpq_convert.storage.writer import Folder


@keywords()
def save(
    model: nn.Module,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
    files: Mapping[str, Path] | Sequence[Path] | str | Path = (),
    base: Base | None = None,
) -> Report:
    """Write a converted model to a folder; the same bytes as the streaming conversion would write.

    Args:
        out: the folder to make, or its address, such as s3://bucket/folder.
        overwrite: replace `out`.
        max_shard_size: of a weight file, e.g. `"5GB"`.
        files: to copy beside the weights: a list of them; path in the new folder -> file; or a folder, of which what belongs beside
            weights is taken. A transformers model's generation settings are written without being asked for.
        base: what the model was converted from, for the model card; by default what transformers knows.

    Raises:
        SourceError: the model has no RPQ weight, or holds what cannot be written (a sparse buffer, an extra state that is neither a
            tensor nor JSON values); a file that is not there, or whose path leaves the folder.
        FolderError: the folder already exists.
    """
    with (
        delivered(out, overwrite=overwrite) as place,
        unwrapped(model) as inside,
        _at_the_root(inside) as (root, beside),
    ):
        return _save(root, place, overwrite, max_shard_size, beside | named_files(files), base)


@contextmanager
def _at_the_root(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Path]]]:
    """Give the model whose weights a folder holds, and what belongs beside them.

    sentence-transformers keeps a model of transformers in the folder itself, and its other modules in subfolders.
    """
    if not any(kind.__module__.startswith("sentence_transformers.") for kind in type(model).__mro__):
        yield model, {}
        return
    from rpq_convert.hf.loading import is_pretrained

    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)  # type: ignore[operator]
        root = next(filter(is_pretrained, model.modules()), None)
        if root is None or not Path(place, CONFIG).is_file():
            raise SourceError(
                f"{type(model).__name__} keeps no model in the folder itself: save it with its save_pretrained"
            )
        yield root, files_beside(place)


def _save(
    model: nn.Module,
    out: str | Path,
    overwrite: bool,
    max_shard_size: str | int | None,
    beside: dict[str, Path],
    base: Base | None,
) -> Report:
    plan = plan_of(model, max_shard_size)
    if not plan.jobs:
        why = warnings_of(plan)[0] if plan.options else "convert it first"
        raise SourceError(f"{type(model).__name__} has no RPQ weight; {why}")
    state = _state(model)
    states = plain_states(model)
    found = surgery.layers_of(model)
    for name, rpq in found.items():
        expected = rpq.spec.tensors(rpq.view, rpq.shape)
        if wrong := description.misplaced(expected, rpq.positions, rpq.layout.inputs):
            raise SourceError(f"{name}: {wrong}; convert the model again")
    extra: Mapping[str, Mapping[str, Tensor]] = getattr(model, "_rpq_extra", {})
    plan = replace(plan, skips=(*plan.skips, *_extra_skips(extra, type(model).__name__)))
    folder = Folder(out, plan, overwrite=overwrite)
    facts = facts_of(model)
    for job in plan.jobs:
        rpq, record = found[job.name], facts[job.name]
        with onloaded(rpq):
            tensors = {k: t.cpu().contiguous() for k, t in rpq.stored().items()}
        measured = {k: record[k] for k in MEASURED if k in record}
        folder.pieces.put(job, Encoded(job.name, tensors, zero_row=rpq.zero_row, **measured))

    def tensor(name: str) -> Tensor:
        if name in extra:
            return extra[name][name]
        module, key = surgery.find(model, name)
        with onloaded(module):
            return {**module._parameters, **module._buffers}[key] if is_hooked(module) and key != EXTRA else state[name]  # type: ignore[return-value]

    folder.write_weights(tensor)
    folder.copy(beside)
    generation: Any = getattr(model, "generation_config", None)
    if GENERATION not in beside and hasattr(generation, "to_json_string") and model.can_generate():  # type: ignore[operator]
        folder.write(GENERATION, generation.to_json_string())
    config = _config_of(model, folder.work)
    if base is None and config is not None:
        base = base_of(str(getattr(model, "name_or_path", "")))
    return write_rest(
        folder, config, facts, type(model).__name__, base, extra=[*extra], extra_state=states, evaluations=evaluations_of(model)
    )  # fmt: skip


def _extra_skips(extra: Mapping[str, Any], kind: str) -> list[Skip]:
    """Return what is kept of the folder that the model was loaded from, though the model has no place for it."""
    infos = {name: source.infos[name] for name, source in extra.items()}
    why = f"{kind} has no place for it; kept as it is"
    return [Skip(n, (), "", tuple(i.shape), dtype_name(i.dtype), why) for n, i in infos.items()]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a model under each of its names; one that no file can hold is refused."""
    states = {n: t for n, t in extra_states(model).items() if isinstance(t, Tensor)}
    state = {
        **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False)), **states,
    }  # fmt: skip
    for name, tensor in state.items():
        if tensor.layout is not torch.strided and name in model.state_dict():
            raise SourceError(
                f"{name} is sparse ({tensor.layout}), which safetensors cannot hold; make it dense, or not persistent"
            )
    return state


def _config_of(model: nn.Module, folder: Path) -> dict[str, Any] | None:
    """Return a transformers model's config as JSON values, its own code copied to the folder; or None for another model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    from rpq_convert.hf.loading import copy_code

    data = json.loads(config.to_json_string(use_diff=True))
    return data | {"architectures": [layer_types.original_class(model).__name__]} | copy_code(model, folder)
