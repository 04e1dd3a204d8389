"""Found: what was given as data, recognised before anything slow is imported. Free of torch.

Data are texts, tables of texts, pictures or tensors: a file, a folder of files of one kind, or a data set of the hub. What is none,
such as a model's own folder, is refused in one line that says what helps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rpq_convert.errors import CalibrationError, SourceError
from rpq_convert.inputs.tables import check_head, kind_of
from rpq_convert.storage import formats
from rpq_convert.storage.files import WEIGHTS, files_in
from rpq_convert.storage.formats import PICTURES, TABLES, TEXTS
from rpq_convert.storage.headers import read_entries
from rpq_convert.storage.records import CONFIG
from rpq_convert.storage.sources import did_you_mean

TENSORS = ".safetensors"
HUB = "hub:"
KINDS = f"texts ({', '.join(TEXTS)}), tables ({', '.join(TABLES)}; also .gz), pictures ({', '.join(PICTURES)})"
# Files that tell of data beside them.
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors)(\..*)?|requirements.*\.txt"
    r"|(config|dataset_infos?|dataset_dict|state|package|metadata|croissant|generation_config|preprocessor_config)\.json",
    re.IGNORECASE,
)
OF_A_MODEL = re.compile(
    r"tokenizer(_config)?\.json|rpq_(plan|report|manifest|source)\.json|adapter_config\.json|model_index\.json"
)
_DATASET = re.compile(
    r"https?:/{1,2}(?:huggingface\.co|hf\.co)/datasets/([\w.-]+(?:/[\w.-]+)?)/?(?:[?#].*|viewer.*|tree.*)?"
)
_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[^:/]+){0,2}")


@dataclass(frozen=True)
class Found:
    """Data that was found.

    Args:
        where: as it was given.
        kind: `tensors`, `pictures`, `texts` (tables as well), or `hub`, a data set of the hub.
        files: its files, in the order in which they are read.
        name: of a data set: `user/name[:config][:split]`.
    """

    where: str
    kind: str
    files: tuple[Path, ...] = ()
    name: str = ""


def find_data(where: str | Path, field: str | None = None) -> Found:
    """Return what was given as data, looked at as far as names and first lines tell.

    Args:
        where: a file, a folder, `hub:user/name[:config][:split]`, or the address of a data set of the hub.
        field: the column of texts in a table.

    Raises:
        SourceError: it does not exist, cannot be read, or is no data. CalibrationError: nothing in it.
    """
    text, path = str(where), Path(where)
    if path.is_file():
        found = _file(path)
    elif path.is_dir():
        found = _folder(path)
    elif (name := _hub_name(text)) is not None:
        if find_spec("datasets") is None:
            raise SourceError(
                f"{text} is a data set of the hub, which needs the package datasets: pip install datasets"
            )
        return Found(text, "hub", name=name)
    elif path.exists():
        raise SourceError(f"{text} is neither a file nor a folder")
    else:
        raise SourceError(f"{text} does not exist{did_you_mean(path)}")
    tables = [p for p in found.files if found.kind == "texts" and kind_of(p) in TABLES]
    if field is not None and not tables:
        raise SourceError(f"{text} is no table, so it has no column {field!r}; leave out field={field!r}")
    if tables:
        check_head(tables[0], field)
    return found


def is_path(text: str) -> bool:
    """Return whether a text that may be data itself is the path of some: it is there, or it ends or begins as only paths do."""
    if not text or "\n" in text or len(text) > 1024:
        return False
    named = " " not in text and text.lower().endswith((*TEXTS, *TABLES, *PICTURES, TENSORS, ".gz"))
    return text.startswith(HUB) or named or Path(text).exists()


def _hub_name(text: str) -> str | None:
    """Return the data set that a text names; a plain `user/name` counts where nothing local begins like it."""
    if text.startswith(HUB):
        name = text.removeprefix(HUB).strip("/")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(:[\w.-]+(\[.*\])?)?", name):
            raise SourceError(f"{text} is no data set; write it as hub:user/name[:config][:split]")
        return name
    if address := _DATASET.fullmatch(text):
        return address[1]
    plain = _NAME.fullmatch(text) and not Path(text).parent.exists()
    return text if plain and not text.lower().endswith((*TEXTS, *TABLES, *PICTURES, TENSORS, ".gz")) else None


def _file(path: Path) -> Found:
    kind = kind_of(path)
    try:
        if path.stat().st_size == 0:
            raise CalibrationError(f"{path} is empty")
        if kind == TENSORS:
            if (path.parent / CONFIG).is_file():
                raise SourceError(
                    f"{path} is the weights of a model, not data; give a text, pictures or tensors to run it on"
                )
            read_entries(path)
            return Found(str(path), "tensors", (path,))
        if kind in PICTURES:
            return Found(str(path), "pictures", (path,))
        form = formats.of_file(path)
        if form is not None and (kind not in (*TEXTS, *TABLES) or form is formats.POINTER):
            raise SourceError(
                form.of(path) if form is formats.POINTER else f"{path} is {form.what}, not data; data are {KINDS}"
            )
        if kind not in TABLES:
            _check_text(path)
    except PermissionError:
        raise SourceError(f"{path} cannot be read: permission denied") from None
    return Found(str(path), "texts", (path,))


def _check_text(path: Path) -> None:
    head = formats.head_of(path) if path.suffix != ".gz" else b"text"
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SourceError(
            f"{path} is no text, and no data of a kind that is read: {KINDS}, {TENSORS} of a model's arguments"
        )


def _folder(path: Path) -> Found:
    files = files_in(path)
    weights = [n for n in files if n.lower().endswith(WEIGHTS) and not n.endswith(".data")]
    if model := [*weights, *(n for n in files if OF_A_MODEL.fullmatch(n))]:
        raise SourceError(
            f"{path} is a model's folder, not data: it holds {model[0]}; give a text, or a folder of texts or pictures"
        )
    told = {n: p for n, p in files.items() if not ABOUT.fullmatch(p.name)}
    pictures = [p for p in told.values() if kind_of(p) in PICTURES]
    texts = [p for p in told.values() if kind_of(p) in (*TEXTS, *TABLES)]
    if not pictures and not texts:
        if not files:
            raise SourceError(f"{path} is an empty folder; it holds neither {KINDS}")
        raise SourceError(f"{path} holds neither {KINDS}; it has {next(iter(files))}")
    if len(pictures) >= len(texts):
        return Found(str(path), "pictures", tuple(pictures))
    for file in texts:
        if file.stat().st_size and formats.is_pointer(file):
            raise SourceError(formats.POINTER.of(file))
    filled = tuple(p for p in texts if p.stat().st_size)
    if not filled:
        raise CalibrationError(f"the texts in {path} are empty")
    return Found(str(path), "texts", filled)
