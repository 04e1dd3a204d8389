"""Sizes and times as people write them: 5GB, 300MiB, 2h, 30 min. Free of torch."""

from __future__ import annotations

import math
import re

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


_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_seconds(text: str | float) -> float:
    """Return a time in seconds, given as a number of them or as text such as `90 s`, `30 min`, `2h` or `1h30m`.

    Raises:
        PlanError: it is none, or not above 0.
    """
    plain = re.sub(r"\s+", "", str(text).lower())
    parts = re.findall(r"(\d+(?:\.\d+)?)(min|[smhd])", plain)
    if parts and "".join(number + unit for number, unit in parts) == plain:
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        seconds = float(plain) if isinstance(text, float) or re.fullmatch(r"\d+(\.\d+)?", plain) else 0.0
    if not 0 < seconds < math.inf:
        raise PlanError(f"{text!r} is no time; give one such as 90s, 30min, 2h or 1h30m")
    return seconds
