"""Charts of a report, drawn by matplotlib as SVG for pages and as PNG for the model card.

matplotlib is imported on the first chart. Text and axes take the colour of the text around the picture, series have colours that
are readable on light and dark paper. The same report gives the same bytes: no dates, no random ids.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rpq_convert.report.schema import Report, Row
from rpq_convert.report.text import EXPECTED, OUTPUT, error, megabytes, number
from rpq_convert.showing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rpq_convert.report.curve import Sample

INK = "#010203"  # stands for the colour of the text around a picture
COLOURS = ("#3b82f6", "#d97706", "#0d9488", "#a855f7", "#ec4899", "#65a30d", "#0891b2", "#b45309")
GREY, RED = "#8b93a1", "#ef4444"
LEAST = 4  # converted parameters; a chart of fewer shows nothing that the table does not
DENSE = 400  # from so many points on, lines have no dots
WORST = 10
PAPER = "svg{color:#1c2330;background:#fff}@media(prefers-color-scheme:dark){svg{color:#e6e9ef;background:#14181f}}"
MADE = re.compile(r"[\w.]+_\d+")  # ids that matplotlib gives
SVG = "http://www.w3.org/2000/svg"
BITS = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 32)


@dataclass(frozen=True)
class Depths:
    """The matrices of a report in the order of the model.

    Args:
        rows: converted ones and those left dense. roles: what each does in its block, such as `mlp.fc1`.
        starts: place -> what is written below it.
    """

    rows: tuple[Row, ...]
    roles: tuple[str, ...]
    starts: dict[int, str]


def role(row: Row) -> str:
    """Return a parameter's name without what counts blocks, such as `self_attn.q_proj`; its layer's type where nothing is left."""
    parts = row.name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]).removesuffix("weight").rstrip(".") or row.layer


def depths(report: Report) -> Depths:
    rows = tuple(r for r in report.rows if r.decision == "rpq" or (r.decision == "dense" and len(r.shape) > 1))
    return Depths(rows, _common(rows), _starts([r.name for r in rows]))


def _starts(names: Iterable[str]) -> dict[int, str]:
    """Return place -> what is written below it: the number of the block that begins there; of a model without blocks the place."""
    starts: dict[int, str] = {}
    before, place = None, -1
    for place, name in enumerate(names):
        block = next((part for part in name.split(".") if part.isdigit()), None)
        if block is not None and block != before:
            starts[place] = block
        before = block
    return starts if len(starts) > 1 else {i: str(i + 1) for i in range(place + 1)}


def _common(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the role of each row; those that have no colour of their own are `other`."""
    sizes: dict[str, int] = {}
    for row in rows:
        if row.decision == "rpq":
            sizes[role(row)] = sizes.get(role(row), 0) + row.params
    kept = set(sorted(sizes, key=lambda r: -sizes[r])[: len(COLOURS)])
    return tuple("dense" if r.decision != "rpq" else role(r) if role(r) in kept else "other" for r in rows)


def has_depths(report: Report) -> bool:
    """Return whether there is enough to draw `by_depth`."""
    return sum(r.decision == "rpq" for r in report.rows) >= LEAST


