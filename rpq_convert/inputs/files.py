"""Inputs: files as what a model is run on, to calibrate it, to tune it and to evaluate it.

A text or a folder of texts, as a checkpoint's own tokenizer cuts it; a folder of pictures, through its own image processor; or,
for any module at all, a safetensors file whose tensors are named after the arguments of the model's forward, one sample a
row. Synthetic inputs, for models without data, are in `synthetic.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from rpq_convert.errors import CalibrationError, SourceError
from rpq_convert.storage.files import refuse_links

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEXTS = (".txt", ".md", ".rst")
ROWS = 16  # samples of a batch
LABELS = "labels"  # of a file: what a classifier should say; only an evaluation reads them


def read_inputs(
    file: str | Path,
    src: str | Path,
    *,
    model: Any = None,
    window: int = 512,
    samples: int | None = 128,
    labels: bool = False,
    **where: Any,
) -> list[Any]:
    """Return what a file or folder holds as batches for a model.

    Args:
        file: a text, a folder of texts or of pictures, or a .safetensors file of named arguments, samples along the first axis.
        src: the checkpoint whose tokenizer or image processor reads it; tensors need neither.
        model: its transformers model, perhaps on meta, which says how it takes a text.
        window, samples: tokens of one sample of text, and at most so many samples.
        labels: keep tensors of that name.
        where: revision, token, local_files_only of a checkpoint on the hub.

    Raises:
        SourceError: a file that cannot be read, or a checkpoint that has no tokenizer or processor. CalibrationError: nothing in it.
    """
    path = Path(file)
    if path.suffix == ".safetensors":
        return _tensors(path, samples, labels)
    pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES) if path.is_dir() else []
    if pictures:
        return _pictures(src, pictures[:samples], **where)
    return text_inputs(src, read_text(path), model, window=window, samples=samples, **where)


def read_text(path: Path) -> str:
    """Return a text file's contents, or those of all texts in a folder, in the order of their names."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXTS and p.is_file())
        if not files:
            raise SourceError(f"{path} holds neither texts ({', '.join(TEXTS)}) nor pictures ({', '.join(PICTURES)})")
        return "\n".join(map(read_text, files))
    try:
        return path.read_text("utf8")
    except UnicodeDecodeError as e:
        raise SourceError(f"{path} is no UTF-8 text: {e.reason} at byte {e.start}") from None


def _tensors(path: Path, samples: int | None, labels: bool) -> list[Any]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise SourceError(f"{path} is not a safetensors file: {e}") from None
    tensors = {k: t[:samples] for k, t in tensors.items() if t.ndim and (labels or k != LABELS)}
    sizes = {k: len(t) for k, t in tensors.items()}
    if not sizes or min(sizes.values()) == 0:
        raise CalibrationError(f"{path} holds no samples; name its tensors after the arguments of the model's forward")
    if len(set(sizes.values())) > 1:
        raise SourceError(f"{path}: its tensors hold different numbers of samples: {sizes}")
    count = min(sizes.values())
    return [{k: t[i : i + ROWS] for k, t in tensors.items()} for i in range(0, count, ROWS)]


def _pictures(src: str | Path, files: list[Path], **where: Any) -> list[Any]:
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


def text_inputs(
    src: str | Path, text: str, model: Any, *, window: int = 512, samples: int | None = 128, **where: Any
) -> list[Any]:
    """Return a text as inputs to calibrate a transformers checkpoint on, by its tokenizer.

    Args:
        src, model, where: as for `read_inputs`.
        window: tokens of one sample, or what the text or the model's positions allow.
        samples: at most so many: windows of the text for a causal language model, lines for any other.

    Raises:
        SourceError: no tokenizer. CalibrationError: no text.
    """
    if getattr(model, "config", None) is None:
        raise SourceError(
            f"{src} has no config.json, and so no tokenizer for a text; give tensors in a .safetensors file"
        )
    words = tokenizer_of(src, **where)
    window = min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)
    if not model.can_generate() or model.config.is_encoder_decoder:
        lines = sorted(
            [line for line in text.splitlines() if line.strip()][:samples], key=len
        )  # so that few are padded much
        batches = [dict(batch) for batch in tokenized(words, lines, window)]
        if model.config.is_encoder_decoder:
            batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    else:
        ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        window = max(1, min(window, len(ids)))
        rows = ids[: len(ids) // window * window].view(-1, window)[:samples]
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


def tokenized(words: Any, lines: list[str], window: int) -> Iterable[Any]:
    """Return lines as padded batches, of at most `window` tokens."""
    for i in range(0, len(lines), ROWS):
        yield words(lines[i : i + ROWS], padding=True, truncation=True, max_length=window, return_tensors="pt")
