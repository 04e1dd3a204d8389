"""Checkpoints: save, load, restore and verify. docs/checkpoint-format.md describes the files.

`config.json` holds `quantization_config`: the format's version and, for every RPQ weight, the description from which an
empty `RPQWeight` is rebuilt. No field names code: a transformers model is rebuilt through its own config and
transformers' own classes, any other through a factory that the caller gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert import hub, layers
from rpq_convert.card import Base, base_of
from rpq_convert.conversion import AFTER, plan_of, put_everywhere
from rpq_convert.encode import Encoded
from rpq_convert.folder import CARD, CONFIG, MANIFEST, REPORT, Folder, sha256
from rpq_convert.opened import Factory, compute_buffers, empty_from_factory
from rpq_convert.planning import FORMAT_VERSION, Plan, Skip
from rpq_convert.record import write_rest
from rpq_convert.report.schema import FileRow, Report
from rpq_convert.source import SourceError, open_folder
from rpq_convert.weight import RPQWeight


class VerifyError(ValueError):
    """A checkpoint folder is damaged."""


def save(
    model: nn.Module,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
    files: Sequence[Path] = (),
    base: Base | None = None,
) -> Report:
    """Write a converted model to a folder; the same bytes as the streaming conversion would write.

    Args:
        out: the folder to make.
        overwrite: replace `out`.
        max_shard_size: of a weight file, e.g. `"5GB"`.
        files: to copy beside the weights: tokenizer, generation settings.
        base: what the model card says that the model was converted from; by default what transformers knows.

    Raises:
        SourceError: the model has no RPQ weight. FolderError: the folder exists.
    """
    plan = plan_of(model, max_shard_size)
    if not plan.jobs:
        raise SourceError(f"{type(model).__name__} has no RPQ weight; convert it first")
    found = layers.layers_of(model)
    folder = Folder(out, plan, overwrite=overwrite)
    facts = {}
    for job in plan.jobs:
        rpq = found[job.name]
        facts[job.name] = {**getattr(rpq, "record", {}), "zero_row": rpq.zero_row}
        tensors = {k: t.cpu().contiguous() for k, t in rpq.stored().items()}
        record = facts[job.name]
        folder.put(
            Encoded(
                job.name,
                tensors,
                record.get("error"),
                record.get("dead", 0),
                record.get("seconds", 0.0),
                rpq.zero_row,
                record.get("inputs"),
            )
        )
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    folder.write_weights(lambda name: state[name])
    folder.copy([*files])
    config = _config_of(model)
    if base is None and config is not None:
        base = base_of(str(getattr(model, "name_or_path", "")))
    return write_rest(folder, config, facts, type(model).__name__, base)


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    """Return a transformers model's config as JSON values, or None for another model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    data = json.loads(config.to_json_string(use_diff=True))
    return data | {"architectures": [layers.original_class(model).__name__]}


