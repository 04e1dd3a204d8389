"""Texts for models of text: windows and lines as a checkpoint's tokenizer cuts them, to calibrate, to tune
and to evaluate with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpq_convert.calibration import CalibrationError
from rpq_convert.checkpoint import load, save
from rpq_convert.evaluation import Evaluation, evaluate
from rpq_convert.folder import FolderError
from rpq_convert.opened import open_checkpoint
from rpq_convert.source import SourceError
from rpq_convert.tuning import Tuning, tune


def compare(
    base: str | Path,
    folder: str | Path,
    text: str,
    *,
    window: int = 512,
    windows: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate a converted folder against its dense checkpoint on a text, with the checkpoint's tokenizer.

    A causal language model predicts windows of the text; of any other text model the mean-pooled embeddings of its lines
    are compared.

    Raises:
        SourceError: a folder is not what it should be, or the base has no tokenizer. EvaluateError: too little text.
    """
    converted: Any = load(folder)
    dense = _dense(base, converted)
    words = _tokenizer(base)
    if converted.can_generate():
        ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        ids = ids[: windows * window] if windows else ids
        total = max(1, len(ids) // window)
        told = None if say is None else lambda done: say(f"{done} of {total} windows")
        return evaluate(dense, converted, ids, window=window, progress=told)
    batches = _lines(words, text, window, windows)
    told = None if say is None else lambda done: say(f"{done} of {len(batches)} batches")
    return evaluate(Pooled(dense), Pooled(converted), batches, progress=told)


@torch.no_grad()
def own_inputs(model: Any, *, samples: int = 64, window: int = 128, batch: int = 16, seed: int = 0) -> list[Any]:
    """Return texts that a causal language model writes itself, to calibrate it where no text is at hand.

    Each starts with a random token and is sampled at temperature 1 (as in LLM-QAT, Liu et al. 2023, arXiv:2305.17888).

    Args:
        samples, window: how many, and tokens of each.
        batch: samples written side by side.
        seed: decides them all.

    Raises:
        CalibrationError: the model is no causal language model.

    Example:
        >>> rpq.convert(model, bits=4, calibration=rpq.own_inputs)
    """
    if not getattr(model, "can_generate", bool)() or model.config.is_encoder_decoder:
        raise CalibrationError(f"{type(model).__name__} writes no text of its own to calibrate on; give it inputs")
    g = torch.Generator().manual_seed(seed)
    training, found = model.training, []
    model.eval()
    try:
        for start in range(0, samples, batch):
            size = min(batch, samples - start)
            words = model.get_input_embeddings().weight.shape[0]
            ids, past = torch.randint(words, (size, 1), generator=g), None
            while ids.shape[1] < window:  # by hand: `generate` draws from the global generator
                out = model(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
                past = getattr(out, "past_key_values", None)
                chances = out.logits[:, -1].float().softmax(-1)
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=g)], 1)
            found.append({"input_ids": ids})
    finally:
        model.train(training)
    return found


def tune_folder(
    base: str | Path,
    folder: str | Path,
    out: str | Path,
    text: str,
    *,
    window: int = 256,
    samples: int = 512,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Tuning:
    """Tune a converted folder against its dense checkpoint on a text, into another folder.

    Args:
        base, folder, out: the dense checkpoint, its conversion, and the folder to make.
        window, samples: as for `text_inputs`.
        overwrite: replace `out`.
        options: those of `tune`. A killed run goes on when it is repeated.

    Raises:
        SourceError, FolderError: as `load` and `save`. CalibrationError: no text. TuneError: as `tune`.
    """
    from rpq_convert.integrations.transformers import extra_files

    place = Path(out)
    if place.exists() and not overwrite:
        raise FolderError(f"{place} exists; choose another folder or pass --overwrite")
    model: Any = load(folder)
    data = text_inputs(base, text, window=window, samples=samples)
    told = None if say is None else lambda step, loss: say(f"step {step}: loss {loss:.4g}")
    file = place.with_name(place.name + ".tuning.safetensors")
    done = tune(model, _dense(base, model), data, checkpoint=file, progress=told, **options)
    save(model, place, overwrite=overwrite, files=extra_files(folder))
    return done


def _dense(base: str | Path, converted: Any) -> Any:
    try:
        return type(converted).from_pretrained(base).eval()
    except (OSError, ValueError) as e:
        raise SourceError(f"{base}: {str(e).strip().splitlines()[0]}") from None


def _tokenizer(src: str | Path, **where: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(src, **where)
    except (OSError, ValueError) as e:
        raise SourceError(f"{src}: {str(e).strip().splitlines()[0]}") from None


def _lines(words: Any, text: str, window: int, limit: int | None) -> list[Any]:
    """Return the text's lines, of at most `window` tokens, as batches of 16."""
    lines = sorted([line for line in text.splitlines() if line.strip()][:limit], key=len)  # so that few are padded much
    return [
        words(lines[i : i + 16], padding=True, truncation=True, max_length=window, return_tensors="pt")
        for i in range(0, len(lines), 16)
    ]


def text_inputs(
    src: str | Path, text: str, *, window: int = 512, samples: int = 128, revision: str | None = None,
    local_files_only: bool = False,
) -> list[Any]:  # fmt: skip
    """Return a text as inputs to calibrate a transformers checkpoint on, by its tokenizer.

    Args:
        src: a hub id or folder.
        window: tokens of one sample, or what the text or the model's positions allow.
        samples: at most so many: windows of the text for a causal language model, lines for any other.

    Raises:
        SourceError: no tokenizer. CalibrationError: no text.
    """
    where: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    model: Any = open_checkpoint(src, config_only=True, **where).model
    words = _tokenizer(src, **where)
    window = min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)
    if not model.can_generate() or model.config.is_encoder_decoder:
        batches = [dict(batch) for batch in _lines(words, text, window, samples)]
        if model.config.is_encoder_decoder:
            batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    else:
        ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        window = max(1, min(window, len(ids)))
        rows = ids[: len(ids) // window * window].view(-1, window)[:samples]
        batches = [{"input_ids": part} for part in rows.split(4) if len(part)]
    if not batches:
        raise CalibrationError("the calibration text is empty")
    return batches


class Pooled(nn.Module):
    """A text encoder's mean over tokens of its last hidden state: [sentences, width]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (self.model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
