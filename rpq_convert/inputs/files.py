"""Inputs: files as what a model is run on, to calibrate it, to tune it and to evaluate it.

Texts, tables and chats, as a checkpoint's own tokenizer cuts them; pictures, through its own image processor; or, for any module at
all, a safetensors file whose tensors are named after the arguments of the model's forward, one sample a row. `found.py` says what
was given. Synthetic inputs, for models without data, are in `synthetic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from rpq_convert.errors import CalibrationError, SourceError
from rpq_convert.inputs.found import Found, find_data
from rpq_convert.inputs.hub_data import hub_items
from rpq_convert.inputs.tables import Chat, kind_of, plain_text, said, table_items
from rpq_convert.layers.precision import cast, dtype_of
from rpq_convert.running.text_config import text_config
from rpq_convert.storage.files import refuse_links
from rpq_convert.storage.formats import TABLES

ROWS = 16  # samples of a batch
CALIBRATED = 128  # samples to calibrate on, where no number is given
LABELS = "labels"  # of a file: what a classifier should say; only an evaluation reads them
Told = Callable[[str], None]


def read_inputs(
    file: str | Path,
    src: str | Path,
    *,
    model: Any = None,
    window: int = 512,
    samples: int | None = CALIBRATED,
    skip: int = 0,
    labels: bool = False,
    field: str | None = None,
    told: Told | None = None,
    **where: Any,
) -> list[Any]:
    """Return what a file or folder holds as batches for a model.

    Args:
        file: a text, a table of texts or chats, pictures, a folder of them, a data set of the hub (`find_data`), or a
            .safetensors file of named arguments, samples along the first axis.
        src: the checkpoint whose tokenizer or image processor reads it; tensors need neither.
        model: its transformers model, perhaps on meta, which says how it takes a text.
        window, samples, skip: tokens of one sample of text, and at most so many samples, after those that are skipped.
        labels: keep tensors of that name.
        field: the column of texts in a table.
        told: called with a sentence about what was read.
        where: revision, token, local_files_only of a checkpoint on the hub.

    Raises:
        SourceError: a file that cannot be read, or a checkpoint that has no tokenizer or processor. CalibrationError: nothing in it.
    """
    found, part = find_data(file, field), slice(skip, None if samples is None else skip + samples)
    if found.kind == "tensors":
        batches, what = _tensors(found.files[0], part, labels)
    elif found.kind == "pictures":
        batches, what = _pictures(src, found.files[part], **where), f"{len(found.files[part])} pictures"
    else:
        refuse_without_config(src, model)
        words = tokenizer_of(src, **where)
        text, what = words_of(found, words, field)
        batches = text_inputs(text, model, words, window, part)
    if told is not None:
        told(f"read {what} of {found.where}")
    return batches if model is None else [cast(batch, dtype_of(model)) for batch in batches]


def read_text(path: Path, field: str | None = None, tokenizer: Any = None, told: Told | None = None) -> str:
    """Return a text file's contents, or those of all texts and tables in a folder, in the order of their names.

    Args:
        field, told: as for `read_inputs`. tokenizer: writes chats by its template; without one what is said in them is taken.
    """
    found = find_data(path, field)
    if found.kind not in ("texts", "hub"):
        raise SourceError(f"{path} holds {found.kind}, where a text is needed")
    text, what = words_of(found, tokenizer, field)
    if told is not None:
        told(f"read {what} of {found.where}")
    return text


def words_of(found: Found, tokenizer: Any = None, field: str | None = None) -> tuple[str, str]:
    """Return the text of data that was found, and what it is in words: "100 lines, 9,148 words, column text"."""
    parts: list[str] = []
    counts: dict[str, int] = {"lines": 0, "rows": 0, "chats": 0}
    columns: dict[str, None] = {}

    def take(items: Sequence[str | Chat], column: str) -> None:
        columns.update({column: None} if column else {})
        for item in items:
            counts["rows" if isinstance(item, str) else "chats"] += 1
            parts.append(item if isinstance(item, str) else _written(item, tokenizer))

    if found.kind == "hub":
        take(*hub_items(found.name, field))
    for file in found.files:
        if kind_of(file) in TABLES:
            take(*table_items(file, field))
        else:
            parts.append(plain_text(file))
            counts["lines"] += sum(bool(line.strip()) for line in parts[-1].splitlines())
    text = "\n".join(parts)
    if not text.strip():
        raise CalibrationError(f"{found.where}: the text is empty")
    what = [f"{len(found.files)} files"] if len(found.files) > 1 else []
    what += [f"{n:,} {name[:-1] if n == 1 else name}" for name, n in counts.items() if n]
    what += [f"{len(text.split()):,} words", *(f"column {name}" for name in columns)]
    return text, ", ".join(what)


def _written(chat: Chat, tokenizer: Any) -> str:
    """Return a chat as the model was taught to read it, where its tokenizer has a template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return said(chat)
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as e:  # templates raise what they like over roles that they do not know
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        raise SourceError(f"a chat does not fit the tokenizer's template: {reason}") from None


