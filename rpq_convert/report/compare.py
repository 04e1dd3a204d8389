"""Two to many reports side by side: sizes, what was measured, options, and the groups of parameters that differ.

Each report has a name, such as its folder's. The comparison is a value; terminal, JSON and HTML are made from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rpq_convert.report.quality import UNITS
from rpq_convert.report.schema import Report, Row
from rpq_convert.report.text import error, grouped, legend, megabytes, number, plain, short, shown_error, worst
from rpq_convert.showing import printable

SIZES: dict[str, Callable[[Report], Any]] = {
    "before, bytes": lambda r: r.dense_bytes,
    "after, bytes": lambda r: r.bytes,
    "weight files, bytes": lambda r: r.weight_file_bytes or r.predicted_bytes,
    "bits per weight": lambda r: r.bits_per_weight,
    "converted, %": lambda r: 100 * r.covered,
    "output error": lambda r: r.output_error,
    "weight error": lambda r: r.error,
}
UNKNOWN = "–"
NARROW = 14  # characters of a column; sizes need 11


@dataclass(frozen=True)
class Group:
    """Parameters that differ in the same way.

    Args:
        rows: of each report, those of the group; empty where it has none of them.
    """

    name: str
    count: int
    rows: tuple[tuple[Row, ...], ...]

    @property
    def first(self) -> Row:
        return next(rows[0] for rows in self.rows if rows)


@dataclass(frozen=True)
class Comparison:
    """Reports under the names that they are shown with."""

    names: tuple[str, ...]
    reports: tuple[Report, ...]

    @cached_property
    def sizes(self) -> dict[str, list[float | None]]:
        """What -> a value per report."""
        return {what: [of(r) for r in self.reports] for what, of in SIZES.items()}

    @cached_property
    def worst_layers(self) -> list[str]:
        return [f"{number(error([r])[0])}, {r.name}" if (r := x.worst_layer) is not None else "" for x in self.reports]

    @cached_property
    def metrics(self) -> dict[str, list[float | None]]:
        """What was measured, on what -> a value per report; None where it was not measured."""
        found: dict[str, list[float | None]] = {}
        for i, report in enumerate(self.reports):
            for e in report.evaluations:
                for name, value in e["metrics"].items():
                    label = f"{name.replace('_', ' ')}, {e['on']} ({e['samples']:,} {UNITS.get(e['kind'], e['kind'])})"
                    found.setdefault(label, [None] * len(self.reports))[i] = value
        return found

    @cached_property
    def options(self) -> dict[str, list[Any]]:
        """Option -> a value per report, of those that differ; None where it was not given."""
        given = [_flat(r.options) for r in self.reports]
        names = dict.fromkeys(name for options in given for name in options)
        values = {name: [options.get(name) for options in given] for name in names}
        return {name: v for name, v in values.items() if any(x != v[0] for x in v[1:])}

    @cached_property
    def groups(self) -> list[Group]:
        """The parameters that are not the same in all reports: in bytes, in how they are stored, or in their errors."""
        return [g for g, same in self._all if not same]

    @property
    def same(self) -> int:
        """How many parameters are the same in all reports."""
        return sum(g.count for g, same in self._all if same)

    @property
    def related(self) -> bool:
        """Whether the reports have a parameter in common."""
        return len(set.intersection(*({row.name for row in r.rows} for r in self.reports))) > 0

    @cached_property
    def _all(self) -> list[tuple[Group, bool]]:
        by_name = [{row.name: row for row in r.rows} for r in self.reports]
        union = {name: row for rows in reversed(by_name) for name, row in rows.items()}
        order = list(dict.fromkeys(name for rows in by_name for name in rows))

        def alike(row: Row) -> tuple[Any, ...]:
            found = [rows.get(row.name) for rows in by_name]
            kinds = tuple(None if r is None else (r.shape, r.dtype, r.spec, r.decision, r.reason) for r in found)
            return (*kinds, row.layer, _same(found))

        made = []
        for g in grouped([union[name] for name in order], alike):
            rows = tuple(tuple(of[r.name] for r in g.rows if r.name in of) for of in by_name)
            made.append((Group(g.name, len(g.rows), rows), _same([of.get(g.first.name) for of in by_name])))
        return made

    def to_dict(self) -> dict[str, Any]:
        mixed = [r.output_error is not None for r in self.reports]
        groups = [
            {
                "name": g.name, "parameters": g.count,
                "reports": [None if not rows else _facts(rows) for rows in g.rows],
            }
            for g in self.groups
        ]  # fmt: skip
        return {
            "names": list(self.names), "titles": [r.title for r in self.reports], "sizes": self.sizes,
            "worst_layers": self.worst_layers, "metrics": self.metrics, "options": self.options, "groups": groups,
            "same_parameters": self.same, "calibrated": mixed,
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, default=str)

    def lines(self) -> dict[str, list[str]]:
        """Return what is compared of the whole models, as text: what -> a text per report. Metrics come after sizes."""
        found = {
            _unit(what)[0]: [_unit(what)[1](v) for v in values]
            for what, values in self.sizes.items()
            if any(v is not None for v in values)
        }
        found["smaller"] = [f"{r.ratio:.2f}x" for r in self.reports]
        if any(self.worst_layers):
            found["worst layer"] = [x or UNKNOWN for x in self.worst_layers]
        return found | {what: [_figure(v) for v in values] for what, values in self.metrics.items()}

    def to_terminal(self, width: int = 80) -> str:
        """Return the comparison for a terminal, no line longer than `width` (at least 60)."""
        width = max(60, width)
        parts = [*_table("", self.names, self.lines(), width), ""]
        if self.options:
            shown = {
                name: [UNKNOWN if v is None else plain(v) for v in values] for name, values in self.options.items()
            }
            parts += [*_table("options that differ", self.names, shown, width), ""]
        parts += [*self._groups(width), ""]
        for line in (self.summary(), *self.legends()):
            parts += _wrap(line, width)
        return "\n".join(printable(p) for p in parts)

    def summary(self) -> str:
        """Return how much is the same."""
        if not self.related:
            return "the models have no parameter in common"
        return f"{self.same} parameters are the same in all"

    def legends(self) -> list[str]:
        """Return what the errors are; of calibrated reports and others that is not the same."""
        return list(dict.fromkeys(said for r in self.reports if (said := legend(r))))

    def cells(self, group: Group) -> list[list[str]]:
        """Return MB, bits per weight, error, worst output and how it is stored, as text, for every report."""
        return [_cells(rows, mixed=r.output_error is not None) for rows, r in zip(group.rows, self.reports)]

    def _groups(self, width: int) -> list[str]:
        if not self.groups:
            return ["no group of parameters differs"]
        name = min(24, max(map(len, map(printable, self.names))))
        head = f"{'groups that differ':<{width - 36}} {'MB':>9} {'bits/w':>7} {'error':>8} {'worst':>8}"
        lines = [head[:width]]
        for g in self.groups:
            lines.append(short(f"{g.name} x{g.count}" if g.count > 1 else g.name, width))
            for of, (size, bits, err, low, how) in zip(self.names, self.cells(g)):
                left = f"  {short(printable(of), name):<{name}}  {how}"
                lines.append(f"{short_end(left, width - 36):<{width - 36}} {size:>9} {bits:>7} {err:>8} {low:>8}")
        return lines

    def to_html(self) -> str:
        """Return the comparison as one self-contained HTML file."""
        from rpq_convert.report.html import comparison

        return comparison(self)

    def __str__(self) -> str:
        return self.to_terminal()


def compare(named: Sequence[tuple[str | Path, Report]]) -> Comparison:
    """Compare reports.

    Args:
        named: where each comes from, such as its folder; the names shown are the last parts of the paths, as many as tell them apart.
    """
    return Comparison(_names([str(where) for where, _ in named]), tuple(report for _, report in named))


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    parts = [Path(p).resolve().parts if Path(p).exists() else Path(p).parts for p in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*p[-n:])) for p in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{name} ({i})" for i, name in enumerate((Path(*p).name for p in parts), 1))


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that were given, those of a part such as calibration under `calibration.items`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{k}": v[:12] if k == "sha256" else v for k, v in value.items()}
        elif value not in (None, False, [], ()):
            found[name] = value
    return found


def _same(rows: Sequence[Row | None]) -> bool:
    """Whether a parameter is the same in all reports."""
    first = rows[0]
    keys = ("bytes", "spec", "decision", "dtype", "error", "output_error")
    return first is not None and all(
        r is not None and all(getattr(r, k) == getattr(first, k) for k in keys) for r in rows[1:]
    )


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    value, of = error(rows) if rows[0].decision == "rpq" else (None, None)
    return {
        "parameters": len(rows), "bytes": sum(r.bytes for r in rows), "bits_per_weight": rows[0].bits_per_weight,
        "decision": rows[0].decision, "spec": rows[0].spec, "reason": rows[0].reason, "error": value, "error_of": of,
        "worst_output": worst(rows),
    }  # fmt: skip


def _cells(rows: Sequence[Row], *, mixed: bool) -> list[str]:
    if not rows:
        return [UNKNOWN] * 4 + ["not in it"]
    converted = rows[0].decision == "rpq"
    return [
        f"{sum(r.bytes for r in rows) / 1e6:.3f}", f"{rows[0].bits_per_weight:.3f}",
        shown_error(rows, mixed=mixed) if converted else "", number(worst(rows)), rows[0].spec if converted else rows[0].decision,
    ]  # fmt: skip


def _unit(what: str) -> tuple[str, Callable[[Any], str]]:
    """Return what a size is called, and how it is written."""
    name, _, unit = what.partition(", ")
    write: Callable[[Any], str] = {"bytes": megabytes, "%": lambda v: f"{v:.1f} %"}.get(unit, lambda v: f"{v:.3g}")
    if what == "bits per weight":
        write = "{:.3f}".format
    return name, lambda v: UNKNOWN if v is None else write(v)


def _figure(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def _table(title: str, names: Sequence[str], lines: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """Return lines of text in columns; where these would be narrow, a line per report."""
    label = max(map(len, (title, *map(printable, lines))), default=0)
    cells = [(title, *names), *((what, *values) for what, values in lines.items())]
    room = (width - label) // len(names) - 2
    columns = [min(room, max(len(printable(row[i])) for row in cells)) for i in range(1, len(names) + 1)]
    if room >= NARROW:
        return [
            "  ".join(
                [f"{printable(row[0]):<{label}}", *(f"{short(printable(c), n):>{n}}" for c, n in zip(row[1:], columns))]
            )
            for row in cells
        ]
    name = min(30, max(len(printable(n)) for n in names))
    shown = [title] if title else []
    for what, values in lines.items():
        shown.append(short(printable(what), width))
        shown += [
            f"  {short(printable(n), name):<{name}}  {short_end(printable(v), width - name - 4)}"
            for n, v in zip(names, values)
        ]
    return shown


def short_end(text: str, width: int) -> str:
    """Return text of at most `width` characters, its end replaced by …"""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
