"""Sources: what was given as a checkpoint, recognised before anything slow is imported or fetched. Free of torch.

A dense checkpoint is a folder, a file of tensors, or a repository of the hub by its id or its address. A converted one is a folder or
a repository. Folders and files may lie at the address of a store (addresses.py). Whatever else people give is named in one line, with what
helps (formats.py).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rpq_convert.errors import SourceError
from rpq_convert.planning.announced import AGAIN, refuse_config
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import MAX_BYTES, check, parse_json, read_json, read_text
from rpq_convert.schemas.kinds import FORMAT_VERSION
from rpq_convert.storage import formats
from rpq_convert.storage.addresses import address_of, is_address, local_path, refuse_password
from rpq_convert.storage.files import MODULES, files_in, refuse_links, weight_paths
from rpq_convert.storage.headers import joined, read_entries
from rpq_convert.storage.options import HubOptions, SourceOptions
from rpq_convert.storage.records import CONFIG, MANIFEST, ORIGIN
from rpq_convert.storage.remote import fetched_from

UNFINISHED = "is an unfinished conversion; repeat the command that made it to go on"
LIKE = 0.75  # how alike names are of which one may be meant by the other, from 0 to 1
_ADDRESS = re.compile(r"(?:(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/{1,2})(.+)", re.IGNORECASE)
_CACHED = "models--"  # a repository's folder in the hub's cache begins so
_PAGES = ("tree", "blob", "resolve", "raw", "commit")  # before a revision, in an address
Options = TypeVar("Options", bound=HubOptions)


def is_name(src: str | Path) -> bool:
    """Return whether a source can only be a repository's name: no local path has this name, and it is written like one.

    What lies in a folder that exists, or ends in `/`, is a path: the hub is not asked for it, which may take a minute to fail.
    """
    text, path = str(src), Path(src)
    return (
        not path.exists()
        and not path.is_absolute()
        and not text.startswith((".", "~"))
        and not text.endswith(("/", ".safetensors", ".bin", ".json"))
        and text.count("/") <= 1
        and not ("/" in text and path.parent.is_dir())
    )


def located(src: str | Path, options: Options) -> tuple[str | Path, Options]:
    """Return a source and how it is asked for: the address of a page of the hub as its repository's id and revision, `file://` as a path.

    Raises:
        SourceError: an address of the hub that is not that of a model, or one that cannot be read (addresses.py).
    """
    refuse_password(str(src))
    local = None if Path(src).exists() else local_path(src)
    src = src if local is None else local
    text = str(src)
    if Path(src).exists() and options.revision is not None:
        raise SourceError(f"{text} is a local path, so it has no revision {options.revision!r}; leave it out")
    found = None if Path(src).exists() else _ADDRESS.fullmatch(text)
    if found is None:
        address = None if Path(src).exists() else address_of(text)
        if address is not None and options.revision is not None:
            raise SourceError(f"{address} is no repository of the hub, so it has no revision; leave it out")
        return src if address is None else str(address), options
    parts = [p for p in re.split(r"[?#]", found[1])[0].split("/") if p]
    if parts[:1] in (["datasets"], ["spaces"], ["buckets"]):
        kind = parts[0].removesuffix("s")
        hint = f"; as data it is given as hub:{'/'.join(parts[1:3])}" if kind == "dataset" else ""
        raise SourceError(f"{text} is the address of a {kind}, not of a model{hint}")
    name = "/".join(parts[:2] if len(parts) > 1 and parts[1] not in _PAGES else parts[:1])
    rest = parts[name.count("/") + 1 :]
    revision = rest[1] if len(rest) > 1 and rest[0] in _PAGES else None
    if text.lower().startswith("hf:"):  # as fsspec writes it: hf://organisation/name@revision
        if rest and rest[0] not in _PAGES:
            raise SourceError(f"{text} names a part of a repository; give all of it: hf://{name}")
        name, _, named = name.partition("@")
        revision = named or revision
    if revision is None or options.revision is not None:
        return name, options
    return name, replace(options, revision=revision)


def is_remote(place: str | Path) -> bool:
    """Return whether a source, as `located` gives it, lies elsewhere: in a repository of the hub or at an address."""
    return is_name(place) or (not Path(place).exists() and is_address(place))


def is_drawn(src: str | Path, options: SourceOptions, fit: str | None) -> bool:
    """Return whether weights are drawn by a model's config alone: where none are needed and none are at hand.

    A fit that looks at weights needs them. Random codes take the spread of weights that lie on this machine; of a repository of the hub
    or at an address none are fetched for that.

    Args:
        fit: of the plan's options.
    """
    if fit != "random" or options.factory is not None:
        return False
    place, _ = located(src, options)
    folder = Path(place)
    if is_remote(place) or not (folder / CONFIG).is_file():
        return is_remote(place)
    return not any(n.endswith((".safetensors", ".bin", ".index.json")) for n in files_in(folder))


def near(path: str | Path, fits: Callable[[Path], bool] = lambda _: True) -> str:
    """Return an existing path that may have been meant by one that does not exist, as text; empty for none.

    Args:
        fits: whether it could serve.
    """
    path = Path(path)
    there = next((p for p in path.parents if p.is_dir()), None)
    if there is None or not os.access(there, os.R_OK | os.X_OK):
        return ""
    missing, *rest = path.relative_to(there).parts
    names = {p.name.lower(): p.name for p in there.iterdir() if not p.name.startswith(".")}
    close = difflib.get_close_matches(missing.lower(), names, 3, LIKE)
    close += [n for n in sorted(names) if Path(n).stem == missing.lower() and n not in close]
    candidates = (there.joinpath(names[n], *rest) for n in close)
    return next((str(p) for p in candidates if p.exists() and fits(p)), "")


def did_you_mean(path: str | Path, fits: Callable[[Path], bool] = lambda _: True) -> str:
    """Return the end of a sentence about a path that does not exist."""
    found = near(path, fits)
    return f"; did you mean {found}?" if found else ""


def is_checkpoint(path: Path) -> bool:
    """Return whether a path looks like a model at first sight, dense or converted."""
    if path.is_file():
        return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    return (path / CONFIG).is_file() or any(path.glob("*.safetensors"))


def is_rpq(folder: Path) -> bool:
    """Return whether a folder's config is that of a converted model."""
    return _method(_config(folder)) == "rpq"


