"""Sizes as people write them: 5GB, 300MiB. Free of torch."""

from __future__ import annotations

from rpq_convert.errors import PlanError


def parse_size(text: str | float) -> int:
    """Return bytes from `5GB`, `300MiB`, `1e6` or a number.

    Raises:
        PlanError: it is no size.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise PlanError(f"size {text!r} is not a number with an optional unit such as 5GB or 300MiB")
    if isinstance(text, int):
        value = text
    else:
        text = str(text)
        units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
        upper = text.strip().upper()
        unit = next((u for u in sorted(units, key=len, reverse=True) if upper.endswith(u)), "")
        try:
            value = int(float(upper.removesuffix(unit)) * units.get(unit, 1))
        except (ValueError, OverflowError):
            raise PlanError(f"size {text!r} is not a number with an optional unit such as 5GB or 300MiB") from None
    if value < 1:
        raise PlanError(f"size {text!r} must be positive")
    return value
