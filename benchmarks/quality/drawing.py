"""The picture of a task: what is lost against bytes, both logarithmic, a line per tool through the best of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib import import_module
from typing import Any

from rpq_convert.report.curve import Axis

Row = dict[str, Any]
WIDTH, HEIGHT = 820, 500
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 44, 52  # the legend is on the right
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1c2330}.title{font-size:16px}.grid{stroke:#dfe4ec}polyline{fill:none}"
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
        tools.setdefault(row["peer"], []).append((row["bytes"] / 2**20, max(LEAST, lost(task, row))))
    shown = [p for points in tools.values() for p in points]
    x, y = Axis([a for a, _ in shown], LEFT, WIDTH - RIGHT), Axis([b for _, b in shown], HEIGHT - BOTTOM, TOP)
    word = "log-perplexity lost" if task.best == "perplexity" else f"1 - {task.best}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        f'<text class="title" x="{LEFT}" y="24">{escape(task.title)}: {word}</text>'
    ]
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x.at(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x.at(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y.at(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">MB (2^20 bytes), everything counted</text>'
    )
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
