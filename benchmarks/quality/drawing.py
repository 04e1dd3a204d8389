"""Pictures of quality against bytes, as SVG. They follow the reader's light or dark colour scheme.

`draw` makes one per task: the loss against the size, both logarithmic, a line per tool through the best of its rows.
`landing` makes the README's: perplexity as a multiple of the dense model's, for the sizes where it means something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib import import_module
from typing import Any

Row = dict[str, Any]
WIDTH, HEIGHT = 820, 500
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 44, 52  # the legend is on the right
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1c2330}.title{font-size:16px}.grid{stroke:#dfe4ec}polyline{fill:none}"
    ".paper{fill:#fff}.ours{fill:#d4291c;font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e9ef}.grid{stroke:#333b48}.paper{fill:#0d1117}.ours{fill:#ff6b5e}}"
)
OURS = "#d4291c"
OTHERS = ("#2d6cdf", "#1b8a5a", "#8c54c0", "#c2761a", "#00808f", "#6b7280", "#b0457b", "#6a8a1f")
LEAST = 1e-4  # what is less, or a gain, is drawn here


def lost(task: Any, row: Row) -> float:
    """Return what a row has lost: of log-perplexity, or of a cosine or an agreement of 1."""
    metrics = row["metrics"]
    return math.log(metrics["ratio"]) if task.best == "perplexity" else 1 - metrics[task.best]


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (bytes, loss) that no smaller one beats, by bytes."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def draw(task: Any, rows: Sequence[Row]) -> str:
    """Return the picture as SVG."""
    tools: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        tools.setdefault(row["peer"], []).append((row["bytes"] / 1e6, max(LEAST, lost(task, row))))
    shown = [p for points in tools.values() for p in points]
    x, y = Axis([a for a, _ in shown], LEFT, WIDTH - RIGHT), Axis([b for _, b in shown], HEIGHT - BOTTOM, TOP)
    word = "log-perplexity lost" if task.best == "perplexity" else f"1 - {task.best}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><style>{STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>'
        f'<text class="title" x="{LEFT}" y="24">{escape(task.title)}: {word}</text>'
    ]
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x.at(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x.at(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y.at(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">MB, everything counted</text>')
    others = iter(OTHERS * 2)
    for place, peer in enumerate(sorted(tools, key=lambda p: (p != "rpq", p))):
        colour = OURS if peer == "rpq" else next(others)
        line = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in frontier(tools[peer]))
        parts.append(f'<polyline points="{line}" stroke="{colour}" stroke-width="{3 if peer == "rpq" else 1.6}"/>')
        parts += [f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3" fill="{colour}"/>' for a, b in tools[peer]]
        at = TOP + 14 + 22 * place
        title = import_module(f"benchmarks.quality.peers.{peer}").TITLE
        parts.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{at - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 30}" y="{at}">{escape(title)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


WORST = 2.2  # times the dense model's perplexity: rows above are left out of the landing picture
DENSE_MB = 538.1  # SmolLM2-135M in float32, the head tied: docs/calibration.md
MARKS = (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2)


def landing(task: Any, rows: Sequence[Row]) -> str:
    """Return the README's picture: perplexity over the dense model's against the size of SmolLM2's weights.

    rpq-convert has two lines: with some text to calibrate and tune on, and without any data. Other tools have one each.
    """
    tools: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        ratio = max(1.0, row["metrics"]["ratio"])
        if ratio <= WORST and row["bytes"] / 1e6 < 147:
            line = row["peer"]
            if line == "rpq":
                with_data = row["settings"].get("calibrated") or row["settings"].get("steps")
                line = "rpq-convert, some text" if with_data else "rpq-convert, no data"
            else:
                line = import_module(f"benchmarks.quality.peers.{line}").TITLE
            tools.setdefault(line, []).append((row["bytes"] / 1e6, ratio))
    high, left, right = max(a for points in tools.values() for a, _ in points) + 3, 64.0, float(WIDTH - RIGHT)
    low = min(a for points in tools.values() for a, _ in points) - 5

    def x(megabytes: float) -> float:
        return left + (megabytes - low) / (high - low) * (right - left)

    def y(ratio: float) -> float:
        return HEIGHT - BOTTOM - (ratio - 1) / (WORST - 1) * (HEIGHT - BOTTOM - TOP - 14)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><style>{STYLE}</style>'
        f"<title>{escape(task.title)}: perplexity against the size of the weights</title>"
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text class="title" x="16" y="26">{escape(task.title)}: times the perplexity of the dense model '
        f"({DENSE_MB:g} MB)</text>"
    ]
    for mark in MARKS:
        parts.append(f'<path class="grid" d="M{left} {y(mark):.1f}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for size in range(math.ceil(low / 20) * 20, int(high) + 1, 20):
        parts.append(f'<text x="{x(size):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{size} MB</text>')
    parts.append(
        f'<text x="{(left + right) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">size of all weights; lower left is better</text>'
    )
    others = iter(OTHERS)
    for place, name in enumerate(
        sorted(tools, key=lambda n: (not n.startswith("rpq"), n != "rpq-convert, some text", n))
    ):
        ours = name.startswith("rpq")
        colour = OURS if ours else next(others)
        dash = ' stroke-dasharray="6 4"' if name.endswith("no data") else ""
        best = frontier(tools[name])
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in best)
        parts.append(f'<polyline points="{line}" stroke="{colour}" stroke-width="{3.2 if ours else 1.5}"{dash}/>')
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="{4 if ours else 2.6}" fill="{colour}"/>' for a, b in best
        ]
        at = TOP + 14 + 23 * place
        parts.append(
            f'<path d="M{right + 14} {at - 4}h20" stroke="{colour}" stroke-width="{3.2 if ours else 1.5}"{dash}/>'
        )
        parts.append(
            f'<text{" class=" + chr(34) + "ours" + chr(34) if ours else ""} x="{right + 40}" y="{at}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


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
