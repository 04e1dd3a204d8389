"""QualityOptions: how much a conversion takes care of quality, and how it is judged. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from rpq_convert.core.options import check_values, setting
from rpq_convert.errors import PlanError

PANEL = "Quality"
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