def load(
    path: str | Path,
    *,
    factory: str | Factory | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Rebuild a converted model from its folder, in eval mode.

    Args:
        path: the folder, or the id of a repository on the hub.
        factory: builds the dense model where it is not transformers'; its weights are never allocated.
        device: where to put it.
        revision, token, local_files_only: of a repository, as for `convert_checkpoint`.

    Raises:
        SourceError: not an RPQ folder, a newer format, missing or unexpected tensors.
    """
    folder, repository = Path(path), None
    if hub.is_name(path):
        where: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
        repository = hub.find(path, (CONFIG,), **where)
        folder = repository.folder
    config = read_config(folder)
    if repository is not None:
        repository.fetch_weights()
    if factory is not None:
        model = empty_from_factory(factory)
    elif "model_type" in config:
        from rpq_convert.integrations import transformers

        plain = transformers.load_config(folder)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        model = transformers.build_empty(plain)
    else:
        raise SourceError(
            f"{folder} is not a transformers model: pass factory=, the function that builds the dense model"
        )
    fill(model, config["quantization_config"], open_folder(folder))
    compute_buffers(model, factory)
    for act in AFTER:
        act(model)
    return model.to(device) if device is not None else model


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of an RPQ folder, checked."""
    path = folder / CONFIG
    if not path.is_file():
        raise SourceError(f"{path} does not exist: not a checkpoint folder")
    try:
        config = json.loads(path.read_text("utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise SourceError(f"{path} is not JSON: {e}") from None
    rpq = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(rpq, dict) or rpq.get("quant_method") != "rpq":
        raise SourceError(
            f"{folder} is not an RPQ checkpoint: its config.json has no quantization_config of method rpq"
        )
    if rpq.get("format_version") != FORMAT_VERSION:
        raise SourceError(
            f"{folder} has format version {rpq.get('format_version')!r}, this rpq-convert reads {FORMAT_VERSION}"
        )
    absent = [k for k in ("modules", "tied", "guard") if k not in rpq]
    if absent:
        raise SourceError(f"{path}: its quantization_config has no {', '.join(absent)}")
    return config


def fill(model: nn.Module, config: Mapping[str, Any], source: Any) -> None:
    """Give an empty model its RPQ weights and dense tensors."""
    tied: dict[str, list[str]] = {}
    for alias, name in config["tied"].items():
        tied.setdefault(name, []).append(alias)
    used = {config.get("guard")}
    for name, description in config["modules"].items():
        try:
            rpq = RPQWeight.from_config(description, device="meta")
            layers.find(model, name)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise SourceError(f"{name}: its description does not fit this model or version: {e}") from None
        put_everywhere(model, (name, *tied.get(name, [])), rpq)
    homes: dict[int, tuple[Tensor, list[tuple[nn.Module, str, bool]], str]] = {}
    for path, module in model.named_modules():
        for table, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, value in table.items():
                if value is not None and not (is_buffer and key in module._non_persistent_buffers_set):
                    full = f"{path}.{key}".lstrip(".")
                    homes.setdefault(id(value), (value, [], full))[1].append((module, key, is_buffer))
    missing = []
    for value, places, full in homes.values():
        names = [full, config["tied"].get(full, full), *tied.get(full, [])]
        name = next((n for n in names if n in source), None)
        if name is None:
            missing.append(full)
            continue
        used.add(name)
        tensor = source[name]
        if tuple(tensor.shape) != tuple(value.shape):
            raise SourceError(f"{name}: the file has {list(tensor.shape)}, the model {list(value.shape)}")
        filled = tensor if places[0][2] else nn.Parameter(tensor, requires_grad=value.requires_grad)
        for module, key, is_buffer in places:
            (module._buffers if is_buffer else module._parameters)[key] = filled
    unused = [k for k in source if k not in used]
    if missing or unused:
        raise SourceError(
            f"the checkpoint does not fit the model: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unused)} unexpected ({', '.join(unused[:3])})"
        )
    for module in model.modules():
        if isinstance(module, RPQWeight):
            module._probe = torch.empty(0, dtype=module.dtype, device=module.codes.device)


def restore(model: nn.Module) -> nn.Module:
    """Turn a converted model back into a dense one, in place: every class and parameter as before conversion."""
    done: dict[int, nn.Parameter] = {}
    for path, rpq in layers.layers_of(model).items():
        module, name = layers.find(model, path)
        if not isinstance(module, layers.RPQLayer) or name not in module._rpq_names:
            continue  # a shared module, restored under its other path
        if id(rpq) not in done:
            with torch.no_grad():
                done[id(rpq)] = nn.Parameter(rpq(), requires_grad=rpq.trainable)
        layers.take(module, name, done[id(rpq)])
    for act in AFTER:
        act(model)
    return model


def restore_checkpoint(
    path: str | Path, out: str | Path, *, overwrite: bool = False, max_shard_size: str | int = "5GB"
) -> Plan:
    """Write a plain dense checkpoint from an RPQ folder, one tensor in memory at a time (plus one weight file)."""
    from rpq_convert.planning import parse_size

    folder, config = Path(path), read_config(Path(path))
    rpq, source = config.pop("quantization_config"), open_folder(path)
    kept = {k: source.infos[k] for k in source if k != rpq["guard"] and not _part_of(k, rpq["modules"])}
    skips = [Skip(k, (), "", i.shape, str(i.dtype).removeprefix("torch."), "dense") for k, i in kept.items()]
    skips += [Skip(n, (), "", tuple(d["shape"]), d["dtype"], "decoded") for n, d in rpq["modules"].items()]
    plan = Plan((), tuple(skips), {}, parse_size(max_shard_size))
    target = Folder(out, plan, overwrite=overwrite)

    def dense(name: str) -> Tensor:
        if name in kept:
            return source[name]
        module = RPQWeight.from_config(rpq["modules"][name], device="meta")
        for part, _ in list(module.named_parameters()):
            tensor = source[f"{name}_rpq.{part}"]
            module.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        module._probe = torch.empty(0, dtype=module.dtype)
        with torch.no_grad():
            return module()

    target.write_weights(dense)
    if "model_type" in config:
        target.write(CONFIG, json.dumps(config, indent=1))
    names = {CONFIG, CARD, REPORT, MANIFEST, "rpq_plan.json"}
    target.copy([p for p in folder.iterdir() if p.is_file() and p.name not in names and "safetensors" not in p.name])
    (target.work / "rpq_plan.json").unlink()
    target.finish()
    return plan


def _part_of(key: str, modules: Mapping[str, Any]) -> bool:
    name, found, _ = key.rpartition("_rpq.")
    return bool(found) and name in modules


def verify(
    path: str | Path, progress: Callable[[str], None] | None = None, *, edited: Collection[str] = ()
) -> list[str]:
    """Check a folder: manifest hashes, headers, index, specs and finiteness. Return the files that were checked.

    Args:
        progress: called with every file.
        edited: files that must be there, and need not be as they were written.

    Raises:
        VerifyError: what is damaged, and where.
    """
    folder = Path(path)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        read_config(folder)  # raises where it is no RPQ folder at all
        raise VerifyError(f"{manifest} is missing: the folder was not finished by rpq-convert")
    try:
        listed: dict[str, Any] = json.loads(manifest.read_text("utf8"))["files"]
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise VerifyError(f"{manifest} is not a manifest: {e!r}") from None
    unlisted = [p for p in (folder / CONFIG, *sorted(folder.glob("*.safetensors*"))) if p.name not in files]
    if unlisted:
        raise VerifyError(f"{unlisted[0]} is not in the manifest")
    for name, (size, digest) in files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise VerifyError(f"{file} is missing")
        if name in edited:
            continue
        if file.stat().st_size != size:
            raise VerifyError(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
        if sha256(file) != digest:
            raise VerifyError(f"{file} does not match its sha256 in the manifest")
        if progress:
            progress(name)
    config = read_config(folder)
    try:
        source = open_folder(folder)
    except SourceError as e:
        raise VerifyError(str(e)) from None
    for name, description in config["quantization_config"]["modules"].items():
        rpq = RPQWeight.from_config(description, device="meta")
        for part, (dtype, shape) in rpq.spec.tensors(rpq.view, rpq.shape).items():
            key = f"{name}_rpq.{part}"
            if key not in source:
                raise VerifyError(f"{key} is missing from the weight files")
            info = source.infos[key]
            if (info.dtype, tuple(info.shape)) != (dtype, shape):
                raise VerifyError(
                    f"{key} is {list(info.shape)} {info.dtype}, its description says {list(shape)} {dtype}"
                )
        if rpq.spec.outliers:
            key, inputs = f"{name}_rpq.positions", rpq.cut.inputs
            low, high = source[key].aminmax()
            if int(low) < 0 or int(high) >= inputs:
                raise VerifyError(f"{key} names inputs {int(low)} to {int(high)}, of {inputs}")
    for key in source:
        tensor = source[key]
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise VerifyError(f"{key} holds NaN or infinite values")
    return sorted(files)


def audit(
    path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Report:
    """Return the report of an RPQ folder, with the sizes that its files have; of a repository, no weight is fetched.

    Args:
        path: the folder, or the id of a repository on the hub.
        revision, token, local_files_only: of a repository, as for `convert_checkpoint`.
    """
    folder = Path(path)
    if hub.is_name(path):
        where: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
        repository = hub.find(path, (CONFIG, REPORT), **where)
        folder, files = repository.folder, dict(repository.files)
    else:
        files = {p.name: p.stat().st_size for p in folder.glob("*") if p.is_file()}
    read_config(folder)
    file = folder / REPORT
    if not file.is_file():
        raise SourceError(f"{file} is missing: the folder has no report")
    try:
        report = Report.from_json(file.read_text("utf8"))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{file} is not a report that this rpq-convert reads: {e}") from None
    sizes = tuple(FileRow(name, size or 0) for name, size in sorted(files.items()))
    return replace(report, files=sizes)


def model_size(model: nn.Module) -> float:
    """Return the size of parameters and buffers in MB (2**20 bytes), shared tensors once, as RPQ-pytorch counts it."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
