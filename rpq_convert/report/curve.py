"""The curve of size against expected quality, as a value, a table and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rpq_convert.report.text import megabytes


@dataclass(frozen=True)
class Sample:
    """One plan.

    Args:
        how: `mixed`, or the layout of all parameters.
        file_bytes: of the weight files; bits: these per parameter of the model.
        error: expected relative squared error, mean over weights. loss: what budgets minimise.
        preset: the preset that gives all parameters this layout; empty where none does.
    """

    how: str
    file_bytes: int
    bits: float
    error: float
    loss: float
    preset: str = ""

    @property
    def name(self) -> str:
        return f"{self.how} (preset {self.preset})" if self.preset else self.how


@dataclass(frozen=True)
class Curve:
    """Plans of growing size, and for comparison those with one layout everywhere."""

    mixed: tuple[Sample, ...]
    uniform: tuple[Sample, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        lines = [f"{'size':>14} {'bits/w':>7} {'error':>9} {'loss':>9}  how"]
        for s in sorted((*self.mixed, *self.uniform), key=lambda s: (s.file_bytes, s.how)):
            lines.append(f"{megabytes(s.file_bytes):>14} {s.bits:>7.3f} {s.error:>9.2g} {s.loss:>9.2g}  {s.name}")
        return "\n".join(lines)

    def to_svg(self, title: str) -> str:
        """Return the curve as a picture, both axes logarithmic; presets have their names.

        Raises:
            ValueError: no plan has a loss.
        """
        from rpq_convert.report.charts import of_sizes

        return of_sizes(self.mixed, self.uniform, title).svg(f"{title}: expected loss against size", alone=True) + "\n"

    def _repr_svg_(self) -> str | None:
        """Return the picture that a notebook shows."""
        return self.to_svg("Size and expected loss") if any(s.loss > 0 for s in (*self.mixed, *self.uniform)) else None
