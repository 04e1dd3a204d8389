"""Inputs: files as what a model is run on, to calibrate it, to tune it and to evaluate it.

A text or a folder of texts, as a checkpoint's own tokenizer cuts it; a folder of pictures, through its own image processor; or,
for any module at all, a safetensors file whose tensors are named after the arguments of the model's forward, one sample a
row. Without any, inputs are made up: a language model writes texts, others get random tokens or smooth noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rpq_convert.calibration import CalibrationError
from rpq_convert.opened import open_checkpoint
from rpq_convert.source import SourceError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEXTS = (".txt", ".md", ".rst")
ROWS = 16  # samples of a batch
OWN_ROWS = 8  # of inputs that are made up: the first batch is run some times more than the others
PICTURE = 224  # pixels of a side, where a model does not say; convnets take any
SENTENCE = 4, 25  # random tokens of one, from and below
COLOUR = 0.3  # share of a made-up picture's variance that channels do not share
LABELS = "labels"  # of a file: what a classifier should say; only an evaluation reads them


def read_inputs(
    file: str | Path, src: str | Path, *, window: int = 512, samples: int | None = 128, labels: bool = False, **where: Any
) -> list[Any]:
    """Return what a file or folder holds as batches for a model.

    Args:
        file: a text, a folder of texts or of pictures, or a .safetensors file of named arguments, samples along the first axis.
        src: the checkpoint whose tokenizer or image processor reads it; tensors need neither.
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
    return text_inputs(src, read_text(path), window=window, samples=samples, **where)


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
        raise SourceError(f"{path} is no safetensors file: {e}") from None
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
    src: str | Path, text: str, *, window: int = 512, samples: int | None = 128, revision: str | None = None,
    token: str | bool | None = None, local_files_only: bool = False,
) -> list[Any]:  # fmt: skip
    """Return a text as inputs to calibrate a transformers checkpoint on, by its tokenizer.

    Args:
        src: a hub id or folder.
        window: tokens of one sample, or what the text or the model's positions allow.
        samples: at most so many: windows of the text for a causal language model, lines for any other.

    Raises:
        SourceError: no tokenizer. CalibrationError: no text.
    """
    where: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
    model: Any = open_checkpoint(src, need="config", **where).model
    if model is None:
        raise SourceError(f"{src} has no config.json, and so no tokenizer for a text; give tensors in a .safetensors file")
    words = tokenizer_of(src, **where)
    window = min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)
    if not model.can_generate() or model.config.is_encoder_decoder:
        lines = sorted([line for line in text.splitlines() if line.strip()][:samples], key=len)  # so that few are padded much
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


def _companion(reader: Any, src: str | Path, **options: Any) -> Any:
    try:
        return reader.from_pretrained(src, **options)
    except (OSError, ValueError, ImportError) as e:
        raise SourceError(f"{src}: {str(e).strip().splitlines()[0]}") from None


def tokenized(words: Any, lines: list[str], window: int) -> Iterable[Any]:
    """Return lines as padded batches, of at most `window` tokens."""
    for i in range(0, len(lines), ROWS):
        yield words(lines[i : i + ROWS], padding=True, truncation=True, max_length=window, return_tensors="pt")


