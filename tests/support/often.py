"""Which values of a parametrized test run every time."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def often(values: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """Return the values, those that are not kept marked slow: `make test` runs some of each kind, `make test-slow` the rest.

    Args:
        values: a tuple holds the values of several arguments.
    """
    rows = ((v, v if isinstance(v, tuple) else (v,)) for v in values)
    return [v if v in kept else pytest.param(*row, marks=pytest.mark.slow) for v, row in rows]
