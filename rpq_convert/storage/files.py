"""Files of a checkpoint's folder: which are its weights, what belongs beside them, and that no link leaves it.

A folder of a model holds more than weights and a tokenizer: modules of sentence-transformers, chat templates, vocabularies under
names of their own, processors, code for generation. What belongs to it is therefore told by what does not: weights in any format,
caches, secrets, states of training, downloads that are not complete, and code but for that of `custom_generate/`, which
transformers runs only for who trusts it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from rpq_convert.errors import SourceError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage import formats

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CODE = "custom_generate"
GENERATION = "generation_config.json"
MODULES = "modules.json"  # of sentence-transformers: which module lies in which subfolder
HUB = ("models--", "datasets--", "spaces--")  # folders of the hub's cache
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".onnx.data",
    ".data", ".gguf", ".ggml", ".npz", ".npy", ".tflite", ".pb", ".mlmodel", ".engine", ".nemo", ".pte", ".mar", ".ot", ".index.json",
    ".distcp", ".params", ".pdparams", ".caffemodel", ".exl2", ".llamafile",
)  # fmt: skip
PICKLED = (".pkl", ".pickle", ".joblib", ".dill")
PACKED = (
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tar.xz",
    ".7z",
    ".rar",
)  # of which nobody knows what they hold
UNFINISHED = (
    ".incomplete",
    ".partial",
    ".part",
    ".tmp",
    ".temp",
    ".crdownload",
    ".download",
    ".aria2",
    ".lock",
    ".swp",
    "~",
    ".bak",
)
KEYS = (".pem", ".key", ".p12", ".pfx", ".jks", ".keystore", ".kdbx", ".ppk", ".env", ".token", ".asc", ".gpg")
FOLDERS = re.compile(
    r"__pycache__|onnx|openvino|coreml|tensorrt|gguf|mlx|original|checkpoint-\d+|global_step\d+|runs|wandb|mlruns|lightning_logs"
    r"|.+\.(mlpackage|mlmodelc|partial)",
    re.IGNORECASE,
)
TRAINING = re.compile(r"(trainer_state|training_args|zero_to_fp32|events\.out\.tfevents).*|latest|adapter_config\.json")
SECRET = re.compile(
    r"token(\.txt)?|(hf|hub|access|auth|api|stored|my)[_-]?tokens?(\.(txt|json))?|.*(secret|password|passwd|credential|api[_-]?key).*"
    r"|service[_-]?account.*|kubeconfig|id_(rsa|dsa|ecdsa|ed25519).*|htpasswd",
    re.IGNORECASE,
)
OWN = re.compile(
    r"config\.json|README\.md|rpq_(plan|report|manifest|source|written)\.json|rpq_chart\.png"
)  # written anew for every folder


def belongs(name: str) -> bool:
    """Return whether a file belongs to a model beside its weights and its config.

    Args:
        name: its path inside the folder, with `/`.
    """
    *folders, file = name.split("/")
    if (
        not is_inside(name)
        or any(part.startswith(".") for part in (*folders, file))
        or any(map(FOLDERS.fullmatch, folders))
    ):
        return False
    if file.lower().endswith((*WEIGHTS, *PICKLED, *PACKED, *UNFINISHED, *KEYS)):
        return False
    if file.endswith((".py", ".pyc", ".so")) and folders[:1] != [CODE]:
        return False
    return not (TRAINING.fullmatch(file) or SECRET.fullmatch(file) or (not folders and OWN.fullmatch(file)))


def is_inside(name: str) -> bool:
    """Return whether a relative path stays inside its folder, on every system."""
    parts = name.split("/")
    return bool(name) and not any(p in ("", ".", "..") or "\\" in p or ":" in p or "\0" in p for p in parts)


def files_in(folder: str | Path) -> dict[str, Path]:
    """Return path inside the folder -> file, of all files that are not hidden, sorted."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            path = Path(place, file)
            if not file.startswith(".") and path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def files_beside(folder: str | Path, *, allow_pickle: bool = False) -> dict[str, Path]:
    """Return name in a new folder -> file, of what a folder holds beside its weights, its config and its card.

    Weights of modules that sentence-transformers keeps in subfolders are among them.

    Raises:
        SourceError: a link that leaves the folder; a module with pickled weights while `allow_pickle` is False.
    """
    refuse_links(folder)
    found = files_in(folder)
    modules = module_weights(found, Path(folder), allow_pickle=allow_pickle)
    return {n: p for n, p in found.items() if belongs(n)} | {n: found[old] for n, old in modules.items()}


def module_weights(names: Collection[str], folder: Path, *, allow_pickle: bool = False) -> dict[str, str]:
    """Return new name -> name of the weight files of modules in subfolders, as modules.json lists them; all become safetensors.

    Args:
        names: the files that there are. folder: where modules.json lies, if it is among them.

    Raises:
        SourceError: a module has only pickled weights while `allow_pickle` is False.
    """
    if MODULES not in names:
        return {}
    found: dict[str, str] = {}
    for module in read_json(folder / MODULES, kinds.MODULES, SourceError):
        place = module["path"].strip("/")
        if not place or not is_inside(place):
            continue
        own = [n for n in names if n.startswith(f"{place}/")]
        chosen = sorted(n for n in own if n.endswith((".safetensors", ".safetensors.index.json")))
        pickled = f"{place}/{PICKLE}"
        if pickled in own and not chosen and not allow_pickle:
            raise SourceError(f"{folder / pickled} is pickled; pass allow_pickle=True to read it as tensors only")
        if pickled in own and not chosen:
            found[f"{place}/{WHOLE}"] = pickled
        found |= {n: n for n in chosen}
    return found


