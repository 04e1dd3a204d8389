"""Answers: what the base and the converted model say to the same inputs, side by side.

| the model | the input | the answer |
|---|---|---|
| generates text | the beginning of a line | how it goes on, greedily |
| classifies | a line, a picture, tensors | the likeliest classes |
| fills in words | a line with one word masked | the likeliest words |
| makes vectors of texts | a line | the nearest of the other lines |
| gives one number | a line, a picture, tensors | the number |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.core.results import Answer
from rpq_convert.errors import EvaluateError
from rpq_convert.evaluation.outputs import CLASSES, NUMBERS, kind_of, main_output
from rpq_convert.layers.precision import fitting
from rpq_convert.running.call import call
from rpq_convert.running.state import kept

BEGINNING, ANSWER = 24, 40  # tokens that a language model is given of a line, and those that it says
BEST = 3  # classes or words that are shown
CROWD = 64  # lines among which the nearest is sought

Describe = Callable[[Any], list[str]]


@torch.inference_mode()
def text_answers(dense: Any, converted: Any, texts: Sequence[str], tokenizer: Any, count: int) -> list[Answer]:
    """Return the answers of two language models, classifiers or masked language models of texts.

    Args:
        texts: lines; the first `count` of those with words are asked.
        tokenizer: of the base.
    """
    asked = [t.strip() for t in texts if t.strip()][:count]
    if dense.can_generate():
        said = [[_continued(m, tokenizer, text) for text in asked] for m in (dense, converted)]
        shown = [tokenizer.decode(_beginning(dense, tokenizer, text)[0], skip_special_tokens=True) for text in asked]
        return [Answer(f"{q} …", a, b) for q, a, b in zip(shown, *said)]
    if tokenizer.mask_token is not None and dense.get_output_embeddings() is not None:
        pairs = [_masked(tokenizer, text) for text in asked]
        said = [[_filled(m, tokenizer, text) for text, _ in pairs] for m in (dense, converted)]
        return [Answer(f"{text} (it was {word!r})", a, b) for (text, word), a, b in zip(pairs, *said)]
    batches = [dict(tokenizer(text, return_tensors="pt", truncation=True)) for text in asked]
    return batch_answers(dense, converted, batches, count, asked)


def _beginning(model: Any, tokenizer: Any, text: str) -> Tensor:
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids if model.config.is_encoder_decoder else ids[:, :BEGINNING]


def _continued(model: Any, tokenizer: Any, text: str) -> str:
    ids = _beginning(model, tokenizer, text)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or ids.shape[1] + ANSWER
    new = max(1, min(ANSWER, longest - ids.shape[1]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=pad
    )
    fresh = made[0] if model.config.is_encoder_decoder else made[0, ids.shape[1] :]
    return " ".join(str(tokenizer.decode(fresh, skip_special_tokens=True)).split())


def _masked(tokenizer: Any, text: str) -> tuple[str, str]:
    """Return a line with the word in its middle masked, and that word."""
    words = text.split()[:BEGINNING]
    middle = len(words) // 2
    return " ".join([*words[:middle], tokenizer.mask_token, *words[middle + 1 :]]), words[middle]


def _filled(model: Any, tokenizer: Any, text: str) -> str:
    batch = tokenizer(text, return_tensors="pt", truncation=True)
    place = (batch.input_ids[0] == tokenizer.mask_token_id).nonzero()
    if not len(place):
        return "(the masked word was cut off)"
    likely = model(**batch).logits[0, place[0, 0]].float().softmax(-1).topk(BEST)
    return _list((repr(tokenizer.decode([i])), p) for i, p in zip(likely.indices.tolist(), likely.values.tolist()))


@torch.inference_mode()
def nearest_answers(dense: Any, converted: Any, texts: Sequence[str], tokenizer: Any, count: int) -> list[Answer]:
    """Return, for lines, the nearest other line by the vectors of either model.

    Args:
        dense, converted: give one vector for each text (`Pooled`).
    """
    lines = [t.strip() for t in texts if t.strip()][:CROWD]
    if len(lines) < 3:
        raise EvaluateError("the nearest text needs at least three lines to choose from; give a longer text")
    batch = tokenizer(lines, return_tensors="pt", padding=True, truncation=True)
    said = []
    for model in (dense, converted):
        vectors = F.normalize(model(**batch).float(), dim=-1)
        likeness, place = (vectors @ vectors.T).fill_diagonal_(-2).max(-1)
        said.append([f"{lines[i]} ({c:.3f})" for i, c in zip(place.tolist(), likeness.tolist())])
    return [Answer(q, a, b) for q, a, b in list(zip(lines, *said))[:count]]


@torch.inference_mode()
def batch_answers(
    dense: Any, converted: Any, batches: Sequence[Any], count: int, questions: Sequence[str] = ()
) -> list[Answer]:
    """Return the answers of two models to inputs that are ready, rows of batches.

    Args:
        questions: what each row is called; by default its number.

    Raises:
        EvaluateError: outputs that no words or numbers can show, such as pictures.
    """
    found: list[tuple[str, str]] = []
    names = getattr(getattr(dense, "config", None), "id2label", None) or {}
    with kept(dense, converted) as restore:
        for item in batches:
            if len(found) >= count:
                break
            inputs = {k: v for k, v in item.items() if k != "labels"} if isinstance(item, Mapping) else item
            restore()
            outputs = [call(dense, inputs), call(converted, fitting(inputs, dense, converted))]
            describe = _describe(outputs[0], inputs, names)
            found += zip(*(describe(main_output(o)) for o in outputs))
    asked = [*questions, *(f"sample {i + 1}" for i in range(len(questions), len(found)))]
    return [Answer(q, a, b) for q, (a, b) in list(zip(asked, found))[:count]]


def _describe(output: Any, inputs: Any, names: Mapping[int, str]) -> Describe:
    """Return what writes the rows of an output of this kind in words."""
    kind, main = kind_of(output, inputs), main_output(output)
    if kind == CLASSES and main.ndim == 2:
        return lambda rows: [_classes(row, names) for row in rows]
    if kind == NUMBERS and main.ndim <= 2:
        return lambda rows: [f"{x:.4g}" for x in rows.reshape(-1).tolist()]
    raise EvaluateError(f"outputs of {list(main.shape)} are no answers that can be shown; leave out --samples")


def _classes(row: Tensor, names: Mapping[int, str]) -> str:
    likely = row.float().softmax(-1).topk(min(BEST, len(row)))
    return _list((names.get(i, f"class {i}"), p) for i, p in zip(likely.indices.tolist(), likely.values.tolist()))


def _list(found: Any) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in found)
