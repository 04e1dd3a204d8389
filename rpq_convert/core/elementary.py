"""Logarithms, powers and normal numbers that are the same on every processor.

Libraries compute these by instructions that they choose, and round them in different ways. Here they consist of operations that IEEE 754
rounds in one way: +, -, *, / and the square root.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LN2 = 0.6931471805599453
ROOT_HALF = 0.7071067811865476
TERMS = 12  # of both series; the next is below float64's last bit


def log2(x: np.ndarray | float) -> np.ndarray:
    """Return the binary logarithm of positive numbers, within a few units of float64's last place; exact for powers of two.

    log2 m = 2 / ln 2 * artanh((m - 1) / (m + 1)), for m from the root of a half to the root of two.
    """
    m, power = np.frexp(np.asarray(x, np.float64))
    low = m < ROOT_HALF
    m, power = np.where(low, m * 2.0, m), power - low
    t = (m - 1.0) / (m + 1.0)
    square, found = t * t, 0.0 * t
    for k in range(2 * TERMS - 1, 0, -2):
        found = found * square + 1.0 / k
    return power + (2.0 / LN2) * (t * found)


def exp2(x: np.ndarray | float) -> np.ndarray:
    """Return two to the power of x, within a few units of float64's last place; exact for whole numbers."""
    x = np.asarray(x, np.float64)
    whole = np.floor(x + 0.5)
    t = (x - whole) * LN2
    found = np.ones_like(t)
    for k in range(TERMS + 2, 0, -1):
        found = found * t / k + 1.0
    return np.ldexp(found, whole.astype(np.int64).clip(-2000, 2000).astype(np.int32))


def power(x: np.ndarray | float, exponent: np.ndarray | float) -> np.ndarray:
    """Return x to a power, for x of at least 0 and a positive exponent."""
    x = np.asarray(x, np.float64)
    some = x > 0
    return np.where(some, exp2(log2(np.where(some, x, 1.0)) * exponent), 0.0)


def normal(generator: np.random.Generator, size: Sequence[int]) -> np.ndarray:
    """Return normal numbers, float64, drawn by Marsaglia's polar method."""
    count = int(np.prod(size, dtype=np.int64))
    found: list[np.ndarray] = []
    while (left := count - sum(map(len, found))) > 0:
        u, v = 2.0 * generator.random((2, left // 2 + 64)) - 1.0
        s = u * u + v * v
        inside = (s > 0) & (s < 1)
        u, v, s = u[inside], v[inside], s[inside]
        root = np.sqrt(-2.0 * LN2 * log2(s) / s)
        found.append(np.concatenate([u * root, v * root])[:left])
    return np.concatenate([*found, np.empty(0)]).reshape(size)