@dataclass(frozen=True)
class Chart:
    """A figure, and what its points say: class of a series -> a text per point."""

    figure: Figure
    told: dict[str, list[str]]

    def svg(self, title: str, *, alone: bool = False) -> str:
        """Return the chart as an SVG element of the width of its place.

        Args:
            title: what the picture shows, for those who do not see it.
            alone: for a file of its own, which brings its colours for light and dark paper.
        """
        import matplotlib

        out = io.BytesIO()
        for axes in self.figure.axes:
            axes.set_facecolor("none")
        with _quietly(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
            self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        ElementTree.register_namespace("", SVG)
        ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
        root = ElementTree.fromstring(out.getvalue())
        _tidy(root)
        for key in ("width", "height", "version"):
            root.attrib.pop(key, None)
        root.attrib |= {"role": "img", "aria-label": printable(title), "class": "rpq-chart"}
        _insert(root, 0, "title", title)
        if alone:
            _insert(root, 1, "style", PAPER)
        for series in root.iter(f"{{{SVG}}}g"):
            points = list(series.iter(f"{{{SVG}}}use"))
            for point, text in zip(points, self.told.get(series.get("class", ""), ())):
                _insert(point, 0, "title", text)
        text = ElementTree.tostring(root, encoding="unicode").replace(INK, "currentColor")
        return text if alone else re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")

    def png(self) -> bytes:
        """Return the chart as PNG on white paper, in 64 colours."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        self.figure.set_facecolor("white")
        self.figure.set_dpi(140)
        canvas: Any = FigureCanvasAgg(self.figure)
        with _quietly():
            canvas.draw()
        drawn = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
        with io.BytesIO() as out:
            drawn.convert("RGB").quantize(64, Image.Quantize.FASTOCTREE).save(out, format="png")
            return out.getvalue()


@contextmanager
def _quietly() -> Iterator[None]:
    """Draw without a word about characters that matplotlib's font does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def _insert(parent: Any, place: int, tag: str, text: str) -> None:
    made = ElementTree.Element(f"{{{SVG}}}{tag}")
    made.text = printable(text)
    parent.insert(place, made)


def by_depth(report: Report) -> Chart:
    """Return the error of every converted layer over its place in the model, the bits of every matrix below it."""
    shown = depths(report)
    names = [r for r in dict.fromkeys(shown.roles) if r not in ("other", "dense")]
    colours = dict(zip(names, COLOURS)) | {"other": GREY, "dense": GREY}
    with _drawing() as figure_of:
        legend = -(-len(set(shown.roles)) // 2)
        height = 3.65 + 0.18 * legend
        figure = figure_of(4.2, height)
        low = (0.42 + 0.18 * legend) / height
        upper: Axes = figure.add_axes((0.15, low + 1.45 / height, 0.83, 1.55 / height))
        lower: Axes = figure.add_axes((0.15, low, 0.83, 1.0 / height), sharex=upper)
        told = _errors(upper, shown, colours)
        _bits(lower, shown, colours)
        _blocks(lower, shown.starts)
        upper.tick_params(labelbottom=False)
        handles = [
            _line(colours[r], hollow=r == "dense", label=_short(r)) for r in dict.fromkeys((*names, *shown.roles))
        ]
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.0, 0.0), ncol=2, frameon=False, fontsize=8.5,
            handlelength=1.2, columnspacing=1.2, labelspacing=0.25, borderpad=0.1,
        )  # fmt: skip
    return Chart(figure, told)


def _short(name: str) -> str:
    text = printable(name)
    return _plain(text if len(text) <= 24 else f"…{text[-23:]}")


