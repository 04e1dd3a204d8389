"""The report as HTML: one page without network, and a compact card for notebooks.

The templates beside this file hold the markup. Their engine escapes every value, since names come from files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpq_convert.report import charts
from rpq_convert.report.quality import quality
from rpq_convert.report.schema import Report, Row
from rpq_convert.report.text import (
    EXPECTED,
    OUTPUT,
    Group,
    error,
    group,
    left_out,
    legend,
    megabytes,
    number,
    plain,
    shown_error,
    worst,
)
from rpq_convert.report.verdict import verdict
from rpq_convert.showing import printable

if TYPE_CHECKING:
    from rpq_convert.report.compare import Comparison

PARTS = (  # part of the report -> its name, its colour in style.css, what it is
    (
        "code_bytes",
        "codes",
        "Which codeword stands for each sub-vector: one byte, or fewer bits where they are entropy-coded.",
    ),
    ("codebook_bytes", "codebooks", "256 codewords each, shared by the sub-vectors of a parameter."),
    ("scale_bytes", "scales", "One number per output that multiplies its decoded row."),
    ("outlier_bytes", "outliers", "The largest weights of every output, kept as numbers beside the codes."),
    ("other_bytes", "dense", "Parameters and buffers that stay as they were."),
)
CELLS = 40  # of the treemap; what is smaller shares one
HEAT = 55  # per cent of red at the largest error


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def dotted(name: str) -> Markup:
        """Return a name that may break after its dots."""
        return Markup(".<wbr>").join(printable(name).split("."))

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, finalize=shown,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["dotted"] = dotted
    return made


def render(template: str, styles: Iterable[str], **values: Any) -> str:
    """Return a template of this room filled with values, as HTML."""
    from markupsafe import Markup

    environment = _environment()
    css = "".join(environment.loader.get_source(environment, name)[0] for name in styles)
    return str(environment.get_template(template).render(css=Markup(css), **values))


def page(report: Report) -> str:
    """Return the report as one self-contained HTML file."""
    return render("report.html", ("style.css", "page.css"), v=_summary(report) | _details(report))


def card(report: Report) -> str:
    """Return the report as a compact HTML fragment for notebooks, in the colours of the notebook."""
    return render("card.html", ("style.css", "card.css"), v=_summary(report) | _rows(report))


def comparison(found: Comparison) -> str:
    """Return a comparison of reports as one self-contained HTML file."""
    from markupsafe import Markup

    drawn = [r for r in found.reports if charts.has_depths(r)]
    chart = ""
    if found.related and len(drawn) == len(found.reports):
        chart = Markup(
            charts.compared(found.names, found.reports).svg("Error and bits per weight of every layer, by report")
        )
    largest = max(r.dense_bytes for r in found.reports) or 1
    models = [
        {"name": name, "share": 100 * r.bytes / largest, "parts": _parts(r), "verdict": _judged(r)}
        for name, r in zip(found.names, found.reports)
    ]
    options = {k: ["–" if x is None else plain(x) for x in v] for k, v in found.options.items()}
    return render("diff.html", ("style.css", "page.css"), c=found, models=models, options=options, chart=chart)


def _summary(report: Report) -> dict[str, Any]:
    """Return what page and card begin with."""
    return {
        "title": report.title, "version": report.version, "before": megabytes(report.dense_bytes), "after": megabytes(report.bytes),
        "held": megabytes(report.held_bytes) if report.held_bytes != report.bytes else "",
        "ratio": f"{report.ratio:.1f}", "bits": f"{report.bits_per_weight:.2f}", "covered": f"{100 * report.covered:.1f}",
        "share": min(100.0, 100 * report.bytes / report.dense_bytes) if report.dense_bytes else 100.0, "parts": _parts(report),
        "verdict": _judged(report), "quality": quality(report), "warnings": report.plain_warnings, "legend": legend(report),
        "measure": _measure(report), "chart": _chart(report), "converted": report.error is not None,
    }  # fmt: skip


def _parts(report: Report) -> list[dict[str, Any]]:
    total = report.bytes or 1
    return [
        {"label": label, "colour": label, "meaning": meaning, "size": megabytes(n), "share": n / total}
        for part, label, meaning in PARTS
        if (n := report.total(part))
    ]


def _judged(report: Report) -> dict[str, str] | None:
    """Return the verdict; of a bad one, the sentence begins as the warning in other views does."""
    found = verdict(report)
    if found is None:
        return None
    warned = [w for w in report.all_warnings if w not in report.plain_warnings]
    begins = "".join(f"{w.partition(':')[0]}: " for w in warned)
    return {"level": found.level, "sentence": begins + found.sentence, "advice": found.advice}


def _measure(report: Report) -> str:
    """Return what the errors of the report are called; empty where there are none."""
    found = {error([r])[1] for r in report.rows if r.decision == "rpq" and error([r])[0] is not None}
    if not found:
        return ""
    return "output error" if OUTPUT in found else "expected weight error" if found == {EXPECTED} else "weight error"


def _chart(report: Report) -> Any:
    from markupsafe import Markup

    if not charts.has_depths(report):
        return ""
    told = f"{_measure(report) or 'error'} and bits per weight of every layer, in the model's order"
    return Markup(charts.by_depth(report).svg(told[0].upper() + told[1:]))


def _rows(report: Report) -> dict[str, Any]:
    """Return the groups of rows, and what each row of a group shows."""
    mixed = report.output_error is not None
    return {"groups": [_group(g, mixed) for g in group(report.rows)]}


def _group(g: Group, mixed: bool) -> dict[str, Any]:
    r, converted = g.first, g.first.decision == "rpq"
    return {
        "name": g.name, "many": len(g.rows) if len(g.rows) > 1 else 0, "layer": r.layer, "shape": " × ".join(map(str, r.shape)),
        "dtype": r.dtype, "how": r.spec if converted else f"{r.decision}: {r.reason}", "bytes": g.bytes,
        "before": f"{g.dense_bytes / 1e6:.3f}", "after": f"{g.bytes / 1e6:.3f}", "bits": f"{r.bits_per_weight:.2f}",
        "error": shown_error(g.rows, mixed=mixed) if converted else "", "worst": number(worst(g.rows)),
        "order": f"{(error(g.rows)[0] or 0) if converted else -1:.6g}", "rows": [_member(r, mixed) for r in g.rows],
    }  # fmt: skip


def _member(r: Row, mixed: bool) -> dict[str, str]:
    tied = f" (also {', '.join(r.aliases)})" if r.aliases else ""
    shown = shown_error([r], mixed=mixed) if r.decision == "rpq" else ""
    return {"name": r.name + tied, "size": megabytes(r.bytes), "error": shown, "worst": number(worst([r]))}


def _details(report: Report) -> dict[str, Any]:
    return _rows(report) | {
        "worst": _worst(report), "map": _map(report), "bits_table": _bits(report),
        "options": [(k, plain(v)) for k, v in report.options.items() if v not in (None, False, [], (), {})],
        "files": [(f.name, f"{f.bytes:,}") for f in report.files], "file_size": megabytes(report.file_bytes),
        "dropped": left_out(report, len(report.dropped)),
    }  # fmt: skip


def _worst(report: Report) -> list[dict[str, Any]]:
    """Return the ten layers with the largest errors of the report's kind; none before a fit, where bits alone decide."""
    mixed = report.output_error is not None
    rows = [(*error([r]), r) for r in report.rows if r.decision == "rpq" and r.error is not None]
    found = [(value, r) for value, of, r in rows if value and (of == OUTPUT) == mixed]
    found.sort(key=lambda pair: -pair[0])
    return [
        {
            "name": r.name, "error": shown_error([r], mixed=mixed), "worst": number(worst([r])), "bits": f"{r.bits_per_weight:.2f}",
            "share": 100 * value / found[0][0],
        }
        for value, r in found[: charts.WORST]
    ]  # fmt: skip


