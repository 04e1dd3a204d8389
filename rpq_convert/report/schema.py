"""The size audit as a value: one row per parameter or buffer, the files, and totals derived from them.

JSON is the stored form; every other view is made from a `Report`. This room does not import torch: reading a report is quick.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rpq_convert.errors import SourceError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check, parse_json, read_text

SCHEMA_VERSION = 1
LOST = 1 - 1e-6  # error of an output that decodes to zeros
MANY_DENSE = 0.1  # share of parameters left dense above which a report warns


@dataclass(frozen=True)
class Row:
    """What happens, or happened, to one tensor.

    Args:
        decision: `"rpq"`, `"dense"` (a parameter that stays as it is) or `"buffer"`.
        reason: the rule that converts it, or why it stays dense.
        dense_bytes: its size before. `codebook_bytes`, `code_bytes`, `scale_bytes`, `outlier_bytes` and `other_bytes` (what
            stays dense) are its size in files after.
        memory_bytes: its size in memory after, where files hold it in fewer bytes.
        expected_error: relative squared error of the weights, `|W - W'|^2 / |W|^2`, estimated from bits per weight.
        error: the same, as measured.
        seconds: wall time of the fit.
        dead: codewords that no code uses.
        inputs: input vectors that it was calibrated on, if any.
        worst: the weight error of its worst output.
        output_error: relative squared error of the layer's output on the calibration inputs, as measured.
        worst_output: that of its worst output.
        aliases: other names of the same tensor.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    decision: str
    reason: str
    dense_bytes: int
    codebook_bytes: int = 0
    code_bytes: int = 0
    scale_bytes: int = 0
    outlier_bytes: int = 0
    other_bytes: int = 0
    spec: str = ""
    expected_error: float | None = None
    error: float | None = None
    seconds: float | None = None
    dead: int | None = None
    inputs: int | None = None
    worst: float | None = None
    output_error: float | None = None
    worst_output: float | None = None
    memory_bytes: int | None = None
    aliases: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.codebook_bytes + self.code_bytes + self.scale_bytes + self.outlier_bytes + self.other_bytes

    @property
    def held_bytes(self) -> int:
        """Its size in memory."""
        return self.bytes if self.memory_bytes is None else self.memory_bytes

    @property
    def params(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.params if self.params else 0.0

    @property
    def ratio(self) -> float:
        return ratio(self.dense_bytes, self.bytes)


@dataclass(frozen=True)
class FileRow:
    name: str
    bytes: int


@dataclass(frozen=True)
class Dropped:
    """A tensor of the source that is left out, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


def dropped_of(entries: Iterable[Mapping[str, Any]]) -> tuple[Dropped, ...]:
    """Return what a checked file lists as left out."""
    return tuple(Dropped(**{**e, "shape": tuple(e["shape"])}) for e in entries)


@dataclass(frozen=True)
class Report:
    """A size audit.

    Args:
        rows: every parameter and persistent buffer.
        files: the files of the folder, once written.
        predicted_bytes: size of the weight files by plan, headers included; equals `weight_file_bytes` on disk.
        evaluations: what was measured later: each `on` (what), `kind`, `samples` and `metrics`, and perhaps `layers`: path -> error that
            the layer adds.
        dropped: tensors of the source that are left out.
    """

    title: str
    rows: tuple[Row, ...]
    files: tuple[FileRow, ...] = ()
    warnings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    predicted_bytes: int | None = None
    version: str = ""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    dropped: tuple[Dropped, ...] = ()

    def __repr__(self) -> str:
        return f"<Report of {self.title}: {len(self.rows)} tensors, {self.dense_bytes:,} bytes become {self.bytes:,}>"

    def total(self, part: str) -> int:
        """Return the sum over rows of a byte count, e.g. `total("code_bytes")`."""
        return sum(getattr(r, part) for r in self.rows)

    @property
    def bytes(self) -> int:
        return self.total("bytes")

    @property
    def held_bytes(self) -> int:
        """Its size in memory; files may be smaller (`storage="rans"`)."""
        return self.total("held_bytes")

    @property
    def dense_bytes(self) -> int:
        return self.total("dense_bytes")

    @property
    def ratio(self) -> float:
        return ratio(self.dense_bytes, self.bytes)

    @property
    def params(self) -> int:
        return sum(r.params for r in self.rows if r.decision != "buffer")

    @property
    def covered(self) -> float:
        """Share of the parameters that are stored as codes."""
        return sum(r.params for r in self.rows if r.decision == "rpq") / self.params if self.params else 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.params if self.params else 0.0

    @property
    def error(self) -> float | None:
        """Mean measured weight error, weighted by parameters; None before a fit."""
        return mean(self.rows, "error")

    @property
    def output_error(self) -> float | None:
        """Mean measured error of the layers' outputs, weighted by parameters; None without calibration."""
        return mean(self.rows, "output_error")

    @property
    def worst_layer(self) -> Row | None:
        """The row with the largest error, of its output where some were measured, else of its weights; None before a fit."""
        return largest(self.rows, "output_error") or largest(self.rows, "error")

    @property
    def worst(self) -> Row | None:
        """The row whose worst output is the worst of all, by the same measure; None before a fit."""
        return largest(self.rows, "worst_output") or largest(self.rows, "worst")

    @property
    def file_bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    @property
    def weight_file_bytes(self) -> int:
        return sum(f.bytes for f in self.files if f.name.endswith(".safetensors") and "/" not in f.name)

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The plan's warnings, and those that follow: a bad verdict, outputs that were lost, many parameters left dense."""
        return (*self._judged(), *self.plain_warnings)

    @property
    def plain_warnings(self) -> tuple[str, ...]:
        """All warnings but the verdict, for views that show it by itself."""
        return (*self.warnings, *self._lost(), *self._left_dense())

    def _judged(self) -> tuple[str, ...]:
        from rpq_convert.report.verdict import POOR, RUINED, verdict

        found = verdict(self)
        if found is None or found.level not in (POOR, RUINED):
            return ()
        what = "this model has lost what it knew" if found.level == RUINED else "this model has lost much"
        return (f"{what}: {found.sentence}; {found.advice}",)

    def _lost(self) -> tuple[str, ...]:
        lost = [r.name for r in self.rows if r.worst is not None and r.worst >= LOST]
        if not lost:
            return ()
        return (
            f"some outputs of {len(lost)} weights are lost (an error of 1), first in {lost[0]}; use scales='float32'",
        )

    def _left_dense(self) -> tuple[str, ...]:
        dense = [r for r in self.rows if r.decision == "dense"]
        left = sum(r.params for r in dense)
        if not self.params or left <= MANY_DENSE * self.params:
            return ()
        reasons: dict[str, int] = {}
        for r in dense:
            reasons[r.reason] = reasons.get(r.reason, 0) + r.params
        top = sorted(reasons.items(), key=lambda kv: -kv[1])[:3]
        why = "; ".join(f"{100 * n / self.params:.1f} % {reason}" for reason, n in top)
        return (f"{100 * left / self.params:.1f} % of the parameters stay dense: {why}",)

    def to_dict(self) -> dict[str, Any]:
        data = {"schema_version": SCHEMA_VERSION} | without_empty(asdict(self), "dropped")
        return data | {"summary": self.summary()}

    def summary(self) -> dict[str, Any]:
        """Return what follows from the rows, as JSON values: sizes, mean errors, the worst layer and the worst output."""
        plain = ("bytes", "held_bytes", "dense_bytes", "bits_per_weight", "output_error", "error")
        return {k: getattr(self, k) for k in plain} | {
            "worst_layer": _worst(self.worst_layer, "output_error", "error"),
            "worst_output": _worst(self.worst, "worst_output", "worst"),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the value") -> Report:
        """Return the report that `to_dict` described.

        Args:
            where: what holds it, such as a file's path, for messages.

        Raises:
            SourceError: another version, or a field that is missing, unknown, of the wrong type or out of its range.
        """
        version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, Mapping) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise SourceError(
                f"{where} is not a report of schema {SCHEMA_VERSION}, but {version!r}; update rpq-convert"
            )
        check(data, kinds.REPORT, where, SourceError)
        rest = {k: v for k, v in data.items() if k not in ("schema_version", "summary")}
        rows = tuple(Row(**{**r, "shape": tuple(r["shape"]), "aliases": tuple(r["aliases"])}) for r in rest.pop("rows"))
        files = tuple(FileRow(**f) for f in rest.pop("files"))
        warnings, found = tuple(rest.pop("warnings")), tuple(rest.pop("evaluations", ()))  # earlier versions have none
        dropped = dropped_of(rest.pop("dropped", ()))
        return cls(rows=rows, files=files, warnings=warnings, evaluations=found, dropped=dropped, **rest)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "the text") -> Report:
        """Return the report that a JSON text describes; see `from_dict`."""
        return cls.from_dict(parse_json(text, kinds.REPORT, where, SourceError), where)

    def to_terminal(self, width: int = 80) -> str:
        from rpq_convert.report.text import terminal

        return terminal(self, width)

    def to_markdown(self) -> str:
        from rpq_convert.report.text import markdown

        return markdown(self)

    def to_csv(self) -> str:
        from rpq_convert.report.text import csv_table

        return csv_table(self)

    def to_html(self) -> str:
        from rpq_convert.report.html import page

        return page(self)

    def __str__(self) -> str:
        return self.to_terminal()

    def _repr_html_(self) -> str:
        from rpq_convert.report.html import card

        return card(self)


def read_report(path: str | Path) -> Report:
    """Return the report in a file.

    Raises:
        SourceError: it holds none.
    """
    return Report.from_json(read_text(path, kinds.REPORT, SourceError), str(path))


def without_empty(data: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a record without a field that most records do not need, where it is empty."""
    return {k: v for k, v in data.items() if k != name or v}


def ratio(before: int, after: int) -> float:
    return before / after if after else math.inf


def _worst(row: Row | None, output: str, weight: str) -> dict[str, Any] | None:
    if row is None:
        return None
    of = "weight" if getattr(row, output) is None else "output"
    return {"name": row.name, "of": of, "value": getattr(row, weight if of == "weight" else output)}


def mean(rows: Iterable[Row], measure: str) -> float | None:
    """Return the mean of a measure of rows, weighted by parameters; None where nothing was measured."""
    measured = [r for r in rows if getattr(r, measure) is not None]
    weight = sum(r.params for r in measured)
    return sum(getattr(r, measure) * r.params for r in measured) / weight if weight else None


def largest(rows: Iterable[Row], measure: str) -> Row | None:
    """Return the row with the largest value of a measure; None where nothing was measured."""
    return max((r for r in rows if getattr(r, measure) is not None), key=lambda r: getattr(r, measure), default=None)