def _plain(text: str) -> str:
    """Return text that matplotlib shows as it is: dollars begin no formula, and a leading _ hides no label."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _line(colour: str, *, hollow: bool, label: str) -> Any:
    from matplotlib.lines import Line2D

    face = "none" if hollow else colour
    return Line2D([], [], color=colour, marker="s" if hollow else "o", markersize=4, mfc=face, lw=0, label=label)


def _errors(axes: Axes, shown: Depths, colours: dict[str, str]) -> dict[str, list[str]]:
    """Draw the error of each converted layer; numbered rings mark the worst ten. Return what points say, by series."""
    found = [error([r]) for r in shown.rows]
    points = {i: value for i, (value, _) in enumerate(found) if shown.rows[i].decision == "rpq" and value}
    kinds = {found[i][1] for i in points}
    small = len(points) > DENSE
    told: dict[str, list[str]] = {}
    for name in dict.fromkeys(shown.roles):
        places = [i for i in points if shown.roles[i] == name]
        for of in sorted({found[i][1] for i in places}):
            part = [i for i in places if found[i][1] == of]
            hollow = of != OUTPUT and OUTPUT in kinds
            series = f"series-{len(told)}"
            told[series] = [f"{shown.rows[i].name}: {of} error {number(points[i])}" for i in part]
            axes.plot(
                part, [points[i] for i in part], color=colours[name], lw=_width(name, small), marker=None if small and len(part) > 1 else "o",
                ms=3, mfc="none" if hollow else colours[name], alpha=0.9, gid=series,
            )  # fmt: skip
    _logarithmic(axes, list(points.values()))
    ranked = [i for i in points if (found[i][1] == OUTPUT) == (OUTPUT in kinds)]
    ranked = sorted(ranked, key=lambda i: -points[i])[:WORST]
    for rank, i in enumerate(ranked, 1):
        axes.plot([i], [points[i]], marker="o", ms=7, mfc="none", mec=RED, mew=1.1)
        if rank <= 3:
            right = i > 0.9 * len(shown.rows)
            axes.annotate(
                str(rank), (i, points[i]), xytext=(-6 if right else 6, 2), textcoords="offset points", fontsize=8.5,
                ha="right" if right else "left", fontweight="bold",
            )  # fmt: skip
    of = "output error" if OUTPUT in kinds else "expected weight error" if kinds == {EXPECTED} else "weight error"
    _title(axes, f"{of} (rings: the {len(ranked)} largest)" if points else "no error")
    axes.margins(y=0.12)
    return told


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Make the upright axis logarithmic, with marks such as 0.01; more of them where the values are close together."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    close = bool(values) and max(values) < 50 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if close else (1,), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bits(axes: Axes, shown: Depths, colours: dict[str, str]) -> None:
    from matplotlib.ticker import NullLocator

    small = len(shown.rows) > DENSE
    for name in dict.fromkeys(shown.roles):
        places = [i for i, r in enumerate(shown.roles) if r == name]
        hollow = name == "dense"
        axes.plot(
            places, [shown.rows[i].bits_per_weight for i in places], color=colours[name], ms=2 if small else 3,
            marker="s" if hollow else None if small and len(places) > 1 else "o", mfc="none" if hollow else colours[name],
            lw=_width(name, small), alpha=0.9,
        )  # fmt: skip
    values = [r.bits_per_weight for r in shown.rows if r.bits_per_weight]
    low, high = min(values, default=1) / 1.5, max(values, default=1) * 1.5
    axes.set_yscale("log", base=2)
    axes.set_ylim(low, high)
    ticks = [b for b in BITS if low <= b <= high]
    ticks = ticks if len(ticks) < 7 else [b for b in ticks if math.log2(b).is_integer()]
    axes.set_yticks(ticks, [f"{b:g}" for b in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    _title(axes, "bits per weight")


def _width(name: str, small: bool) -> float:
    """Return the width of the line between the points of a role; what is not of one kind has none."""
    return 0 if name in ("dense", "other") and not small else 0.9 if small else 0.6


def _blocks(axes: Axes, starts: Mapping[int, str]) -> None:
    """Number the blocks below the axis."""
    places = list(starts)[:: max(1, -(-len(starts) // 9))]
    axes.set_xticks(places, [starts[i] for i in places])
    axes.set_xlabel("block or layer, in the model's order", fontsize=8.5, labelpad=2)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, pad=4)
    axes.grid(axis="y", lw=0.5, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def _drawing() -> Iterator[Any]:
    """Yield a function that makes a figure of so many inches, in a style that does not depend on the user's settings."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"], "font.size": 8.5, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "grid.color": INK, "axes.linewidth": 0.6, "axes.titlecolor": INK,
        "xtick.major.width": 0.6, "ytick.major.width": 0.6, "ytick.minor.width": 0.4, "xtick.major.size": 3, "ytick.major.size": 3,
        "ytick.minor.size": 1.5, "svg.fonttype": "none", "svg.hashsalt": "rpq", "path.simplify": True,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield lambda width, height: Figure(figsize=(width, height), facecolor="none")


