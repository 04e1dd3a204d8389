"""Write a dense checkpoint from a converted folder, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from rpq_convert.checkpoint.verifying import here
from rpq_convert.core import description
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import take
from rpq_convert.core.spec import dtype_name
from rpq_convert.errors import SourceError
from rpq_convert.hf.composite import without_description
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.plan import Plan, Skip
from rpq_convert.running.progress import Progress
from rpq_convert.storage.delivery import delivered
from rpq_convert.storage.files import files_beside
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.options import HubKeywords, HubOptions
from rpq_convert.storage.origin import Origin
from rpq_convert.storage.records import CONFIG
from rpq_convert.storage.room import check_apart
from rpq_convert.storage.sources import read_config
from rpq_convert.storage.unpacking import checked
from rpq_convert.storage.verified import verified
from rpq_convert.storage.writer import Folder


@keywords(HubOptions)
def restore_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    progress: Progress | None = None,
    **hub: Unpack[HubKeywords],
) -> Plan:
    """Write a plain dense checkpoint from an RPQ folder, one tensor in memory at a time. A killed run goes on with the next weight file.

    Args:
        path: the folder, the id of a repository on the hub, or an address, which is then fetched; `hub` as for `audit`.
        out: the folder to make, or its address.
        progress: called with a tensor's name, and the bytes that are done and that there are.
    """
    from rpq_convert.core.sizes import parse_size

    (options,) = take(hub, HubOptions)
    with delivered(out, overwrite=overwrite) as place:
        check_apart(path, place)
        return _restore(here(path, options), place, parse_size(max_shard_size), progress, overwrite=overwrite)


def _restore(folder: Path, out: str | Path, shard: int, progress: Progress | None, *, overwrite: bool) -> Plan:
    config = read_config(folder)
    contents = description.read_all(config["quantization_config"])
    stored = verified(open_folder(folder), folder)
    source = checked(stored, contents)
    infos = {k: source.infos[k] for k in source}
    kept = {k: i for k, i in infos.items() if not contents.is_guard(k, i) and not _part_of(k, contents.modules)}
    if twice := sorted(set(kept) & set(contents.modules)):
        raise SourceError(f"{twice[0]} is in the weight files, and described as an RPQ weight as well")
    skips = [Skip(k, (), "", i.shape, dtype_name(i.dtype), "dense") for k, i in kept.items()]
    skips += [Skip(n, (), "", d.shape, dtype_name(d.dtype), "decoded") for n, d in contents.modules.items()]
    plan = Plan((), tuple(skips), {}, shard)
    target = Folder(out, plan, overwrite=overwrite, origin=Origin.of(stored.infos.values()), keeps_plan=False)
    if target.is_complete:
        target.finish()
        return plan

    sizes, done = {s.name: s.nbytes for s in skips}, 0

    def told(name: str) -> Tensor:
        nonlocal done
        tensor, done = dense(name), done + sizes[name]
        if progress:
            progress(name, done, sum(sizes.values()))
        return tensor

    def dense(name: str) -> Tensor:
        if name in kept:
            return source[name]
        return decoded(source, name, contents.modules[name])

    target.compare(lambda job: source[job.name], dense)
    target.write_weights(told)
    target.check_source(lambda job: source[job.name], dense)
    if "model_type" in config:
        target.write(CONFIG, json.dumps(without_description(config), indent=1))
    target.copy(files_beside(folder))
    target.finish()
    return plan


def decoded(source: Mapping[str, Tensor], name: str, what: description.Described) -> Tensor:
    """Return one weight of a converted folder, decoded.

    Args:
        source: the folder's tensors. what: the weight's description.
    """
    module = RPQWeight.of(what, "meta")
    for part in module.tensors():
        module.set_tensor(part, source[f"{name}_rpq.{part}"])
    module._probe = torch.empty(0, dtype=module.dtype)
    with torch.no_grad():
        found: Tensor = module()
    return found


def _part_of(key: str, modules: Mapping[str, Any]) -> bool:
    name, found, _ = key.rpartition("_rpq.")
    return bool(found) and name in modules
