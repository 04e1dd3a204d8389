"""Formats: what a file or folder is that cannot be read as a checkpoint, told by its first bytes and its names.

People have models in many formats, and archives, adapters and pointers that look like models. Each is named in one line that says
what helps. Nothing of a file is unpickled or unpacked. Free of torch.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HEAD = 512  # bytes of a file that are looked at
PICKLES = 4  # in a file of torch from before it wrote archives: three of facts, and what was saved
LARGEST_PICKLE = 64 << 20  # bytes of a pickle's instructions; its tensors lie beside them
LFS = b"version https://git-lfs.github.com/spec/"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEXTS = (".txt", ".md", ".rst")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # rows with texts in them

SAFETENSORS = "save_file(model.state_dict(), 'weights.safetensors'), and pass --factory package:callable"


@dataclass(frozen=True)
class Format:
    """What something is, and what to do about it."""

    what: str
    advice: str

    def of(self, where: str | Path) -> str:
        return f"{where} is {self.what}; {self.advice}"


POINTER = Format("a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder")
GGUF = Format("a GGUF file of llama.cpp", "convert the safetensors checkpoint that it was made from")
ONNX = Format("an ONNX graph", "convert the torch model that it was exported from")
KERAS = Format("a Keras or TensorFlow file", "save the torch model as safetensors and convert that")
TFLITE = Format("a TensorFlow Lite file", "convert the torch model that it was made from")
FLAX = Format("a file of Flax weights", "load it with from_flax=True and save_pretrained, then convert that")
SCRIPT = Format(
    "a TorchScript archive, which is code", f"save the weights of the model that it was made from: {SAFETENSORS}"
)
PROGRAM = Format(
    "an exported program of torch.export", f"save the weights of the model that it was made from: {SAFETENSORS}"
)
NUMPY = Format(
    "a file of numpy arrays", "save the arrays with safetensors.numpy.save_file, under the names of the model's weights"
)
ARCHIVE = Format("an archive", "unpack it and give the folder or file inside")
CODE = Format("Python code", "give the weights, and the code as --factory FILE.py:FUNCTION")
DATA = Format("data, no model", "give it to --calibrate, and a checkpoint as the source")
LARGE_JSON = Format("a JSON file", "give the folder of the checkpoint that it belongs to")
TEXT_FORMATS = Format("a text, no model", "give a checkpoint's folder, a safetensors file or a hub id")
OPENVINO = Format("an OpenVINO model", "convert the torch model that it was made from")
COREML = Format("a Core ML model", "convert the torch model that it was made from")
SAVED_MODEL = Format("a TensorFlow SavedModel", "save the torch model as safetensors and convert that")
DISTRIBUTED = Format(
    "a distributed checkpoint in parts", "merge it with torch.distributed.checkpoint.format_utils, then convert that"
)
MLX = Format("a folder of MLX weights", "convert the safetensors checkpoint that it was made from")
EMPTY = Format("an empty folder: no weights, no config", "give one with a checkpoint's config.json and weights")

_BY_HEAD: tuple[tuple[int, bytes, Format], ...] = (
    (0, LFS, POINTER),
    (0, b"GGUF", GGUF),
    (0, b"\x89HDF", KERAS),
    (4, b"TFL3", TFLITE),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"\x1f\x8b", ARCHIVE),
    (0, b"BZh", ARCHIVE),
    (0, b"\xfd7zXZ", ARCHIVE),
    (0, b"7z\xbc\xaf", ARCHIVE),
    (0, b"Rar!", ARCHIVE),
    (0, b"\x28\xb5\x2f\xfd", ARCHIVE),
    (257, b"ustar", ARCHIVE),
)
_BY_END: dict[tuple[str, ...], Format] = {
    (".gguf", ".ggml", ".llamafile"): GGUF,
    (".onnx", ".onnx_data", ".onnx.data", ".ort"): ONNX,
    (".h5", ".hdf5", ".keras"): KERAS,
    (".tflite",): TFLITE,
    (".msgpack",): FLAX,
    (".pb",): SAVED_MODEL,
    (".npy", ".npz"): NUMPY,
    (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".zst", ".gz"): ARCHIVE,
    (".py", ".ipynb"): CODE,
    (".mlmodel", ".mlpackage"): COREML,
    (".distcp",): DISTRIBUTED,
    (".jsonl", ".csv", ".tsv", ".parquet", *PICTURES): DATA,
    (".json",): LARGE_JSON,
    (".toml", ".yaml", ".yml", ".html", *TEXTS): TEXT_FORMATS,
}  # fmt: skip


def head_of(path: str | Path) -> bytes:
    """Return a file's first bytes; OSError where it cannot be opened."""
    with open(path, "rb") as file:
        return file.read(HEAD)


def is_pointer(path: str | Path) -> bool:
    """Return whether a file is a Git LFS pointer."""
    return head_of(path).startswith(LFS)


