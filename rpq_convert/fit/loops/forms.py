"""Two forms of a compiled loop: one that may fuse products and sums, or reorder them, and one that does neither.

The second gives the same bits on every processor; it is compiled when the first reproducible fit needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from types import FunctionType
from typing import Any

from rpq_convert.core.reproducible import is_reproducible
from rpq_convert.kernels.jit.cache import njit


def loop(fastmath: Collection[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function that Python calls, in both forms; `fastmath` is what the quick one may do."""

    def decorate(function: Any) -> Callable[..., Any]:
        exact = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        exact.__qualname__ = f"{function.__qualname__}_exact"  # by which the cache on disk tells the two apart
        common: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
        quick, plain = njit(fastmath=set(fastmath), **common)(function), njit(**common)(exact)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (plain if is_reproducible() else quick)(*arguments)

        return call

    return decorate
