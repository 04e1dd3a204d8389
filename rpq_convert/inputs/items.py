"""Items: data as people have it, as inputs that a model can be called on.

Calibration, tuning, evaluation and the measuring of sensitivities take their data through `prepare`: texts, chats, rows of a data
set, arrays, pictures, batches. What cannot be an input is refused in one line that names the argument and the item.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rpq_convert.errors import CalibrationError, SourceError
from rpq_convert.inputs import files
from rpq_convert.inputs.found import find_data, is_path
from rpq_convert.inputs.synthetic import own_inputs
from rpq_convert.inputs.tables import PAIR_NAMES
from rpq_convert.layers.precision import dtype_of
from rpq_convert.running.text_config import text_config, vocabulary

WINDOW = 512  # tokens of a text, where the model allows as many
CHAT = ("messages", "conversation", "conversations", "chat")  # columns of a row that hold a chat
TEXT = ("text", "content", "sentence", "document")  # and a text
PAIR = ("prompt", "completion")
SPARE = (
    "idx",
    "id",
    "label",
    "labels",
    "length",
    "special_tokens_mask",
    "token_type_ids",
    "overflow_to_sample_mapping",
)  # columns that are no inputs
VECTORS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids", "labels")

Words = str | Sequence[str]
Calibration = Any  # data as `prepare` takes it


def prepare(data: Any, model: Any, name: str, *, tokenizer: Any = None, labels: bool = False) -> list[Any]:
    """Return data as a list of inputs, each a tensor, a tuple of arguments or a dict of keyword arguments.

    Args:
        data: an input or an iterable of inputs: tensors, arrays, numbers in lists, tuples of arguments, dicts and batches of
            tokenizers, rows of a data set, texts, pairs of texts (tuples), chats (lists of role and content), pictures; a file or folder, as
            `read_inputs` takes it (as text too, where it is there or ends like one); a function of the model that returns any of these;
            or "self" for synthetic inputs, as on the command line.
        model: what will be called on them.
        name: of the caller's argument, for messages.
        labels: keep the labels in dicts, though the model does not take them.
        tokenizer: reads texts, chats and pictures; by default that of the folder that the model came from.

    Raises:
        CalibrationError: an item that cannot be an input of this model.
    """
    maker = _Maker(model, name, tokenizer, labels)
    if isinstance(data, str) and data == "self":
        data = own_inputs
    if callable(data) and not isinstance(data, (Mapping, nn.Module)) and not hasattr(data, "__getitem__"):
        data = data(model)
    if isinstance(data, Path) or (isinstance(data, str) and is_path(data)):
        src = "" if find_data(data).kind == "tensors" else maker.folder()  # tensors need no tokenizer
        return files.read_inputs(data, src, model=model, labels=labels)
    if isinstance(data, Mapping) and data and all(hasattr(part, "column_names") for part in data.values()):
        raise CalibrationError(
            f"{name} holds the splits {', '.join(map(str, data))}; choose one: data[{next(iter(data))!r}]"
        )
    items = [data] if _is_one(data) else _listed(data, name)
    return [maker.make(item, i) for i, item in enumerate(items)]


def _listed(data: Any, name: str) -> list[Any]:
    try:
        return list(data)
    except TypeError:
        raise CalibrationError(
            f"{name}: {type(data).__name__} is no data; give a list of inputs, texts or chats"
        ) from None


def _is_one(data: Any) -> bool:
    """Say whether data is a single input rather than an iterable of them."""
    if isinstance(data, (str, Tensor, np.ndarray, Mapping)) or _is_picture(data):
        return True
    return isinstance(data, list) and bool(data) and (_is_chat(data) or all(isinstance(n, int) for n in data))


def _is_picture(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "PIL"


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in value)
    )


class _Maker:
    """Makes inputs of one model."""

    def __init__(self, model: Any, name: str, tokenizer: Any, labels: bool) -> None:
        self.model, self.name, self.reader = model, name, tokenizer
        self.kept = {files.LABELS} if labels else set()
        try:
            found = list(inspect.signature(getattr(model, "forward", model)).parameters.values())
        except ValueError:  # compiled functions have none
            open_ended = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
            found = [inspect.Parameter(f"a{i}", kind) for i, kind in enumerate(open_ended)]
        kinds = inspect.Parameter
        self.takes = [p.name for p in found if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        self.count = sum(p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD) for p in found)
        self.any_count = any(p.kind == kinds.VAR_POSITIONAL for p in found)
        self.any_name = any(p.kind == kinds.VAR_KEYWORD for p in found)
        self.tokens = getattr(model, "main_input_name", None) == "input_ids"

    def make(self, item: Any, number: int) -> Any:
        self.at = f"{self.name}[{number}]"
        made = self._made(item)
        self._check(made)
        return made

    def _made(self, item: Any) -> Any:
        if isinstance(item, str):
            return self._text(item)
        if _is_picture(item):
            return self._processed(images=item)
        if _is_chat(item):
            return self._chat(item)
        if isinstance(item, Mapping):
            return self._row(item)
        if isinstance(item, (tuple, list)) and item and (words := _words_of(item)):
            return self._text(*words)
        if isinstance(item, list) and item and all(map(_is_picture, item)):
            return self._processed(images=item)
        arrays = isinstance(item, (tuple, list)) and any(isinstance(part, (Tensor, np.ndarray)) for part in item)
        if isinstance(item, list) and not arrays and _is_numbers(item):
            return self._batch_of_one(self._tensor(item))
        if isinstance(item, (tuple, list)) and item:
            taken = item if self.any_count else item[: self.count]  # a data set's labels come last
            made = tuple(self._tensor(part) if _is_numbers(part) else part for part in taken)
            return (self._batch_of_one(made[0]), *made[1:]) if isinstance(made[0], Tensor) else made
        if isinstance(item, (Tensor, np.ndarray)):
            return self._batch_of_one(self._tensor(item))
        raise CalibrationError(
            f"{self.at} is {type(item).__name__}; give a tensor, a tuple of arguments, a dict, a text or a chat"
        )

    def _tensor(self, value: Any) -> Tensor:
        """Return numbers as a tensor that counts what is written to it, on no other device; arrays in the model's dtype."""
        if isinstance(value, Tensor):
            return value.clone() if value.is_inference() else value
        try:
            found = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            raise CalibrationError(f"{self.at} holds {type(value).__name__} that is no array of numbers") from None
        return found.to(dtype_of(self.model)) if found.is_floating_point() else found

    def _batch_of_one(self, x: Tensor) -> Tensor:
        """Return the ids of one sequence with an axis for samples, which transformers' models need."""
        return x[None] if x.ndim == 1 and self.tokens and not x.is_floating_point() else x

    def _row(self, row: Mapping[str, Any]) -> Any:
        """Return the arguments that a row, a batch or a dict holds; of its texts, chats and pictures where it holds those."""
        row = dict(row)
        picture = next((v for v in row.values() if _is_picture(v)), None)
        chat = next((row[n] for n in CHAT if _is_chat(row.get(n))), None)
        texts = {n: v for n, v in row.items() if _is_text(v) and n not in self.takes}
        text = next((texts[n] for n in TEXT if n in texts), None)
        pair = next(([texts[n] for n in both] for both in PAIR_NAMES if all(n in texts for n in both)), None)
        if all(n in row for n in PAIR):
            first, last = (row[n] for n in PAIR)
            both = isinstance(first, str) and isinstance(last, str)
            chat, text = (chat, first + last) if both else ([*first, *last] if _is_chat(first) else chat, text)
        if picture is not None:
            return self._processed(images=picture, **({} if text is None else {"text": text}))
        if chat is not None:
            return self._chat(chat)
        if pair is not None:
            return self._text(*pair)
        if text is not None:
            return self._text(text)
        known = {
            n: v for n, v in row.items() if n in self.takes or n in self.kept or (self.any_name and _is_numbers(v))
        }
        known = {n: v for n, v in known.items() if n not in SPARE or n in (*self.takes, *self.kept)}
        strange = [n for n, v in row.items() if n not in known and n not in SPARE and _is_numbers(v)]
        if strange or not any(n in self.takes or (self.any_name and not self.takes) for n in known):
            what = ", ".join(self.takes[:6]) or "none by name"
            raise CalibrationError(
                f"{self.at}: {type(self.model).__name__} takes no argument {next(iter(strange or row), '')!r}; it takes {what}"
            )
        made = {n: self._tensor(v) if _is_numbers(v) else v for n, v in known.items()}
        if self.tokens and isinstance(ids := made.get("input_ids"), Tensor) and ids.ndim == 1:
            alone = {n for n, v in made.items() if isinstance(v, Tensor) and v.ndim == 1 and n in VECTORS}
            made = {n: v[None] if n in alone else v for n, v in made.items()}
        return made

    def folder(self) -> str:
        config = getattr(self.model, "config", None)
        found = getattr(self.model, "name_or_path", None) or getattr(config, "_name_or_path", None)
        if not found:
            raise CalibrationError(
                f"{self.at if hasattr(self, 'at') else self.name} needs a tokenizer or processor, and {type(self.model).__name__} "
                "comes from no folder that has one; give tokenizer="
            )
        return str(found)

    def _words(self) -> Any:
        if self.reader is None:
            self.reader = self._companion(files.tokenizer_of)
        return getattr(self.reader, "tokenizer", self.reader)

    def _companion(self, read: Callable[..., Any]) -> Any:
        src = self.folder()
        try:
            return read(src) if Path(src).is_dir() else read(src, local_files_only=True)
        except SourceError as e:
            raise CalibrationError(f"{self.at} needs a tokenizer or processor; give tokenizer= ({e})") from None

    def _window(self) -> int:
        text = text_config(getattr(self.model, "config", None), "encoder")
        return min(WINDOW, getattr(text, "max_position_embeddings", None) or WINDOW)

    def _text(self, text: Words, second: Words | None = None) -> Any:
        """Return the arguments that a text, or a pair of texts, is read as; or a batch of them."""
        words = self._words()
        many, seconds = ([t] if isinstance(t, str) else None if t is None else list(t) for t in (text, second))
        if not any(part.strip() for part in (*many, *(seconds or ()))):  # type: ignore[misc]
            raise CalibrationError(f"{self.at} is an empty text")
        if len(many) > 1 and getattr(words, "pad_token", "") is None:  # type: ignore[arg-type]
            words.pad_token = words.eos_token
        how = {"truncation": True, "max_length": self._window(), "return_tensors": "pt"}
        return self._taken(words(many, seconds, padding=len(many) > 1, **how))  # type: ignore[arg-type]

    def _chat(self, turns: Sequence[Mapping[str, Any]]) -> Any:
        reader = self._words() if self.reader is None else self.reader
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            found = reader.apply_chat_template(list(turns), truncation=True, max_length=self._window(), **how)
        except (ValueError, AttributeError) as e:
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise CalibrationError(f"{self.at} is a chat, and the tokenizer cannot read it: {reason}") from None
        return self._taken(found)

    def _processed(self, **parts: Any) -> Any:
        if self.reader is None:
            self.reader = self._companion(files.processor_of)
        try:
            found = self.reader(**parts, return_tensors="pt")
        except (TypeError, ValueError) as e:
            raise CalibrationError(f"{self.at}: the processor cannot read it: {str(e).splitlines()[0]}") from None
        return self._taken(found)

    def _taken(self, found: Mapping[str, Any]) -> dict[str, Any]:
        made = {n: v for n, v in found.items() if n in self.takes or (self.any_name and n != "token_type_ids")}
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False) and "input_ids" in made:
            made.setdefault("decoder_input_ids", made["input_ids"])
        return made

    def _check(self, made: Any) -> None:
        """Refuse ids that the model has no entry for, more of them than positions, and numbers that are none."""
        named = made if isinstance(made, Mapping) else {"": made} if isinstance(made, Tensor) else {}
        for name, value in named.items():
            if not isinstance(value, Tensor) or value.is_meta:
                continue
            what = f"{self.at}{name and f'[{name!r}]'}"
            if value.numel() == 0:
                raise CalibrationError(f"{what} is empty: {list(value.shape)}")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()) and "mask" not in name:
                raise CalibrationError(f"{what} holds NaN or infinite values")
            if self.tokens and name in ("", "input_ids"):
                self._check_ids(value, what)

    def _check_ids(self, ids: Tensor, what: str) -> None:
        if ids.is_floating_point():
            raise CalibrationError(f"{what} is {str(ids.dtype).removeprefix('torch.')}; token ids are int64")
        size = vocabulary(self.model)
        low, high = int(ids.min()), int(ids.max())
        if size is not None and not (low >= 0 and high < size):
            wrong = low if low < 0 else high
            raise CalibrationError(
                f"{what} holds the id {wrong}; {type(self.model).__name__} has entries 0 to {size - 1}"
            )
        config = text_config(self.model.config, "encoder")
        most = getattr(config, "max_position_embeddings", None)
        absolute = getattr(config, "rope_parameters", None) is None and getattr(config, "rope_theta", None) is None
        if most and absolute and ids.shape[-1] > most:
            raise CalibrationError(f"{what} has {ids.shape[-1]} tokens; {type(self.model).__name__} takes {most}")


def _is_text(value: Any) -> bool:
    """Say whether a value is a text, or a batch of texts."""
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, str) for v in value)
    )


def _words_of(item: Sequence[Any]) -> list[Words]:
    """Return the text, or the two texts of a pair, that a list or tuple holds; nothing, where it holds none.

    A list of texts is a batch; a tuple is what a data set gives: a text or a pair, or batches of these, and labels after them.
    """
    if not _is_text(item[0]):
        return []
    if all(isinstance(part, str) for part in item) and (isinstance(item, list) or len(item) != 2):
        return [list(item)]
    first = item[0]
    second = item[1] if len(item) > 1 and _is_text(item[1]) else None
    pair = second is not None and (isinstance(first, str) == isinstance(second, str))
    return [first, second] if pair and (isinstance(first, str) or len(first) == len(second)) else [first]  # type: ignore[list-item, arg-type]


def _is_numbers(value: Any) -> bool:
    """Say whether a value is a tensor, an array, or numbers in lists."""
    if isinstance(value, (Tensor, np.ndarray, bool, int, float, np.number)):
        return True
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_numbers, value))