def weight_files(
    names: Collection[str], where: str | Path, *, allow_pickle: bool = False, named: str | None = None
) -> list[str]:
    """Choose from a folder's file names what its weights are read from: an index alone, or the weight files.

    A folder often holds the same weights several times. What transformers takes is taken: one file before an index, safetensors
    before pickles. Nothing is chosen twice.

    Args:
        named: the file that config.json names (`transformers_weights`).

    Raises:
        SourceError: no weights, or only pickled ones while `allow_pickle` is False.
    """
    if named is not None:
        if named not in names or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise SourceError(f"{where}: its config names {named!r} as its weights, which is no safetensors file in it")
        return [named]
    for whole in (WHOLE, INDEX):
        if whole in names:
            return [whole]
    top = sorted(n for n in names if "/" not in n)
    loose = [n for n in top if n.endswith(".safetensors")]
    adapters = [n for n in top if n.startswith("adapter_model")]
    if some := [n for n in loose if n not in adapters]:
        return some
    if PICKLE in names or PICKLE_INDEX in names:
        pickled = [PICKLE if PICKLE in names else PICKLE_INDEX]
    else:
        pickled = [n for n in top if n.startswith("pytorch_model") and n.endswith(".bin")]
    if pickled and not allow_pickle:
        raise SourceError(
            f"{where} has only pickled weights ({pickled[0]}); pass allow_pickle=True to read them as tensors only, "
            "or take a repository with safetensors"
        )
    if pickled:
        return pickled
    if adapters:
        raise SourceError(
            f"{where} holds an adapter ({adapters[0]}), not a model: merge it into its base and save that"
        )
    if found := formats.of_names(names, lambda name: None):
        raise SourceError(found.of(where))
    others = [n for n in names if n.endswith(WEIGHTS)]
    which = f"; {others[0]} is of a kind that is not read: save it as safetensors" if others else ""
    raise SourceError(f"{where} has no weights: no {WHOLE}, index or {PICKLE}{which}")


def weight_paths(
    folder: Path, *, allow_pickle: bool = False, named: str | None = None
) -> tuple[list[Path], dict[str, str] | None]:
    """Return the weight files of a folder, and its index if they have one; all are safetensors, or all are pickled.

    Args:
        allow_pickle, named: as for `weight_files`.

    Raises:
        SourceError: as `weight_files`; a missing shard, or an index that leaves the folder.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} does not exist")
    refuse_links(folder)
    names = {p.name for p in folder.iterdir() if p.is_file()}
    chosen = weight_files(names, folder, allow_pickle=allow_pickle, named=named)
    index = read_index(folder / chosen[0]) if chosen[0].endswith(".json") else None
    paths = [_inside(folder, n) for n in (chosen if index is None else sorted(set(index.values())))]
    if pickled := [p for p in paths if p.suffix != ".safetensors"]:
        if not allow_pickle:
            raise SourceError(f"{pickled[0]} is not a safetensors file; a pickled one needs allow_pickle=True")
        if len(pickled) < len(paths):
            raise SourceError(f"{folder}: its index names pickled files and others, such as {pickled[0].name}")
    return paths, index


def read_index(path: Path) -> dict[str, str]:
    """Return the map from tensors to files of an index.

    Raises:
        SourceError: it is none.
    """
    return read_json(path, kinds.INDEX, SourceError)["weight_map"]  # type: ignore[no-any-return]


def _inside(folder: Path, name: str) -> Path:
    """Return a shard's path, refusing one that leaves the folder."""
    if "/" in name or not is_inside(name):
        raise SourceError(f"{folder}: the index names {name!r}, which leaves the folder")
    if not os.path.isfile(folder / name):  # pathlib's raises where no file can have the name
        raise SourceError(f"{folder / name} is missing, the index names it")
    return folder / name


def refuse_links(folder: str | Path) -> None:
    """Refuse a checkpoint's folder with a link that leaves it: its target would be read, copied or uploaded.

    Subfolders are looked at too, hidden ones are not: nothing of them is read. Links of the hub's cache are accepted: from
    `<repository>/snapshots/<commit>` to that repository's `blobs`.

    Raises:
        SourceError: which link, and where it leads.
    """
    root = Path(folder).resolve()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted((*folders, *files)):
            path = Path(place, name)
            if path.is_symlink() and not name.startswith(".") and not _stays(path, root):
                raise SourceError(
                    f"{path} is a link that leaves the folder, to {os.readlink(path)}; put the file itself in its place"
                )


def _stays(link: Path, root: Path) -> bool:
    try:
        real = link.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return False
    repository = root.parent.parent
    cached = root.parent.name == "snapshots" and repository.name.startswith(HUB)
    return real.is_relative_to(root) or (cached and real.parent == repository / "blobs")


def named_files(files: Mapping[str, Path] | Iterable[Path] | str | Path) -> dict[str, Path]:
    """Return path inside the new folder -> file: of a mapping as it is, of a list by names, of a folder what belongs to it.

    Raises:
        SourceError: a path that would leave the folder, or that is no file.
    """
    if isinstance(files, (str, Path)):
        return files_beside(files)
    found = dict(files) if isinstance(files, Mapping) else {Path(f).name: Path(f) for f in files}
    for name, path in found.items():
        if not is_inside(name) or PurePosixPath(name).is_absolute():
            raise SourceError(f"{name!r} would leave the folder")
        if not path.is_file():
            raise SourceError(f"{path} is not a file")
    return found