def refuse_without_config(src: str | Path, model: Any) -> None:
    """Refuse to read a text for a model that comes without a tokenizer."""
    if getattr(model, "config", None) is None:
        raise SourceError(
            f"{src} has no config.json, and so no tokenizer for a text; give tensors in a .safetensors file"
        )


def _tensors(path: Path, part: slice, labels: bool) -> tuple[list[Any], str]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise SourceError(f"{path} is not a safetensors file: {e}") from None
    tensors = {k: t[part] for k, t in tensors.items() if t.ndim and (labels or k != LABELS)}
    sizes = {k: len(t) for k, t in tensors.items()}
    if not sizes or min(sizes.values()) == 0:
        raise CalibrationError(f"{path} holds no samples; name its tensors after the arguments of the model's forward")
    if len(set(sizes.values())) > 1:
        raise SourceError(f"{path}: its tensors hold different numbers of samples: {sizes}")
    count = min(sizes.values())
    batches = [{k: t[i : i + ROWS] for k, t in tensors.items()} for i in range(0, count, ROWS)]
    return batches, f"{count:,} samples of {', '.join(tensors)}"


def _pictures(src: str | Path, files: Sequence[Path], **where: Any) -> list[Any]:
    from transformers import AutoImageProcessor

    try:
        from PIL import Image
    except ImportError:
        raise SourceError("pictures need the package pillow: pip install pillow") from None
    process = _companion(AutoImageProcessor, src, backend="pil", **where)
    batches = []
    for start in range(0, len(files), ROWS):
        try:
            part = [Image.open(file).convert("RGB") for file in files[start : start + ROWS]]
        except OSError as e:
            raise SourceError(f"a picture cannot be read: {e}") from None
        batches.append(dict(process(part, return_tensors="pt")))
    return batches


def text_inputs(text: str, model: Any, words: Any, window: int, part: slice) -> list[Any]:
    """Return a part of a text as inputs to run a transformers checkpoint on, by its tokenizer.

    Args:
        window: tokens of one sample, or what the text or the model's positions allow.
        part: which samples: windows of the text for a causal language model, lines for any other.

    Raises:
        CalibrationError: no text.
    """
    window = min(window, getattr(text_config(model.config, "encoder"), "max_position_embeddings", None) or window)
    if not model.can_generate() or model.config.is_encoder_decoder:
        lines = sorted(
            [line for line in text.splitlines() if line.strip()][part], key=len
        )  # so that few are padded much
        batches = [dict(batch) for batch in tokenized(words, lines, window)]
        if model.config.is_encoder_decoder:
            batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    else:
        ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        window = max(1, min(window, len(ids)))
        rows = ids[: len(ids) // window * window].view(-1, window)[part]
        batches = [{"input_ids": part} for part in rows.split(4) if len(part)]
    if not batches:
        raise CalibrationError("the text is empty")
    return batches


def tokenizer_of(src: str | Path, **where: Any) -> Any:
    from transformers import AutoTokenizer

    return _companion(AutoTokenizer, src, **where)


def processor_of(src: str | Path, **where: Any) -> Any:
    """Return a checkpoint's processor of pictures, and of texts where it has one for both."""
    from transformers import AutoProcessor

    return _companion(AutoProcessor, src, **where)


def _companion(reader: Any, src: str | Path, **options: Any) -> Any:
    """Return a checkpoint's tokenizer or processor; one that needs code of the checkpoint is refused."""
    refuse_links(src)
    try:
        return reader.from_pretrained(src, trust_remote_code=False, **options)
    except Exception as e:  # readers of broken files raise many kinds
        if "trust_remote_code" in str(e):
            raise SourceError(
                f"{src}: its {reader.__name__[4:].lower()} needs code of the checkpoint, which is never run"
            ) from None
        raise SourceError(f"{src}: {(str(e).strip() or repr(e)).splitlines()[0]}") from None


def tokenized(words: Any, lines: list[Any], window: int) -> Iterable[Any]:
    """Return lines, or pairs of lines, as padded batches, of at most `window` tokens."""
    for i in range(0, len(lines), ROWS):
        yield words(lines[i : i + ROWS], padding=True, truncation=True, max_length=window, return_tensors="pt")