def _tidy(root: Any) -> None:
    """Remove metadata, make unused ids of ours classes and drop the others, write numbers with two decimals, and let text take the page's font."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    for element in root.iter():
        if "id" in element.attrib and element.attrib["id"] not in used:
            name = element.attrib.pop("id")
            if not MADE.fullmatch(name):
                element.set("class", name)
        element.text, element.tail = ((s if s and s.strip() else None) for s in (element.text, element.tail))
        for key in ("d", "x", "y", "transform"):
            if key in element.attrib:
                element.set(key, re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", element.attrib[key].strip()))
                element.set(key, re.sub(" +", " ", element.attrib[key]))
        styles = {child.get("style") for child in element}
        if (
            len(element) > 1
            and len(styles) == 1
            and None not in styles
            and all(c.tag.endswith("}use") for c in element)
        ):
            for child in element:
                del child.attrib["style"]
            element.set("style", styles.pop())
    for element in root.iter():
        if "style" in element.attrib:
            element.set("style", element.attrib["style"].replace("'DejaVu Sans'", "system-ui, sans-serif"))


def compared(names: Sequence[str], reports: Sequence[Report]) -> Chart:
    """Return the error and the bits of every converted layer of several reports of one model, a colour for each report."""
    order = dict.fromkeys(r.name for report in reports for r in depths(report).rows)
    places = {name: i for i, name in enumerate(order)}
    told: dict[str, list[str]] = {}
    with _drawing() as figure_of:
        height = 3.65 + 0.18 * len(names)
        low = (0.42 + 0.18 * len(names)) / height
        figure = figure_of(4.2, height)
        upper: Axes = figure.add_axes((0.15, low + 1.45 / height, 0.83, 1.55 / height))
        lower: Axes = figure.add_axes((0.15, low, 0.83, 1.0 / height), sharex=upper)
        for i, report in enumerate(reports):
            rows = [r for r in report.rows if r.decision == "rpq"]
            style: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)], "lw": 0.8, "ms": 2.5, "marker": None if len(rows) > DENSE else "o", "alpha": 0.9,
            }  # fmt: skip
            found = [(r, value) for r in rows if (value := error([r])[0])]
            series = f"series-{i}"
            told[series] = [f"{r.name}, {names[i]}: {error([r])[1]} error {number(value)}" for r, value in found]
            upper.plot([places[r.name] for r, _ in found], [value for _, value in found], gid=series, **style)
            lower.plot(
                [places[r.name] for r in rows], [r.bits_per_weight for r in rows], label=_short(names[i]), **style
            )
        _logarithmic(upper, [value for report in reports for r in report.rows if (value := error([r])[0])])
        upper.tick_params(labelbottom=False)
        _title(upper, "error")
        _title(lower, "bits per weight")
        _blocks(lower, _starts(order))
        figure.legend(loc="lower left", bbox_to_anchor=(0.0, 0.0), frameon=False, labelspacing=0.25, borderpad=0.1)
    return Chart(figure, told)


def of_sizes(mixed: Sequence[Sample], uniform: Sequence[Sample], title: str) -> Chart:
    """Return the expected loss over the size: a line of mixed layouts, rings of one layout everywhere.

    Raises:
        ValueError: no sample has a loss.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    series = {"mixed": [s for s in mixed if s.loss > 0], "uniform": [s for s in uniform if s.loss > 0]}
    if not any(series.values()):
        raise ValueError("no plan of this curve has a loss; there is nothing to draw")
    with _drawing() as figure_of:
        figure = figure_of(5.6, 3.9)
        axes: Axes = figure.add_axes((0.11, 0.21, 0.86, 0.69))
        line, rings = (
            {"x": [s.file_bytes / 1e6 for s in found], "y": [s.loss for s in found]} for found in series.values()
        )
        axes.plot(line["x"], line["y"], color=COLOURS[0], marker="o", ms=3, lw=1.4, label="sizes mixed", gid="mixed")
        axes.plot(
            rings["x"], rings["y"], color=COLOURS[1], marker="o", ms=5, mfc="none", lw=0, label="one layout everywhere", gid="uniform"
        )  # fmt: skip
        for s in series["uniform"]:
            if s.preset:
                axes.annotate(
                    _plain(s.preset),
                    (s.file_bytes / 1e6, s.loss),
                    xytext=(5, 4),
                    textcoords="offset points",
                    color=COLOURS[1],
                )
        axes.set_xscale("log")
        _logarithmic(axes, line["y"] + rings["y"])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(0.08)
        axes.set_xlabel("weight files, MB", labelpad=2)
        _title(axes, f"{_short(title)}: expected loss")
        figure.legend(loc="lower left", bbox_to_anchor=(0.09, 0.0), ncol=2, frameon=False, handlelength=1.5)
    return Chart(
        figure, {k: [f"{s.name}: {megabytes(s.file_bytes)}, loss {s.loss:.3g}" for s in v] for k, v in series.items()}
    )