def is_converted(path: Path) -> bool:
    """Return whether a path is a folder that rpq-convert wrote, at first sight."""
    return (path / MANIFEST).is_file() or is_rpq(path)


def refuse_misspelt(path: str | Path, fits: Callable[[Path], bool]) -> None:
    """Refuse what can be a repository's name where a local path has nearly the same: it is faster to ask than to fetch."""
    if is_name(path) and (meant := near(path, fits)):
        raise SourceError(
            f"{path} does not exist; did you mean {meant}? The hub's model of that name is https://huggingface.co/{path}"
        )


def check_source(src: str | Path, options: SourceOptions, *, weights: bool = True) -> None:
    """Refuse what is no dense checkpoint, as far as names, headers and small files tell.

    Args:
        weights: it must have some; for a plan a config is enough.

    Raises:
        SourceError: what it is, and what to do.
    """
    src, _ = located(src, HubOptions())
    path = Path(src)
    if not path.exists():
        if not is_remote(src):
            raise SourceError(f"{src} does not exist{did_you_mean(path, is_checkpoint)}")
    elif path.is_file():
        _check_file(path, options)
    elif path.is_dir():
        _check_folder(path, options, weights)
    else:
        raise SourceError(f"{src} is neither a file nor a folder")


def _check_file(path: Path, options: SourceOptions) -> None:
    if found := formats.of_file(path):
        if found in (formats.LARGE_JSON, formats.TEXT_FORMATS) and (path.parent / CONFIG).is_file():
            raise SourceError(f"{path} is a file of a checkpoint; give its folder {path.parent}")
        raise SourceError(found.of(path))
    config = _config(path.parent)
    if _method(config) == "rpq":
        raise SourceError(f"{path} is a file of a converted folder, quantized already (rpq); {AGAIN}")
    if config.get("model_type") and options.factory is None:
        raise SourceError(
            f"{path} is a file of a checkpoint; give its folder {path.parent}, or a factory for a bare weight file"
        )
    if path.suffix == ".safetensors":
        read_entries(path)
    elif not options.allow_pickle:
        raise SourceError(f"{path} is not a safetensors file; a pickled one needs allow_pickle=True")


def _check_folder(path: Path, options: SourceOptions, weights: bool) -> None:
    _refuse_unfinished(path)
    refuse_links(path)
    names = files_in(path)
    config = read_json(path / CONFIG, kinds.DENSE_CONFIG, SourceError) if CONFIG in names else {}
    if _method(config) == "rpq":
        raise SourceError(
            f"{path} is a converted folder, quantized already (rpq); {AGAIN}, or write dense ones: rpq restore {path} DENSE"
        )
    refuse_config(config, names, path)
    if "adapter_config.json" in names and CONFIG not in names:
        raise SourceError(_adapter(path).of(path))
    for name, file in names.items():
        if "/" not in name and formats.is_pointer(file):
            raise SourceError(formats.POINTER.of(file))
    if CONFIG in names and not weights:
        return
    named = config.get("transformers_weights")
    try:
        paths, index = weight_paths(path, allow_pickle=options.allow_pickle, named=named)
    except SourceError:
        if any("/" not in n and n.endswith((".safetensors", ".index.json", ".bin")) for n in names):
            raise  # they are there, and something is wrong with them
        if found := formats.of_names(names, lambda n: _text(path / n)):
            raise SourceError(found.of(path)) from None
        if inner := sorted(p.parent.name for p in path.glob("*/config.json")):
            raise SourceError(_of_parts(path, inner, names)) from None
        raise
    if MODULES in names and CONFIG not in names and options.factory is None:
        raise SourceError(
            f"{path} holds no model of transformers; sentence-transformers reads the weights of its other modules by itself, "
            "and knows no codes"
        )
    if all(p.suffix == ".safetensors" for p in paths):
        joined(map(read_entries, paths), index, path)
    elif found := next((f for p in paths if (f := formats.of_file(p))), None):
        raise SourceError(found.of(path))