def of_file(path: str | Path) -> Format | None:
    """Return what a file is, or None where it is tensors, as safetensors or pickled, or nothing that is known."""
    path, head = Path(path), head_of(path)
    if head.startswith(LFS):
        return POINTER
    if path.suffix == ".safetensors":
        return None
    if head.startswith(b"PK\x03\x04"):
        return _of_zip(path)
    if head.startswith(b"\x80"):
        with open(path, "rb") as file:
            return _of_pickle(file)
    found = next((form for at, magic, form in _BY_HEAD if head[at : at + len(magic)] == magic), None)
    return found or next((form for ends, form in _BY_END.items() if path.name.lower().endswith(ends)), None)


def _of_zip(path: Path) -> Format | None:
    """Return what a zip is: torch saves its files as such, and so do Keras, numpy and everyone else."""
    try:
        with zipfile.ZipFile(path) as packed:
            names = packed.namelist()
            inner = next((n for n in names if n.rpartition("/")[2] == "data.pkl"), None)
            text = packed.read(inner) if inner and packed.getinfo(inner).file_size <= LARGEST_PICKLE else b""
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
        return None  # its reader will say more
    ends = {n.partition("/")[2] if "/" in n else n for n in names}
    if {"constants.pkl", "extra"} & ends or any(e.startswith("code/") for e in ends):
        return SCRIPT
    if "archive_format" in ends or any(n.endswith("serialized_exported_program.json") for n in names):
        return PROGRAM
    if inner is not None:
        return _of_pickle(io.BytesIO(text))
    if all(n.endswith(".npy") for n in names):
        return NUMPY
    return KERAS if {"metadata.json", "config.json"} <= set(names) else ARCHIVE


def _of_pickle(file: IO[bytes]) -> Format | None:
    """Return what the instructions of pickles make where it is a whole model, by reading them as text; they are not run."""
    first, words, last = "", set(), ["", ""]
    try:
        for _ in range(PICKLES):
            for code, value, _ in pickletools.genops(file):
                if code.name in ("GLOBAL", "STACK_GLOBAL"):
                    first = first or (str(value).rpartition(" ")[2] if value else last[1])
                elif isinstance(value, str):
                    words.add(value)
                    last = [last[1], value]
    except ValueError:  # the tensors begin, or it is damaged
        pass
    if not {"_modules", "_parameters"} <= words:
        return None
    return Format(
        f"a whole pickled model ({first or 'a module'}), which only its own code can open",
        f"load it in Python and save its weights: {SAFETENSORS}",
    )


def of_names(names: Collection[str], text_of: Callable[[str], str | None]) -> Format | None:
    """Return what a folder is that holds no weights that can be read, by the names of its files; None for nothing that is known.

    Args:
        names: paths inside the folder, with `/`. text_of: what a small file of it says, or None.
    """
    top = {n for n in names if "/" not in n}
    if "model_index.json" in top:
        parts = sorted({n.partition("/")[0] for n in names if n.count("/") == 1 and n.endswith("/config.json")})
        which = _field(text_of("model_index.json"), "_class_name")
        return Format(
            f"a diffusers pipeline{which and f' ({which})'}, several models in one folder",
            f"give the folder of one of them: {', '.join(parts)}" if parts else "give the folder of one of them",
        )
    if "saved_model.pb" in top:
        return SAVED_MODEL
    if any(n.endswith(".distcp") for n in names):
        return DISTRIBUTED
    if any(n.startswith("openvino_") and n.endswith(".xml") for n in top):
        return OPENVINO
    forms = (GGUF, FLAX, KERAS, ONNX, TFLITE, COREML)
    ends = {form: end for end, form in _BY_END.items() if form in forms}
    for form in forms:
        if file := next((n for n in sorted(names) if n.lower().endswith(ends[form])), None):
            return Format(f"a folder with no weights for torch; {file} in it is {form.what}", form.advice)
    if not names:
        return EMPTY
    if any(n.rpartition("/")[2] == "config.json" for n in names):
        return None
    if any(n.startswith(("tokenizer", "vocab.", "merges.", "spiece", "sentencepiece")) for n in top):
        return Format(
            "a folder of a tokenizer alone", "give the folder that has the model's config.json and weights as well"
        )
    if all(n.lower().endswith((*PICTURES, *TEXTS, *TABLES)) for n in names):
        return Format("a folder of data, no model", DATA.advice)
    return None


def adapter_of(text: str | None) -> Format:
    """Return what a PEFT folder is, by its adapter_config.json."""
    base, kind = _field(text, "base_model_name_or_path"), _field(text, "peft_type")
    return Format(
        f"a PEFT adapter{kind and f' ({kind})'} of {base or 'some model'}, not a model: it holds an adapter (adapter_config.json)",
        "merge it into its base (merge_and_unload), save that and convert it",
    )


def _field(text: str | None, name: str) -> str:
    try:
        data: Any = json.loads(text or "")
        return str(data.get(name) or "")
    except (ValueError, AttributeError, RecursionError):
        return ""
