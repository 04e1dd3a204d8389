"""Chat: a talk with a language model in a terminal, its answers streamed as they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rpq_convert.errors import EvaluateError
from rpq_convert.hf import torchvision

torchvision.fix()

from transformers import TextStreamer  # noqa: E402

Write = Callable[[str], None]


class Talker:
    """One side of a talk: a model with what was said to it so far.

    Args:
        model, tokenizer: a model that generates text. Without a chat template each text is continued by itself.
        max_tokens: of one answer, at most.
        temperature: 0 takes the likeliest token every time.
        seed: decides what is drawn.

    Raises:
        EvaluateError: the model generates no text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_tokens: int = 200, temperature: float = 0.7, seed: int = 0
    ) -> None:
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise EvaluateError(f"{type(model).__name__} generates no text, so there is nobody to talk to")
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.said: list[dict[str, str]] = []

    @property
    def remembers(self) -> bool:
        """Whether answers take what was said before into account, by the tokenizer's chat template."""
        return self.tokenizer.chat_template is not None

    def forget(self) -> None:
        self.said.clear()

    def answer(self, text: str, write: Write) -> str:
        """Answer a text; `write` is given the answer in pieces as it is made. An interrupt ends the answer, not the talk.

        Raises:
            EvaluateError: what was said so far is longer than the model's positions, or does not fit the chat template.
        """
        said = [*self.said, {"role": "user", "content": text}]
        inputs = self._inputs(said)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if longest is not None and length >= longest:
            raise EvaluateError(f"the talk has {length} tokens, and the model {longest} positions; /new begins anew")
        most = self.max_tokens if longest is None else min(self.max_tokens, longest - length)
        stream = _Stream(self.tokenizer, write)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            drawn = {"do_sample": True, "temperature": self.temperature}
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + len(self.said))
            try:
                self.model.generate(**inputs, max_new_tokens=most, streamer=stream, pad_token_id=pad, **drawn)
            except KeyboardInterrupt:
                stream.end()
        if self.remembers:
            self.said = [*said, {"role": "assistant", "content": stream.text}]
        return stream.text

    def _inputs(self, said: list[dict[str, str]]) -> dict[str, Any]:
        if not self.remembers:
            return dict(self.tokenizer(said[-1]["content"], return_tensors="pt", return_token_type_ids=False))
        try:
            return dict(
                self.tokenizer.apply_chat_template(
                    said, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            )
        except Exception as e:  # templates raise what they like over roles that they do not know
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise EvaluateError(f"the talk does not fit the tokenizer's chat template: {reason}") from None


class _Stream(TextStreamer):
    """Gives the pieces of an answer away as soon as they are whole words, and keeps all of it."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)
