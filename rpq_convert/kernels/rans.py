"""The coder of `core/rans.py`, compiled: numba, single-threaded, nogil."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.core.axes import WeightView
from rpq_convert.core.rans import (
    DAMAGED,
    LANES,
    LOWEST,
    PRECISION,
    STATE,
    SYMBOLS,
    WORD,
    check_frequencies,
    frequencies_of,
    joined,
    parts,
    segments,
)  # fmt: skip
from rpq_convert.core.spec import Spec
from rpq_convert.kernels.jit.cache import njit

MASK = (1 << PRECISION) - 1


@njit(cache=True, nogil=True, error_model="numpy")
def _encode(codes, frequency, start, states, words):
    """Code one segment backwards into `words` from its end; return the place of the first word."""
    at = len(words)
    for i in range(len(codes) - 1, -1, -1):
        s = codes[i]
        x = states[i % LANES]
        f = frequency[s]
        if np.uint64(x) >= np.uint64(f) << np.uint64(32 - PRECISION):
            at -= 1
            words[at] = np.uint16(x & np.uint32(0xFFFF))
            x >>= np.uint32(16)
        q = x // f
        states[i % LANES] = np.uint32((q << np.uint32(PRECISION)) + (x - q * f) + start[s])
    return at


@njit(inline="always")
def _next(x, table, words, at):
    """Return a state after its next code, the place in `words`, and the code."""
    symbols, ranges = table
    low = x & np.uint64(MASK)
    code = symbols[low]
    entry = ranges[np.uint64(code)]
    x = (entry & np.uint64(0xFFFF)) * (x >> np.uint64(PRECISION)) + low - (entry >> np.uint64(16))
    few = np.uint64(x < np.uint64(LOWEST))  # arithmetic in place of a branch, which would be predicted badly
    x = x << (few << np.uint64(4)) | np.uint64(words[at]) & (np.uint64(0) - few)
    return x, at + few, code


@njit(cache=True, nogil=True, error_model="numpy")
def _decode(states, words, table, codes):
    """Decode one segment; return how many words were used, or -1 where a state does not end as it began.

    Args:
        states: [LANES] uint64. words: with one for each code after the last, so that a damaged stream reads nothing else.
        table: the code of each low part of a state, uint8 [2^PRECISION]; frequency | start of its range << 16 of each code.
    """
    at = np.uint64(0)
    a, b, c, d, e, f, g, h = states[0], states[1], states[2], states[3], states[4], states[5], states[6], states[7]
    whole = np.uint64(len(codes) // LANES * LANES)
    i = np.uint64(0)
    while i < whole:
        a, at, codes[i] = _next(a, table, words, at)
        b, at, codes[i + np.uint64(1)] = _next(b, table, words, at)
        c, at, codes[i + np.uint64(2)] = _next(c, table, words, at)
        d, at, codes[i + np.uint64(3)] = _next(d, table, words, at)
        e, at, codes[i + np.uint64(4)] = _next(e, table, words, at)
        f, at, codes[i + np.uint64(5)] = _next(f, table, words, at)
        g, at, codes[i + np.uint64(6)] = _next(g, table, words, at)
        h, at, codes[i + np.uint64(7)] = _next(h, table, words, at)
        i += np.uint64(LANES)
    states[0], states[1], states[2], states[3], states[4], states[5], states[6], states[7] = a, b, c, d, e, f, g, h
    for lane in range(len(codes) - whole):
        states[lane], at, codes[i + np.uint64(lane)] = _next(states[lane], table, words, at)
    for lane in range(LANES):
        if states[lane] != np.uint64(LOWEST):
            return np.int64(-1)
    return np.int64(at)


def encode(codes: Tensor, frequencies: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (stream [bytes] uint8, frequencies [256] int16) of codes uint8 of any shape, in the order of their elements.

    Args:
        frequencies: by which to code them; their own by default.
    """
    flat = codes.detach().to("cpu").reshape(-1).numpy()
    if frequencies is None:
        frequencies = torch.from_numpy(frequencies_of(np.bincount(flat, minlength=SYMBOLS)))
    frequency = frequencies.numpy().astype(np.uint32)
    start = np.concatenate([[0], np.cumsum(frequency)[:-1]]).astype(np.uint32)
    coded = []
    for first, last in segments(len(flat)):
        words, states = np.empty(last - first, WORD), np.full(LANES, LOWEST, STATE)
        at = _encode(flat[first:last], frequency, start, states, words)
        coded.append((states, words[at:].copy()))
    return torch.from_numpy(joined(coded)), frequencies


def decode(stream: Tensor, frequencies: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes uint8 of a shape from their stream.

    Raises:
        ValueError: the stream is damaged. What its counts say is checked before anything is allocated.
    """
    frequency = frequencies.detach().to("cpu").numpy()
    if wrong := check_frequencies(frequency):
        raise ValueError(wrong)
    count = math.prod(shape)
    coded = parts(stream.detach().to("cpu").numpy(), count)
    start = np.cumsum(frequency, dtype=np.int64) - frequency
    symbols = np.repeat(np.arange(SYMBOLS, dtype=np.uint8), frequency)
    table = symbols, frequency.astype(np.uint64) | start.astype(np.uint64) << np.uint64(16)
    codes = torch.empty(count, dtype=torch.uint8)
    for (first, last), (states, words) in zip(segments(count), coded):
        room = np.zeros(max(len(words), last - first) + 1, WORD)
        room[: len(words)] = words
        if _decode(states.astype(np.uint64), room, table, codes.numpy()[first:last]) != len(words):
            raise ValueError(DAMAGED)
    return codes.reshape(shape)


def packed(spec: Spec, view: WeightView, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a weight as files hold them.

    Raises:
        ValueError: the codes take more than the spec's rate.
    """
    found = dict(tensors)
    if spec.rate is None:
        return found
    ((length,),) = (size for part, (_, size) in spec.stored(view, shape).items() if part == "stream")
    stream, frequencies = encode(found.pop("codes"))
    if len(stream) > length:
        raise ValueError(f"its codes take {len(stream):,} bytes, where {spec.rate} bits each are {length:,}")
    return found | {"stream": F.pad(stream, (0, length - len(stream))), "frequencies": frequencies}


def unpacked(spec: Spec, view: WeightView, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a weight as they are in memory, from those of a file.

    Raises:
        ValueError: a damaged stream.
    """
    found = dict(tensors)
    if "stream" in found:
        _, size = spec.tensors(view, shape)["codes"]
        found["codes"] = decode(found.pop("stream"), found.pop("frequencies"), size)
    return found