def _bits(report: Report) -> list[dict[str, str]]:
    """Return a line per number of bits: which parameters have it."""
    rounded: dict[float, list[Row]] = {}
    for r in report.rows:
        if r.decision != "buffer":
            rounded.setdefault(round(r.bits_per_weight, 1), []).append(r)
    mixed = report.output_error is not None
    lines = []
    for bits, rows in sorted(rounded.items()):
        counts = Counter(charts.role(r) for r in rows)
        names = [role if n == 1 else f"{role} × {n}" for role, n in counts.items()]
        more = f" and {len(names) - 6} more" if len(names) > 7 else ""
        shown = shown_error([r for r in rows if r.decision == "rpq"], mixed=mixed)
        size = megabytes(sum(r.bytes for r in rows))
        lines.append(
            {"bits": f"{bits:g}", "names": ", ".join(names[: 6 if more else 7]) + more, "size": size, "error": shown}
        )
    return lines


def _map(report: Report) -> list[dict[str, Any]]:
    """Return the cells of the treemap, in per cent of its sides; the layout is squarify's."""
    import squarify

    groups = sorted((g for g in group(report.rows) if g.bytes), key=lambda g: -g.bytes)
    cells = [(g.name, charts.role(g.first), g.bytes, g.rows) for g in groups[:CELLS]]
    if rest := groups[CELLS:]:
        told = f"{len(rest)} smaller groups"
        cells.append((told, told, sum(g.bytes for g in rest), tuple(r for g in rest for r in g.rows)))
    errors = [error([r for r in rows if r.decision == "rpq"])[0] for *_, rows in cells]
    largest = max((e for e in errors if e), default=1.0)
    boxes = squarify.squarify(squarify.normalize_sizes([n for _, _, n, _ in cells], 100, 60), 0, 0, 100, 60)
    return [
        {
            "name": name, "label": f"{label} × {len(rows)}" if len(rows) > 1 else label, "size": megabytes(n),
            "dense": value is None, "heat": round(HEAT * value / largest) if value else 0,
            "told": f", error {number(value)}" if value else ", dense" if value is None else "",
            "x": box["x"], "dx": box["dx"], "y": box["y"] / 0.6, "dy": box["dy"] / 0.6,
        }
        for (name, label, n, rows), value, box in zip(cells, errors, boxes)
    ]  # fmt: skip
