"""Entropy-coded codes: the layout of a stream, and a plain coder of it in numpy.

A file may keep the codes of a parameter as one stream of an asymmetric numeral system (range variant: Duda 2013, arXiv:1311.2540) in
place of one byte each. In memory they are bytes again. `kernels/rans.py` does the same, compiled; this is what it is tested against.

A model is `frequencies` [256], whole numbers that add up to 2^PRECISION. A stream cuts the codes, in the order of their tensor, into
segments of SEGMENT codes, the last one shorter. It holds, all little-endian:

1. for each segment, as uint32, how many words it has;
2. for each segment LANES states, as uint32, then its words, as uint16;
3. zeros up to its length, which a plan decides before the codes are known (`stream_bytes`).

Code i of a segment belongs to the state i % LANES. To decode it, the code is the symbol whose range holds the state's low PRECISION
bits; the state becomes `frequency * (state >> PRECISION) + low bits - start of the range`, and takes the next word as its low 16 bits
where it fell below LOWEST. When all codes are decoded, every state is LOWEST and every word is used: a damaged stream nearly never
ends so.
"""

from __future__ import annotations

import math

import numpy as np

from rpq_convert.core.elementary import log2

PRECISION, LANES, SEGMENT, LOWEST = 14, 8, 1 << 20, 1 << 16
SYMBOLS = 256
WORD, STATE = np.dtype("<u2"), np.dtype("<u4")
MOST_BITS = 8 * 1.01  # of a code that is coded by frequencies of its own tensor


def overhead(count: int) -> int:
    """Return the bytes of a stream of `count` codes that hold no code: counts of words and states."""
    return -(-count // SEGMENT) * (1 + LANES) * STATE.itemsize


def stream_bytes(rate: float, count: int) -> int:
    """Return the length of the stream of `count` codes for which a plan has `rate` bits each, whole."""
    return max(overhead(count), math.floor(rate * count / 8))


def rate_of(used: int, count: int) -> float:
    """Return the least rate, in steps of 10^-4 bits, whose streams have room for `used` bytes."""
    rate = math.ceil(1e4 * 8 * used / count) / 1e4 if count else 0.0
    while stream_bytes(rate, count) < used:
        rate = round(rate + 1e-4, 4)
    return rate


def code_bits(counts: np.ndarray, frequencies: np.ndarray) -> float:
    """Return about how many bits codes take that occur `counts` [256] times."""
    used = counts > 0
    return float((counts[used] * (PRECISION - log2(frequencies[used]))).sum())


def frequencies_of(counts: np.ndarray) -> np.ndarray:
    """Return the frequencies [256] int16 by which codes that occur `counts` [256] times are coded in the fewest bits.

    They add up to 2^PRECISION; every code that occurs has one.
    """
    whole, total = 1 << PRECISION, int(counts.sum())
    found = np.zeros(SYMBOLS, np.int64)
    used = counts > 0
    if not total:
        found[0] = whole
        return found.astype(np.int16)
    found[used] = np.maximum(1, np.floor(counts[used] * (whole / total) + 0.5)).astype(np.int64)
    while (left := whole - int(found.sum())) != 0:
        # one step of those that gain most, or lose least, by it
        step = 1 if left > 0 else -1
        changed = np.maximum(found + step, 1)
        gain = np.where(used & (found + step >= 1), counts * log2(changed / np.maximum(found, 1)), -np.inf)
        best = np.argsort(-gain, kind="stable")[: min(abs(left), int(np.isfinite(gain).sum()))]
        found[best] += step
    return found.astype(np.int16)


def check_frequencies(frequencies: np.ndarray) -> str:
    """Return what is wrong with frequencies, or an empty text."""
    if frequencies.min() < 0 or int(frequencies.sum(dtype=np.int64)) != 1 << PRECISION:
        return f"frequencies must be at least 0 and add up to {1 << PRECISION}"
    return ""


def segments(count: int) -> list[tuple[int, int]]:
    """Return the first code of every segment and the one after its last."""
    return [(start, min(start + SEGMENT, count)) for start in range(0, count, SEGMENT)]


def parts(stream: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (states, words) of every segment of a stream [bytes] of `count` codes.

    Raises:
        ValueError: the stream is shorter than it says, or something follows it.
    """
    many = -(-count // SEGMENT)
    if len(stream) < overhead(count):
        raise ValueError(f"the stream has {len(stream):,} bytes, too few for {count:,} codes")
    data = np.ascontiguousarray(stream)
    words = data[: many * STATE.itemsize].view(STATE).astype(np.int64)
    used = overhead(count) + int(words.sum()) * WORD.itemsize
    if used > len(data) or bool(data[used:].any()):
        raise ValueError("the stream is damaged: its counts of words do not fit its length")
    found, at = [], many * STATE.itemsize
    for n in words:
        middle = at + LANES * STATE.itemsize
        end = middle + int(n) * WORD.itemsize
        found.append((data[at:middle].view(STATE), data[middle:end].view(WORD)))
        at = end
    return found


def joined(coded: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the stream [bytes] uint8 of (states, words) of its segments."""
    counts = np.array([len(words) for _, words in coded], STATE)
    pieces = [counts, *(a.astype(kind) for states, words in coded for a, kind in ((states, STATE), (words, WORD)))]
    return np.concatenate([p.view(np.uint8) for p in pieces]) if coded else np.empty(0, np.uint8)


def encode(codes: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Return the stream [bytes] uint8 of codes [n] uint8, without the zeros at its end; slow."""
    frequency = [int(f) for f in frequencies]
    start = [0, *np.cumsum(frequencies, dtype=np.int64).tolist()]
    coded = []
    for first, last in segments(len(codes)):
        states, words = [LOWEST] * LANES, []
        for i in range(last - first - 1, -1, -1):
            s, x = int(codes[first + i]), states[i % LANES]
            if x >= frequency[s] << (32 - PRECISION):
                words.append(x & 0xFFFF)
                x >>= 16
            states[i % LANES] = (x // frequency[s] << PRECISION) + x % frequency[s] + start[s]
        coded.append((np.array(states, STATE), np.array(words[::-1], WORD)))
    return joined(coded)


def decode(stream: np.ndarray, frequencies: np.ndarray, count: int) -> np.ndarray:
    """Return the codes [count] uint8 of a stream; slow.

    Raises:
        ValueError: the stream is damaged.
    """
    if wrong := check_frequencies(frequencies):
        raise ValueError(wrong)
    coded = parts(stream, count)
    start = np.concatenate([[0], np.cumsum(frequencies, dtype=np.int64)])
    symbol = np.repeat(np.arange(SYMBOLS), frequencies)
    codes = np.empty(count, np.uint8)
    for (first, last), (states, words) in zip(segments(count), coded):
        state, at = [int(x) for x in states], 0
        for i in range(last - first):
            x = state[i % LANES]
            low = x & ((1 << PRECISION) - 1)
            s = int(symbol[low])
            x = int(frequencies[s]) * (x >> PRECISION) + low - int(start[s])
            if x < LOWEST and at < len(words):
                x = x << 16 | int(words[at])
                at += 1
            state[i % LANES] = x
            codes[first + i] = s
        if at != len(words) or any(x != LOWEST for x in state):
            raise ValueError(DAMAGED)
    return codes


DAMAGED = "the stream is damaged: decoding it does not end where it should"
