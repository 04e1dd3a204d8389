"""The report as text: a terminal table of grouped rows, Markdown, CSV.

Layers that repeat (same type, shape, spec and decision; names that differ in their numbers alone) share one line, written as
`layers.{0…31}.fc1.weight`. Every view groups by the same function.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields

from rpq_convert.report.quality import quality
from rpq_convert.report.schema import Report, Row, largest, mean, ratio
from rpq_convert.report.verdict import verdict
from rpq_convert.showing import csv_cell, markdown_code, markdown_text, printable


@dataclass(frozen=True)
class Group:
    """Rows that differ in the numbers of their names alone."""

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.rows)

    @property
    def dense_bytes(self) -> int:
        return sum(r.dense_bytes for r in self.rows)


def group(rows: Iterable[Row]) -> list[Group]:
    """Group rows that are stored alike by pattern, in the order of their first members."""
    return grouped(rows, lambda r: (r.layer, r.shape, r.dtype, r.spec, r.decision, r.reason))


def grouped(rows: Iterable[Row], alike: Callable[[Row], Hashable]) -> list[Group]:
    """Group rows for which `alike` gives the same and whose names differ in their numbers alone."""
    found: dict[tuple[str, Hashable], list[Row]] = {}
    for r in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "#", r.name)
        found.setdefault((pattern, alike(r)), []).append(r)
    return [Group(_name(pattern, members), tuple(members)) for (pattern, _), members in found.items()]


def _name(pattern: str, rows: Sequence[Row]) -> str:
    parts = [r.name.split(".") for r in rows]
    shown = []
    for column, token in zip(zip(*parts), pattern.split(".")):
        shown.append(_numbers(column) if token == "#" else token)
    return ".".join(shown)


def _numbers(column: Sequence[str]) -> str:
    values = sorted({int(c) for c in column})
    if len(values) == 1:
        return str(values[0])
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}…{values[-1]}}}"
    text = ",".join(map(str, values))
    return f"{{{text}}}" if len(text) <= 12 else f"{{{values[0]}..{values[-1]}: {len(values)}}}"


def megabytes(n: int) -> str:
    """Return a size in MB of 10**6 bytes, with three decimals."""
    return f"{n / 1e6:.3f} MB"


def short(text: str, width: int) -> str:
    """Return text of at most `width` characters, its middle replaced by … where it is longer."""
    if len(text) <= width:
        return text
    if width < 2:
        return text[:width]
    left = (width - 1) // 3  # names differ at their ends
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def plain(value: object) -> str:
    """Return an option's value as text: of a list its items, of a record its fields."""
    if isinstance(value, dict):
        return ", ".join(f"{k}={plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


OUTPUT, WEIGHT, EXPECTED = "output", "weight", "expected"  # what an error is of, and that it was not measured


def error(rows: Iterable[Row]) -> tuple[float | None, str]:
    """Return the mean error of rows that share a line, and what it is of: outputs where they were measured, else weights."""
    rows = tuple(rows)
    for measure, of in (("output_error", OUTPUT), ("error", WEIGHT), ("expected_error", EXPECTED)):
        if (value := mean(rows, measure)) is not None:
            return value, of
    return None, EXPECTED


def worst(rows: Iterable[Row]) -> float | None:
    """Return the error of the worst output of all rows, as it was measured by `error`; None before a fit."""
    rows = tuple(rows)
    measure = "worst_output" if error(rows)[1] == OUTPUT else "worst"
    row = largest(rows, measure)
    return None if row is None else getattr(row, measure)


def shown_error(rows: Iterable[Row], *, mixed: bool) -> str:
    """Return the mean error of rows as text: `~` where it is expected, `w` after a weight error beside errors of outputs."""
    value, of = error(rows)
    return (
        ("~" if of == EXPECTED else "") + number(value) + ("w" if mixed and of != OUTPUT else "")
        if value is not None
        else ""
    )


def legend(report: Report) -> str:
    """Return what the errors in a table of the report's rows are; empty where it shows none."""
    shown = {error([r])[1] for r in report.rows if r.decision == "rpq" and error([r])[0] is not None}
    mixed = OUTPUT in shown and len(shown) > 1
    said = {
        OUTPUT: "relative squared error of the layer's output on its calibration inputs",
        WEIGHT: "w: of its weights" if mixed else "relative squared error of the weights; that of outputs is not known",
        EXPECTED: "~: of the weights, expected from the bits, not measured",
    }
    last = [] if shown <= {EXPECTED} else ["worst: that of the worst output"]
    return "error: " + "; ".join([*(said[of] for of in said if of in shown), *last]) if shown else ""


def means(report: Report) -> str:
    """Return the mean errors, the worst layer and the worst output in one line; empty before a fit."""
    layer, row = report.worst_layer, report.worst
    if layer is None or row is None:
        return ""
    parts = [
        f"{number(value)} of {of}"
        for of, value in (("outputs", report.output_error), ("weights", report.error))
        if value is not None
    ]
    return (
        f"mean error {', '.join(parts)}; worst layer {number(error([layer])[0])}, {layer.name}; "
        f"worst output {number(worst([row]))}, in {row.name}"
    )


def terminal(report: Report, width: int = 80) -> str:
    """Return the report for a terminal, no line longer than `width` (at least 60)."""
    width = max(60, width)
    lines = [*_wrap(f"{report.title}: {totals(report)}", width), ""]
    name = width - 45
    converted = group(r for r in report.rows if r.decision == "rpq")
    if converted:
        lines.append(
            f"{'converted':<{name}} {'n':>4} {'MB':>8} {'bits/w':>6} {'ratio':>6} {'error':>8} {'worst':>7}"[:width]
        )
        for g in converted:
            shown = shown_error(g.rows, mixed=report.output_error is not None)
            lines.append(
                f"{short(g.name, name):<{name}} {len(g.rows):>4} {g.bytes / 1e6:>8.3f} "
                f"{g.first.bits_per_weight:>6.3f} {ratio(g.dense_bytes, g.bytes):>5.1f}x {shown:>8} {number(worst(g.rows)):>7}"
            )
        lines += [*_wrap(legend(report), width), ""]
    for title, decision in (("left dense", "dense"), ("buffers", "buffer")):
        reasons: dict[str, list[Row]] = {}
        for r in report.rows:
            if r.decision == decision:
                reasons.setdefault(re.sub(r"[\d,]{2,}", "#", r.reason), []).append(r)
        if reasons:
            lines.append(f"{title:<{width - 17}} {'n':>5} {'MB':>10}")
        for reason, rows in sorted(reasons.items(), key=lambda kv: -sum(r.bytes for r in kv[1])):
            text = rows[0].reason if len(rows) == 1 else reason
            size = sum(r.bytes for r in rows)
            lines.append(f"{short(text, width - 17):<{width - 17}} {len(rows):>5} {size / 1e6:>10.3f}")
        if reasons:
            lines.append("")
    if report.dropped:
        lines += [
            f"left out of the source ({len(report.dropped)})",
            *(short(f"  {line}", width) for line in left_out(report)),
            "",
        ]
    lines += sizes(report)
    if said := means(report):
        lines += ["", *_wrap(said, width)]
    for line in quality(report):
        lines += ["", *_wrap(line, width)]
    if (judged := verdict(report)) is not None:
        lines += ["", *_wrap(f"quality: {judged}", width)]
    for warning in report.all_warnings:
        lines += ["", *_wrap(f"warning: {warning}", width)]
    return "\n".join(map(printable, lines))


def sizes(report: Report) -> list[str]:
    """Return a line per kind of bytes: of the tensors, in memory where that differs, by plan, on disk."""
    parts = {
        "codebooks": "codebook",
        "codes": "code",
        "scales": "scale",
        "outliers": "outlier",
        "dense tensors": "other",
    }
    found = {name: (report.total(f"{part}_bytes"), "") for name, part in parts.items()}
    if not found["outliers"][0]:
        del found["outliers"]
    found["total"] = report.bytes, ""
    if report.held_bytes != report.bytes:
        found["in memory"] = report.held_bytes, ""
    if report.predicted_bytes is not None:
        found["weight files"] = report.predicted_bytes, " by plan"
    if report.files:
        n = report.weight_file_bytes
        found["on disk"] = n, " as planned" if n == report.predicted_bytes else " NOT AS PLANNED"
        found["other files"] = report.file_bytes - n, ""
    return [f"{name:<14} {megabytes(n):>15} {n:>20,} bytes{said}" for name, (n, said) in found.items()]


def left_out(report: Report, most: int = 20) -> list[str]:
    """Return a line per tensor of the source that is left out, at most so many."""
    lines = [f"{d.name} {list(d.shape)} {d.dtype}: {d.reason}" for d in report.dropped[:most]]
    return lines + ([f"and {len(report.dropped) - most} more"] if len(report.dropped) > most else [])


def totals(report: Report) -> str:
    return (
        f"{megabytes(report.dense_bytes)} -> {megabytes(report.bytes)}, {report.ratio:.1f}x smaller, "
        f"{report.bits_per_weight:.2f} bits/weight, {100 * report.covered:.1f} % under RPQ"
    )


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def markdown(report: Report) -> str:
    """Return a Markdown size table, rows grouped, for a model card."""
    lines = [
        f"**{totals(report)}**",
        "",
        "| tensor | layer | shape | how | dense | now | bits/weight | output error | weight error | worst output |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    tables, small = ([r for r in report.rows if _is_small(r) is one_axis] for one_axis in (False, True))
    for g in group(tables):
        r = g.first
        how = r.spec if r.decision == "rpq" else f"dense: {r.reason}"
        many = f" (x{len(g.rows)})" if len(g.rows) > 1 else ""
        cells = [
            f"{markdown_code(g.name)}{many}", markdown_text(r.layer), "x".join(map(str, r.shape)), markdown_text(how),
            megabytes(g.dense_bytes), megabytes(g.bytes), f"{r.bits_per_weight:.3f}",
            number(mean(g.rows, "output_error")), number(mean(g.rows, "error")), number(worst(g.rows)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if small:
        size = megabytes(sum(r.bytes for r in small))
        lines += [
            "",
            f"{len(small)} dense tensors of one axis or none, such as biases and norms, are not listed: {size}.",
        ]
    if said := means(report):
        lines += ["", markdown_text(f"Relative squared errors: {said}.")]
    if report.dropped:
        lines += ["", "Left out of the source:", "", *(f"- {markdown_text(line)}" for line in left_out(report))]
    lines += [f"\n> **Warning**: {markdown_text(w)}" for w in report.all_warnings]
    return "\n".join(lines)


def _is_small(row: Row) -> bool:
    return row.decision != "rpq" and len(row.shape) < 2


def csv_table(report: Report) -> str:
    """Return one line per tensor with every field."""
    out = io.StringIO()
    writer = csv.writer(out)
    names = [f.name for f in fields(Row)]
    writer.writerow([*names, "bytes", "bits_per_weight", "ratio"])
    for r in report.rows:
        values = [getattr(r, n) for n in names]
        shown = [";".join(map(str, v)) if isinstance(v, tuple) else "" if v is None else v for v in values]
        writer.writerow([*map(csv_cell, shown), r.bytes, r.bits_per_weight, r.ratio])
    return out.getvalue()
