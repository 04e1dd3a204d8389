"""The curve of size against expected quality, as a value, a table and a picture (SVG, written by hand: no plotting library)."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from rpq_convert.report.text import megabytes
from rpq_convert.showing import html_text

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 50, 60
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1c2330}.title{font-size:16px}.grid{stroke:#dfe4ec}"
    ".mixed{fill:none;stroke:#2d6cdf;stroke-width:2.5}.dot{fill:#2d6cdf}.one{fill:none;stroke:#c2571a;stroke-width:1.8}"
)


@dataclass(frozen=True)
class Sample:
    """One plan.

    Args:
        how: `mixed`, or the layout of all parameters.
        file_bytes: of the weight files; bits: these per parameter of the model.
        error: expected relative squared error, mean over weights. loss: what budgets minimise.
    """

    how: str
    file_bytes: int
    bits: float
    error: float
    loss: float


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
            lines.append(f"{megabytes(s.file_bytes):>14} {s.bits:>7.3f} {s.error:>9.2g} {s.loss:>9.2g}  {s.how}")
        return "\n".join(lines)

    def to_svg(self, title: str) -> str:
        """Return the curve as a picture: both axes logarithmic."""
        shown = [s for s in (*self.mixed, *self.uniform) if s.loss > 0]
        if not shown:
            raise ValueError("no plan of this curve has a loss; there is nothing to draw")
        x = Axis([s.file_bytes / 1e6 for s in shown], LEFT, WIDTH - RIGHT)
        y = Axis([s.loss for s in shown], HEIGHT - BOTTOM, TOP)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><style>{STYLE}</style>'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/><text class="title" x="{LEFT}" y="24">{html_text(title)}</text>'
        ]
        for value in x.ticks():
            at = x.at(value)
            parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
        for value in y.ticks():
            at = y.at(value)
            parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
        points = [(x.at(s.file_bytes / 1e6), y.at(s.loss), s) for s in self.mixed if s.loss > 0]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)
        parts.append(f'<polyline class="mixed" points="{line}"/>')
        parts += [f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="3">{_told(s)}</circle>' for a, b, s in points]
        for s in self.uniform:
            if s.loss > 0:
                a, b = x.at(s.file_bytes / 1e6), y.at(s.loss)
                parts.append(f'<circle class="one" cx="{a:.1f}" cy="{b:.1f}" r="4.5">{_told(s)}</circle>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 16}" text-anchor="middle">weight files, MB</text>')
        parts.append(
            f'<text x="{LEFT}" y="42">expected loss: line, sizes mixed; rings, one size everywhere</text></svg>'
        )
        return "\n".join(parts) + "\n"


def _told(sample: Sample) -> str:
    return f"<title>{html_text(sample.how)}: {megabytes(sample.file_bytes)}, loss {sample.loss:.3g}</title>"


class Axis:
    """A logarithmic axis from one place of the picture to another."""

    def __init__(self, values: list[float], start: float, stop: float) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        self.low, self.high = low - 0.04, high + 0.04
        self.start, self.stop = start, stop

    def at(self, value: float) -> float:
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1, 2, 5) if self.high - self.low < 3 else (1,)
        return [v for d in decades for m in steps if self.low <= math.log10(v := m * 10.0**d) <= self.high]
