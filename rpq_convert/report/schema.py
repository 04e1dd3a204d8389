"""The size audit as a value: one row per parameter or buffer, the files, and totals derived from them.

JSON is the truth; every other view is made from a `Report`. No torch here: reading a report must be quick.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SCHEMA_VERSION = 1
MANY_DENSE = 0.1  # share of parameters left dense above which a report warns


@dataclass(frozen=True)
class Row:
    """What happens, or happened, to one tensor.

    Args:
        decision: `"rpq"`, `"dense"` (a parameter that stays as it is) or `"buffer"`.
        reason: the rule that converts it, or why it stays.
        dense_bytes: its size unconverted; `codebook_bytes`, `code_bytes`, `scale_bytes`, `outlier_bytes` and `other_bytes`
            (what stays dense) are what is written.
        expected_error, error: relative squared error `|W - W'|^2 / |W|^2`, from the rate and as measured.
        seconds: wall time of the fit. dead: codewords that no code uses. inputs: input vectors it was
            calibrated on, if any. aliases: other names of the same tensor.
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
    aliases: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.codebook_bytes + self.code_bytes + self.scale_bytes + self.outlier_bytes + self.other_bytes

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
class Report:
    """A size audit.

    Args:
        rows: every parameter and persistent buffer.
        files: what lies in the folder, once written.
        predicted_bytes: size of the weight files by plan, headers included; equals `weight_file_bytes` on disk.
        evaluations: what was measured later: each `on` (what), `kind`, `samples` and `metrics`.
    """

    title: str
    rows: tuple[Row, ...]
    files: tuple[FileRow, ...] = ()
    warnings: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    predicted_bytes: int | None = None
    version: str = ""
    evaluations: tuple[Mapping[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"<Report of {self.title}: {len(self.rows)} tensors, {self.dense_bytes:,} bytes become {self.bytes:,}>"

    def total(self, part: str) -> int:
        """Return the sum over rows of a byte count, e.g. `total("code_bytes")`."""
        return sum(getattr(r, part) for r in self.rows)

    @property
    def bytes(self) -> int:
        return self.total("bytes")

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
        """Share of the parameters that is under RPQ."""
        return sum(r.params for r in self.rows if r.decision == "rpq") / self.params if self.params else 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.params if self.params else 0.0

    @property
    def error(self) -> float | None:
        """Mean measured relative squared error, weighted by parameters; None before a fit."""
        return mean_error(self.rows)

    @property
    def file_bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    @property
    def weight_file_bytes(self) -> int:
        return sum(f.bytes for f in self.files if f.name.endswith(".safetensors"))

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The plan's warnings, and one where more than 10 % of the parameters were left dense."""
        dense = [r for r in self.rows if r.decision == "dense"]
        left = sum(r.params for r in dense)
        if not self.params or left <= MANY_DENSE * self.params:
            return self.warnings
        reasons: dict[str, int] = {}
        for r in dense:
            reasons[r.reason] = reasons.get(r.reason, 0) + r.params
        top = sorted(reasons.items(), key=lambda kv: -kv[1])[:3]
        why = "; ".join(f"{100 * n / self.params:.1f} % {reason}" for reason, n in top)
        return (*self.warnings, f"{100 * left / self.params:.1f} % of the parameters stay dense: {why}")

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"report schema {data.get('schema_version')!r} is not {SCHEMA_VERSION}; update rpq-convert"
            )
        rest = {k: v for k, v in data.items() if k != "schema_version"}
        rows = tuple(
            _typed(Row(**{**r, "shape": tuple(r["shape"]), "aliases": tuple(r["aliases"])})) for r in rest.pop("rows")
        )
        files = tuple(_typed(FileRow(**f)) for f in rest.pop("files"))
        found = tuple(map(_evaluation, rest.pop("evaluations", ())))  # reports of earlier versions have none
        return _typed(cls(rows=rows, files=files, warnings=tuple(rest.pop("warnings")), evaluations=found, **rest))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        return cls.from_dict(json.loads(text))

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
        from rpq_convert.report.html import fragment

        return fragment(self)


KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "None": (type(None),),
    "Mapping": (Mapping,),
}


def _typed(value: Any) -> Any:
    """Return a value whose fields are of the types that its class names; a report may come from anywhere."""
    for f in fields(value):
        text, given = str(f.type), getattr(value, f.name)
        many = text.startswith("tuple[")
        names = text.removeprefix("tuple[").removesuffix(", ...]").split(" | ")
        kinds = tuple(k for n in names for k in KINDS.get(n.partition("[")[0], (object,)))
        for item in given if many else (given,):
            if not isinstance(item, kinds) or isinstance(item, bool):
                raise ValueError(f"{f.name} is {item!r}, not {text}")
    return value


def _evaluation(entry: Any) -> Any:
    numbers = (entry["samples"], *entry["metrics"].values())
    texts = (entry["on"], entry["kind"], *entry["metrics"])
    if not all(isinstance(t, str) for t in texts) or not all(type(n) in (int, float) for n in numbers):
        raise ValueError(f"an evaluation {entry!r}")
    return entry


def ratio(before: int, after: int) -> float:
    return before / after if after else math.inf


def mean_error(rows: tuple[Row, ...] | list[Row]) -> float | None:
    """Return the mean measured error of rows, weighted by parameters; None where nothing was measured."""
    measured = [r for r in rows if r.error is not None]
    weight = sum(r.params for r in measured)
    return sum((r.error or 0.0) * r.params for r in measured) / weight if weight else None
