"""Tables: the texts in rows of .jsonl, .json, .csv, .tsv and .parquet files, without the syntax around them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpq_convert.errors import SourceError

FIELDS = ("text", "content", "sentence", "document", "messages", "conversation", "conversations", "chat")
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))


def plain_text(path: Path) -> str:
    """Return a file's UTF-8 text, without a byte order mark."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise SourceError(f"{path} is no UTF-8 text: {e.reason} at byte {e.start}") from None
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}") from None


def table_texts(path: Path, field: str | None = None) -> list[str]:
    """Return the text of every row that has one.

    Args:
        field: the column; by default the first of `text`, `content`, `messages`, …, or `prompt` and `completion`, that the rows have.

    Raises:
        SourceError: no such column, or no table.
    """
    found = []
    for number, row in enumerate(_rows(path), 1):
        text = _text(row, field, f"{path}, row {number}")
        if text.strip():
            found.append(text)
    if not found:
        raise SourceError(f"{path} holds no text")
    return found


def _rows(path: Path) -> Sequence[Any]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path)
    text = plain_text(path)
    if kind in (".csv", ".tsv"):
        return list(csv.DictReader(io.StringIO(text), delimiter="\t" if kind == ".tsv" else ","))
    lines = text.splitlines() if kind == ".jsonl" else [text]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise SourceError(f"{path}, line {number}: no JSON") from None
    if kind == ".json" and rows:
        (rows,) = rows
        if isinstance(rows, Mapping):  # one list of rows under some name, or a single row
            lists = [v for v in rows.values() if isinstance(v, list) and v and isinstance(v[0], (Mapping, str))]
            alone = len(lists) != 1 or any(name in rows for name in FIELDS)
            rows = [rows] if alone else lists[0]
    return rows if isinstance(rows, list) else [rows]


def _parquet(path: Path) -> Sequence[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SourceError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as e:
        raise SourceError(f"{path} is no parquet file: {str(e).splitlines()[0]}") from None
    return rows


def _text(row: Any, field: str | None, where: str) -> str:
    if isinstance(row, str) and field is None:
        return row
    if not isinstance(row, Mapping):
        raise SourceError(f"{where} is {type(row).__name__}, not a row of named fields")
    names = [field] if field is not None else [n for n in FIELDS if n in row][:1]
    names = names or next((list(pair) for pair in PAIRS if all(n in row for n in pair)), [])
    if not names or names[0] not in row:
        have = ", ".join(map(str, row)) or "no field"
        raise SourceError(
            f"{where} has no field {field or ' or '.join(FIELDS[:2])!r}; it has {have}; choose one with field='NAME'"
        )
    return "\n".join(_said(row[name], where) for name in names)


def _said(value: Any, where: str) -> str:
    """Return a text, or what is said in a chat: its contents, a line each."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        inner = next((value[n] for n in ("content", "value", "text") if n in value), None)
        return "" if inner is None else _said(inner, where)
    if isinstance(value, Sequence):
        return "\n".join(part for part in (_said(v, where) for v in value) if part)
    raise SourceError(f"{where} holds {type(value).__name__} where a text should be")