def _of_parts(path: Path, inner: list[str], names: Collection[str]) -> str:
    """Say of a folder without weights which of its subfolders to convert."""
    models = [
        place
        for place in inner
        if any(n.startswith(f"{place}/") and n.endswith((".safetensors", ".bin")) for n in names)
    ]
    if len(models) > 1:
        return f"{path} has no weights of its own; its models are in {', '.join(models)}: convert each, into a copy of this folder"
    return f"{path} has no weights; did you mean {path / (models or inner)[-1]}?"


def called(folder: str | Path) -> str:
    """Return what messages and cards call a folder: one of the hub's cache by its repository's id, a fetched one by its address."""
    path = Path(folder)
    kept = path.parent.parent.name
    if (address := fetched_from(path)) is not None:
        return address
    return kept[len(_CACHED) :].replace("--", "/") if _in_cache(path) else str(folder)


def _in_cache(path: Path) -> bool:
    return path.parent.name == "snapshots" and path.parent.parent.name.startswith(_CACHED)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a converted folder, checked.

    Raises:
        SourceError: it is none; what it is instead, and what to do.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise SourceError(_instead(folder))
    _refuse_unfinished(folder)
    refuse_links(folder)
    config: Any = parse_json(read_text(path, kinds.CONFIG, SourceError), kinds.CONFIG, path, SourceError)
    name = called(folder)
    if _method(config) != "rpq":
        hint = "" if _method(config) else f"; convert it first: rpq-convert {name}"
        raise SourceError(
            f"{name} is not an RPQ checkpoint: its config.json has no quantization_config of method rpq{hint}"
        )
    version = config["quantization_config"].get("format_version")
    if version != FORMAT_VERSION:
        raise SourceError(f"{name} has format version {version!r}, this rpq-convert reads {FORMAT_VERSION}")
    check(config, kinds.CONFIG, path, SourceError)
    return config  # type: ignore[no-any-return]


def _instead(folder: Path) -> str:
    """Say what a path is that holds no config.json and should be a converted folder."""
    if not folder.exists():
        meant = near(folder, is_converted) or near(folder)
        return f"{folder} does not exist: not a checkpoint folder" + (f"; did you mean {meant}?" if meant else "")
    if folder.is_file() and is_converted(folder.parent):
        return f"{folder} is a file of a converted folder; give the folder {folder.parent}"
    if folder.is_file():
        found = formats.of_file(folder)
    elif is_unfinished(folder):
        return f"{folder} {UNFINISHED}"
    else:
        return not_converted(folder, files_in(folder))
    return found.of(folder) if found else _no_config(folder)


def not_converted(folder: Path, names: Collection[str]) -> str:
    """Say what a folder is that holds no config.json and should be a converted one; of a repository few files may be here.

    Args:
        names: paths of all of its files.
    """
    adapter = "adapter_config.json" in names
    found = _adapter(folder) if adapter else formats.of_names(names, lambda n: _text(folder / n))
    return found.of(called(folder)) if found else _no_config(folder)


def _no_config(folder: Path) -> str:
    if called(folder) != str(folder):
        return f"{called(folder)} is no converted model: it has no {CONFIG}; give one that rpq-convert made"
    return f"{folder / CONFIG} does not exist: {folder} is not a checkpoint folder"


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder is the work of a conversion that has not ended."""
    return (folder / ORIGIN).is_file() or (folder.name.endswith(".partial") and (folder / "pieces").is_dir())


def _refuse_unfinished(folder: Path) -> None:
    if is_unfinished(folder):
        raise SourceError(f"{folder} {UNFINISHED}")


def _adapter(folder: Path) -> formats.Format:
    return formats.adapter_of(_text(folder / "adapter_config.json"))


def _config(folder: Path) -> dict[str, Any]:
    """Return a folder's config where it can be read, without judging it."""
    try:
        data = json.loads(_text(folder / CONFIG) or "")
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _method(config: Any) -> str:
    quantized = config.get("quantization_config") if isinstance(config, dict) else None
    return str(quantized.get("quant_method", "")) if isinstance(quantized, dict) else ""


def _text(path: Path) -> str | None:
    try:
        with open(path, encoding="utf8") as file:
            return file.read(MAX_BYTES)
    except (OSError, UnicodeDecodeError):
        return None