def own_inputs(
    model: Any, *, samples: int = 64, window: int = 128, batch: int = 64, seed: int = 0,
    shape: tuple[int, int, int] | None = None,
) -> list[Any]:  # fmt: skip
    """Return inputs that are made up, to calibrate a model where no data is at hand.

    A causal language model writes texts itself. Any other transformers model of token ids gets random ones, in as many tokens;
    one of pictures, smooth noise.

    Args:
        samples, window: how many, and tokens of each.
        batch: samples that a language model writes side by side.
        seed: decides them all.
        shape: channels, height and width of pictures, for any module of one tensor of them; transformers and timm models
            know theirs.

    Raises:
        CalibrationError: inputs of this model cannot be made up.

    Example:
        >>> rpq.convert(model, bits=4, calibration=rpq.own_inputs)
        >>> rpq.convert(resnet50(), bits=4, calibration=partial(rpq.own_inputs, shape=(3, 224, 224)))
    """
    g = torch.Generator().manual_seed(seed)
    config: Any = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    decodes = getattr(config, "is_encoder_decoder", False)
    mixed = decodes or (hasattr(config, "text_config") and hasattr(config, "vision_config"))  # takes several kinds of inputs
    if not isinstance(kind, str):
        shape = shape or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    elif kind == "pixel_values":
        size = getattr(config, "image_size", PICTURE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = shape or (getattr(config, "num_channels", 3), height, width)
    elif kind == "input_ids" and model.can_generate() and not decodes:
        return _written(model, samples, window, batch, g)
    elif kind == "input_ids" and not mixed:
        return _random_tokens(model, samples * window, g)
    if shape is None or mixed:
        raise CalibrationError(
            f"inputs of {type(model).__name__} cannot be made up; give it some, or, if it takes pictures, "
            "own_inputs(model, shape=(channels, height, width))"
        )
    pictures = [part.to(_device(model)) for part in _noise(samples, shape, g).split(OWN_ROWS)]
    return [{kind: part} for part in pictures] if kind else pictures


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _written(model: Any, samples: int, window: int, batch: int, g: torch.Generator) -> list[Any]:
    """Return texts, each started by a random token and sampled at temperature 1 (LLM-QAT, Liu et al. 2023, arXiv:2305.17888)."""
    training, found = model.training, []
    model.eval()
    try:
        for start in range(0, samples, batch):
            size = min(batch, samples - start)
            words = model.get_input_embeddings().weight.shape[0]
            ids, past = torch.randint(words, (size, 1), generator=g).to(_device(model)), None
            while ids.shape[1] < window:  # by hand: `generate` draws from the global generator
                out = model(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
                past = getattr(out, "past_key_values", None)
                summed = out.logits[:, -1].cpu().double().softmax(-1).cumsum(-1)  # torch.multinomial takes ten times as long
                drawn = torch.searchsorted(summed, torch.rand(size, 1, generator=g, dtype=summed.dtype) * summed[:, -1:])
                ids = torch.cat([ids, drawn.clamp_max(words - 1).to(ids.device)], 1)
            found += [{"input_ids": part} for part in ids.split(OWN_ROWS)]
    finally:
        model.train(training)
    return found


def _random_tokens(model: Any, tokens: int, g: torch.Generator) -> list[Any]:
    """Return batches of random tokens, each as short as some sentence."""
    words, found = model.get_input_embeddings().weight.shape[0], []
    while tokens > 0:
        size = int(torch.randint(*SENTENCE, (1,), generator=g))
        found.append({"input_ids": torch.randint(words, (OWN_ROWS, size), generator=g).to(_device(model))})
        tokens -= OWN_ROWS * size
    return found


def _noise(samples: int, shape: tuple[int, int, int], g: torch.Generator) -> Tensor:
    """Return pictures [samples, channels, height, width] of variance 1 in each, and a colour of its own.

    Amplitudes fall as 1 / f^p, p from that of photographs, 1, to 3, pictures with hardly an edge: the range is what counts
    (docs/architecture.md has figures).
    """
    channels, height, width = shape
    powers = torch.linspace(1, 3, samples)[torch.randperm(samples, generator=g)].view(-1, 1, 1, 1)
    frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt() * max(height, width)
    frequency[0, 0] = torch.inf  # no mean
    white = torch.randn(samples, channels, height, width, generator=g)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) * frequency**-powers, s=(height, width))
    grey = smooth.mean(1, keepdim=True) * (channels * (1 - COLOUR)) ** 0.5
    mixed = grey + smooth * COLOUR**0.5
    return mixed / mixed.std((1, 2, 3), keepdim=True) + 0.5 * torch.randn(samples, channels, 1, 1, generator=g)
