"""Synthetic inputs: text that a language model writes, random tokens, smooth noise.

Calibration without data and sensitivities without data take their inputs from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.core.keywords import keywords
from rpq_convert.errors import CalibrationError
from rpq_convert.inputs.pictures import Shape, picture_shape
from rpq_convert.layers.precision import dtype_of
from rpq_convert.running.modes import quiet
from rpq_convert.running.text_config import vocabulary

BATCH = 8  # rows of a batch: calibration runs the first batch some times more than the others
PICTURE = 224  # pixels of a side, where a model does not say; convnets take any
SENTENCE = 4, 25  # random tokens of one, from and below
COLOUR = 0.3  # share of a picture's variance that channels do not share
SEQUENCES, TOKENS = 8, 128  # to measure sensitivities on: texts, and tokens of each
PICTURES = 8  # to measure sensitivities on

NONE = "nothing tells what it takes; give inputs of its own, or for pictures own_inputs(model, shape=(channels, height, width))"


@keywords()
def own_inputs(
    model: Any, *, samples: int = 64, window: int = 128, batch: int = 64, seed: int = 0, shape: Shape | None = None
) -> list[Any]:
    """Return synthetic inputs, to calibrate a model where no data is at hand.

    A causal language model writes texts itself. Any other transformers model of token ids gets random ones, in as many tokens;
    one of pictures, smooth noise, and so does any module of one tensor that runs on pictures (`inputs/pictures.py`).

    Args:
        samples, window: how many, and tokens of each.
        batch: samples that a language model writes side by side.
        seed: decides them all.
        shape: channels, height and width of pictures, for any module of one tensor of them; transformers and timm models
            know theirs, and others are tried.

    Raises:
        CalibrationError: synthetic inputs of this model cannot be made.

    Example:
        >>> rpq.convert(model, bits=4, calibration=rpq.own_inputs)
        >>> rpq.convert(resnet50(), bits=4, calibration=partial(rpq.own_inputs, shape=(3, 224, 224)))
    """
    g = torch.Generator().manual_seed(seed)
    kind = _kind(model, shape, search=True)
    if kind is None:
        raise _unknown(model)
    if kind == "tokens":
        return _random_tokens(model, samples * window, g)
    if not isinstance(kind, str):
        return _pictures(model, samples, kind, g, BATCH)
    found: list[Any] = []
    for start in range(0, samples, batch):
        first = torch.randint(vocabulary(model) or 0, (min(batch, samples - start), 1), generator=g)
        ids = _text(model, first, window, lambda logits: _inverted(logits, g))
        found += [{"input_ids": part} for part in ids.split(BATCH)]
    return found


def probe_inputs(model: Any, g: torch.Generator) -> list[Any]:
    """Return a few synthetic inputs to measure sensitivities on, or none where they cannot be made.

    A language model's texts begin with its first token, or a random one where it has none.
    """
    kind = _kind(model)
    if kind is None:
        return []
    if kind == "tokens":
        return _random_tokens(model, SEQUENCES * TOKENS, g)
    if not isinstance(kind, str):
        return _pictures(model, PICTURES, kind, g, 1)
    begin = getattr(model.config, "bos_token_id", None)
    if isinstance(begin, int):
        first = torch.full((SEQUENCES, 1), begin)
    else:
        first = torch.randint(vocabulary(model) or 0, (SEQUENCES, 1), generator=g)
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", None) or TOKENS)
    return [{"input_ids": ids[None]} for ids in _text(model, first, length, lambda logits: _drawn(logits, g))]


def _kind(model: Any, shape: Shape | None = None, *, search: bool = False) -> str | Shape | None:
    """Return what a model takes: "text" that it writes itself, "tokens", pictures of a shape; None where that is not known.

    Args:
        search: try which pictures a module takes that does not say it.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids" and not vocabulary(model):
        return None
    decodes = getattr(config, "is_encoder_decoder", False)
    if name == "input_ids" and not decodes and model.can_generate():
        return "text"
    if decodes or (hasattr(config, "text_config") and hasattr(config, "vision_config")):
        return None  # it takes several kinds of inputs
    if not isinstance(name, str):
        known: Shape | None = shape or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        return known or (picture_shape(model) if search and isinstance(model, nn.Module) else None)
    if name == "input_ids":
        return "tokens"
    if name == "pixel_values":
        size = getattr(config, "image_size", PICTURE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return shape or (getattr(config, "num_channels", 3), height, width)
    return shape


def own_kind(model: Any, *, search: bool = False) -> str:
    """Return what synthetic inputs of a model are, in words; empty where they cannot be made.

    Args:
        search: as `own_inputs` does, try which pictures a module takes that does not say it.
    """
    kind = _kind(model, search=search)
    if kind is None or isinstance(kind, str):
        return {"text": "texts that it writes", "tokens": "random tokens", None: ""}[kind]
    return f"noise pictures of {' x '.join(map(str, kind))}"


def check_own_inputs(model: Any) -> str:
    """Return `own_kind`, before any weight is there.

    Raises:
        CalibrationError: synthetic inputs of this model cannot be made.
    """
    if not (kind := own_kind(model, search=True)):
        raise _unknown(model)
    return kind


def _unknown(model: Any) -> CalibrationError:
    return CalibrationError(f"synthetic inputs of {type(model).__name__} cannot be made: {NONE}")


def writes_text(model: Any) -> bool:
    """Return whether a model is a causal language model, which writes its own text."""
    return _kind(model) == "text"


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _text(model: Any, first: Tensor, length: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ids [rows, length] that a language model writes after the first [rows, 1].

    Tokens are drawn at temperature 1 (LLM-QAT, Liu et al. 2023, arXiv:2305.17888): `draw` takes logits [rows, words] and returns
    ids [rows, 1]. `generate` of transformers would draw from the global generator.
    """
    ids, cache = first.to(_device(model)), None
    with quiet(model):
        while ids.shape[1] < length:
            output = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            ids = torch.cat([ids, draw(output.logits[:, -1]).to(ids.device)], 1)
    return ids


def _inverted(logits: Tensor, g: torch.Generator) -> Tensor:
    """Draw from softmax(logits) by inversion in fp64: torch.multinomial takes ten times as long on many rows."""
    summed = logits.cpu().double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(summed, torch.rand(len(summed), 1, generator=g, dtype=summed.dtype) * summed[:, -1:])
    return drawn.clamp_max(summed.shape[1] - 1)


def _drawn(logits: Tensor, g: torch.Generator) -> Tensor:
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=g)


def _random_tokens(model: Any, tokens: int, g: torch.Generator) -> list[Any]:
    """Return batches of random tokens, each as short as some sentence."""
    words, found = vocabulary(model) or 0, []
    while tokens > 0:
        size = int(torch.randint(*SENTENCE, (1,), generator=g))
        found.append({"input_ids": torch.randint(words, (BATCH, size), generator=g).to(_device(model))})
        tokens -= BATCH * size
    return found


def _pictures(model: Any, samples: int, shape: Shape, g: torch.Generator, batch: int) -> list[Any]:
    name = getattr(model, "main_input_name", None)
    pictures = [part.to(_device(model), dtype_of(model)) for part in _noise(samples, shape, g).split(batch)]
    return [{name: part} for part in pictures] if name else pictures


def _noise(samples: int, shape: tuple[int, int, int], g: torch.Generator) -> Tensor:
    """Return pictures [samples, channels, height, width] of variance 1 in each, and a colour of its own.

    Amplitudes fall as 1 / f^p, p from that of photographs, 1, to 3, pictures with hardly an edge: the range is what counts
    (docs/architecture.md has figures).
    """
    channels, height, width = shape
    powers = torch.linspace(1, 3, samples, dtype=torch.float32)[torch.randperm(samples, generator=g)].view(-1, 1, 1, 1)
    frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt() * max(
        height, width
    )
    frequency[0, 0] = torch.inf  # no mean
    white = torch.randn(samples, channels, height, width, generator=g, dtype=torch.float32)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) * frequency**-powers, s=(height, width))
    grey = smooth.mean(1, keepdim=True) * (channels * (1 - COLOUR)) ** 0.5
    mixed = grey + smooth * COLOUR**0.5
    return mixed / mixed.std((1, 2, 3), keepdim=True) + 0.5 * torch.randn(
        samples, channels, 1, 1, generator=g, dtype=torch.float32
    )
