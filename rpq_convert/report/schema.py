"""stub until the views land"""
from __future__ import annotations
import json
from dataclasses import asdict, dataclass, field
from typing import Any
import math

@dataclass(frozen=True)
class Row:
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
    other_bytes: int = 0
    spec: str = ""
    expected_error: float | None = None
    error: float | None = None
    seconds: float | None = None
    dead: int | None = None
    aliases: tuple[str, ...] = ()
    @property
    def bytes(self): return self.codebook_bytes + self.code_bytes + self.scale_bytes + self.other_bytes
    @property
    def params(self): return math.prod(self.shape)

@dataclass(frozen=True)
class FileRow:
    name: str
    bytes: int

@dataclass(frozen=True)
class Report:
    title: str
    rows: tuple[Row, ...]
    files: tuple[FileRow, ...] = ()
    warnings: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    predicted_bytes: int | None = None
    version: str = ""
    @property
    def bytes(self): return sum(r.bytes for r in self.rows)
    @property
    def dense_bytes(self): return sum(r.dense_bytes for r in self.rows)
    def to_json(self): return json.dumps(asdict(self))
    @classmethod
    def from_json(cls, text):
        d = json.loads(text)
        return cls(title=d["title"], rows=tuple(Row(**r) for r in d["rows"]), files=tuple(FileRow(**f) for f in d["files"]))
    def to_markdown(self): return ""
