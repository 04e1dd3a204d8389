"""QualityOptions: how much a conversion takes care of quality, and how it is judged. RunOptions and TimeOptions: how it runs. Free of torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TypedDict

from rpq_convert.core.options import check_values, setting
from rpq_convert.core.sizes import parse_seconds, parse_size
from rpq_convert.errors import PlanError

PANEL, RUN = "Quality", "Run"
FAST, GOOD, BEST = EFFORTS = ("fast", "good", "best")


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """How much a conversion takes care of quality, and how it is judged afterwards.

    Raises:
        PlanError: a value outside its range, or an option that would do nothing.
    """

    effort: str | None = setting(
        None,
        "fast: each layer is fitted to its weights alone. good: to its inputs as well, on what --calibrate names or on synthetic inputs. "
        "best: good, and then tuned against the base. By default good below 6 bits where it takes minutes, else fast.",
        choices=EFFORTS, panel=PANEL,
    )  # fmt: skip
    check: bool = setting(
        True,
        "Compare the result with the base afterwards, on a few inputs, and say in words what it has lost.",
        flag="check/--no-check", panel=PANEL,
    )  # fmt: skip
    check_seconds: float | None = setting(
        None, "What the check may take; 60 by default.", least=1, metavar="SECONDS", panel=PANEL
    )
    check_data: str | None = setting(
        None,
        "Compare on this, which no fit has seen: what --calibrate takes, or scored pairs. By default on what --calibrate has left "
        "over, else on synthetic inputs.",
        metavar="PATH", panel=PANEL,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_values(self, PlanError)
        if not self.check:
            for name in ("check_seconds", "check_data"):
                if getattr(self, name) is not None:
                    raise PlanError(f"{name} would do nothing without a check; leave it out, or the --no-check")

    @property
    def seconds(self) -> float:
        return 60.0 if self.check_seconds is None else self.check_seconds


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """When a run stops. Its time begins when this is made.

    Raises:
        PlanError: a time that is none.
    """

    time_limit: str | float | None = setting(
        None,
        "Stop after this time, such as 90s, 30min or 2h, once the weights or the step at hand are done; the same command then goes on.",
        metavar="TIME", panel=RUN,
    )  # fmt: skip

    def __post_init__(self) -> None:
        seconds = math.inf if self.time_limit is None else parse_seconds(self.time_limit)
        object.__setattr__(self, "_end", time.monotonic() + seconds)

    @property
    def is_over(self) -> bool:
        """Whether its time is up."""
        end: float = self._end  # type: ignore[attr-defined]
        return time.monotonic() >= end


@dataclass(frozen=True, kw_only=True)
class RunOptions(TimeOptions):
    """How a conversion into a folder runs; none of this changes what it writes. Its time begins when this is made.

    Raises:
        PlanError: a time or a size that is none.
    """

    check_source: bool = setting(
        False,
        "Compare every byte of the source with what an earlier run was fitted to, and again at the end. Otherwise sizes, headers and a "
        "sample of every tensor are compared, and all of it only where files have other times.",
        panel=RUN,
    )  # fmt: skip

    max_memory: str | int | None = setting(
        None,
        "Memory that the conversion may take in all, such as 4GiB: as many fits run at once as it has room for. By default what the "
        "machine, the container and ulimit leave.",
        metavar="SIZE", panel=RUN,
    )  # fmt: skip

    address: str | None = setting(
        None,
        "The Ray cluster to use: host:port, ray://host:port or auto. By default RAY_ADDRESS, or one of this machine alone.",
        metavar="ADDRESS", panel=RUN,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_size(self.max_memory)
        super().__post_init__()

    @property
    def memory(self) -> int | None:
        """The bytes that it may take."""
        return None if self.max_memory is None else parse_size(self.max_memory)


class RunKeywords(TypedDict, total=False):
    """What callers may give for the fields of `RunOptions`, for type checkers."""

    time_limit: str | float | None
    check_source: bool
    max_memory: str | int | None
    address: str | None
