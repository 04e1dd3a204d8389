"""Synthetic inputs: text that a language model writes, random tokens, smooth noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpq_convert.errors import CalibrationError

OWN_ROWS = 8  # of inputs that are made up: the first batch is run some times more than the others
PICTURE = 224  # pixels of a side, where a model does not say; convnets take any
SENTENCE = 4, 25  # random tokens of one, from and below
COLOUR = 0.3  # share of a made-up picture's variance that channels do not share


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
    mixed = decodes or (
        hasattr(config, "text_config") and hasattr(config, "vision_config")
    )  # takes several kinds of inputs
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
                summed = (
                    out.logits[:, -1].cpu().double().softmax(-1).cumsum(-1)
                )  # torch.multinomial takes ten times as long
                drawn = torch.searchsorted(
                    summed, torch.rand(size, 1, generator=g, dtype=summed.dtype) * summed[:, -1:]
                )
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
    frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt() * max(
        height, width
    )
    frequency[0, 0] = torch.inf  # no mean
    white = torch.randn(samples, channels, height, width, generator=g)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) * frequency**-powers, s=(height, width))
    grey = smooth.mean(1, keepdim=True) * (channels * (1 - COLOUR)) ** 0.5
    mixed = grey + smooth * COLOUR**0.5
    return mixed / mixed.std((1, 2, 3), keepdim=True) + 0.5 * torch.randn(samples, channels, 1, 1, generator=g)


SEQUENCES, TOKENS = 8, 128  # of the text that a model writes for itself
IMAGES = 8


def made_up(model: Any, generator: torch.Generator) -> list[Any]:
    """Return inputs for a transformers model from its config alone, or none."""
    config = getattr(model, "config", None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    words, size = getattr(config, "vocab_size", None), getattr(config, "image_size", None)
    if isinstance(words, int) and getattr(model, "main_input_name", "") == "input_ids":
        writes = getattr(model, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
        if writes:
            return [{"input_ids": ids[None]} for ids in _sampled(model, words, generator, device)]
        if not getattr(config, "is_encoder_decoder", False):
            tokens = torch.randint(words, (SEQUENCES, TOKENS), generator=generator).to(device)
            return [{"input_ids": ids[None]} for ids in tokens]
    if isinstance(size, int) and getattr(model, "main_input_name", "") == "pixel_values":
        shape = (IMAGES, 1, getattr(config, "num_channels", 3), size, size)
        dtype = next(p.dtype for p in model.parameters())
        return [{"pixel_values": x} for x in torch.randn(shape, generator=generator).to(device, dtype)]
    return []


@torch.no_grad()
def _sampled(model: Any, words: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return text [sequences, tokens] that a language model writes from its first token on, drawn from its logits."""
    first = getattr(model.config, "bos_token_id", None)
    start = (
        torch.full((SEQUENCES, 1), first)
        if isinstance(first, int)
        else torch.randint(words, (SEQUENCES, 1), generator=generator)
    )
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", None) or TOKENS)
    text, cache = start, None
    while text.shape[1] < length:
        output = model(input_ids=text[:, -1:].to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1).cpu()
        text = torch.cat((text, torch.multinomial(chances, 1, generator=generator)), 1)
    return text.to(device)
