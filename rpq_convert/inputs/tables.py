"""Tables: the texts and chats in rows of .jsonl, .json, .csv, .tsv, .parquet and .arrow files, without the syntax around them."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpq_convert.errors import SourceError
from rpq_convert.storage.formats import TABLES

FIELDS = ("text", "content", "sentence", "document", "messages", "conversation", "conversations", "chat")
CHATS = FIELDS[4:]
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
PAIR_NAMES = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("text1", "text2"), ("text_a", "text_b"),
    ("question1", "question2"), ("premise", "hypothesis"), ("anchor", "positive"), ("text", "text_pair"), ("query", "passage"),
    ("query", "document"), ("question", "context"),
)  # fmt: skip
SCORES = ("score", "similarity_score", "similarity", "relatedness_score", "label")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}  # of other tools -> of templates
HEAD = 1 << 16  # characters of a table that are looked at before it is read
Chat = list[dict[str, str]]


def kind_of(path: Path) -> str:
    """Return the ending that says what a file is, in small letters, without that of its packing."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def plain_text(path: Path, limit: int = -1) -> str:
    """Return a file's text, unpacked, without a byte order mark: UTF-8, or UTF-16 where it begins with one.

    Args:
        limit: at most so many characters.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            data = file.read(limit)
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror or e}") from None
    except EOFError:
        raise SourceError(f"{path} cannot be read: the file ends too early") from None
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as e:
        if limit > 0 and e.start > len(data) - 4:  # in the middle of a character
            return data[: e.start].decode("utf-16" if wide else "utf-8-sig")
        raise SourceError(f"{path} is no UTF-8 text: {e.reason} at byte {e.start}; save it as UTF-8") from None


def table_texts(path: Path, field: str | None = None) -> list[str]:
    """Return the text of every row that has one; of a chat, what is said in it, a line each."""
    return [text if isinstance(text, str) else said(text) for text in table_items(path, field)[0]]


def table_items(path: Path, field: str | None = None) -> tuple[list[str | Chat], str]:
    """Return the text or the chat of every row that has one, and the column that they are from.

    Args:
        field: the column; by default the first of `text`, `content`, `messages`, …, or `prompt` and `completion`, that the rows have;
            or the only one that holds texts.

    Raises:
        SourceError: no such column, or no table.
    """
    return items_of(rows_of(path), str(path), field)


def items_of(rows: Sequence[Any], where: str, field: str | None = None) -> tuple[list[str | Chat], str]:
    """Return the text or the chat of every row that has one, and the column that they are from; see `table_items`."""
    columns, found = "", []
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        names = [] if isinstance(row, str) and field is None else _columns(row, field, place)
        item = _item(row, names, place)
        if item.strip() if isinstance(item, str) else item:
            found.append(item)
            columns = columns or " and ".join(names)
    if not found:
        raise SourceError(f"{where} holds no text")
    return found, columns


def check_head(path: Path, field: str | None = None) -> None:
    """Read a table's first row, as far as that needs no package.

    Raises:
        SourceError: no table, or no such column.
    """
    kind = kind_of(path)
    if kind in (".parquet", ".arrow"):
        return
    if kind == ".json":
        if (head := plain_text(path, HEAD).lstrip()) and head[0] not in "[{":
            raise SourceError(f"{path} is no JSON of rows: it begins with {head[:20]!r}")
        return
    text = plain_text(path, HEAD)
    if len(text) > HEAD // 4:
        text = text[: text.rfind("\n") + 1]  # a whole number of lines
    rows = _rows_of_text(path, text)
    if first := next(itertools.islice(rows, 1), None):
        _columns(first, field, f"{path}, row 1") if not isinstance(first, str) or field else None


def is_pairs(path: str | Path) -> bool:
    """Return whether a file is a table of scored pairs, by its head."""
    if not Path(path).is_file() or kind_of(Path(path)) not in TABLES:
        return False
    try:
        return bool(scored_pairs(Path(path), HEAD))
    except SourceError:
        return False


def scored_pairs(path: Path, limit: int = -1) -> list[tuple[str, str, float]]:
    """Return (sentence, sentence, score) of every row of a table.

    Columns are told by their names; in a .csv or .tsv without known names they are the first three, and a first line whose third field
    is no number is a heading.

    Args:
        limit: look at so many characters of a .csv or .tsv alone.

    Raises:
        SourceError: a row that is none.
    """
    columns: Any
    kind = kind_of(path)
    if kind in (".csv", ".tsv", ".txt", ""):
        text = plain_text(path, limit)
        text = text[: text.rfind("\n") + 1] if 0 < limit <= len(text) else text
        rows: list[Any] = list(csv.reader(io.StringIO(text), delimiter="\t" if kind == ".tsv" else _delimiter(text)))
        places = _pair_columns(rows[0]) if rows else None
        columns, rows = (places, rows[1:]) if places else ((0, 1, 2), rows)
        first = 2 if places else 1
    else:
        rows, first = rows_of(path), 1
        columns = _pair_columns(list(rows[0])) if rows and isinstance(rows[0], Mapping) else None
        names = list(rows[0]) if columns else []
        columns = tuple(names[c] for c in columns) if columns else ("sentence1", "sentence2", "score")
    found = []
    for number, row in enumerate(rows, first):
        try:
            a, b, score = (row[c] for c in columns)
            found.append((str(a), str(b), float(score)))
        except (IndexError, KeyError, ValueError, TypeError):
            if number == 1 and isinstance(row, list):
                continue
            raise SourceError(f"{path}, line {number}: not sentence, sentence, score") from None
    return found


def _pair_columns(names: Sequence[str]) -> tuple[int, int, int] | None:
    """Return where a heading has two sentences and their score, by the names that data sets use."""
    at = {str(n).strip().lower(): i for i, n in enumerate(names)}
    pair = next((p for p in PAIR_NAMES if all(n in at for n in p)), None)
    score = next((n for n in SCORES if n in at), None)
    return None if pair is None or score is None else (at[pair[0]], at[pair[1]], at[score])


def rows_of(path: Path) -> list[Any]:
    """Return the rows of a table, as they are.

    Raises:
        SourceError: no table.
    """
    kind = kind_of(path)
    if kind in (".parquet", ".arrow"):
        return _with_pyarrow(path, kind)
    return list(_rows_of_text(path, plain_text(path)))


def _rows_of_text(path: Path, text: str) -> Iterator[Any]:
    kind = kind_of(path)
    if kind in (".csv", ".tsv"):
        yield from _csv_rows(path, text, "\t" if kind == ".tsv" else _delimiter(text))
        return
    if kind == ".jsonl" or (kind == ".json" and _is_lines(text)):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _parsed(line, f"{path}, line {number}")
        return
    rows = _parsed(text, f"{path}, line 1")
    if isinstance(rows, Mapping):  # one list of rows under some name, or a single row
        lists = [v for v in rows.values() if isinstance(v, list) and v and isinstance(v[0], (Mapping, str))]
        alone = len(lists) != 1 or any(name in rows for name in FIELDS)
        rows = [rows] if alone else lists[0]
    yield from rows if isinstance(rows, list) else [rows]


def _csv_rows(path: Path, text: str, delimiter: str) -> list[dict[str, Any]]:
    before = csv.field_size_limit(len(text) + 1)  # a document may be longer than the module expects of a field
    try:
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as e:
        raise SourceError(f"{path} is no table: {e}") from None
    finally:
        csv.field_size_limit(before)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SourceError(f"{where}: no JSON") from None


def _is_lines(text: str) -> bool:
    """Return whether a .json file holds a row a line, as many tools write it."""
    first, _, rest = text.strip().partition("\n")
    return (
        bool(rest.strip()) and first.rstrip().endswith("}") and first.startswith("{") and rest.lstrip().startswith("{")
    )


def _delimiter(text: str) -> str:
    """Return what separates the fields of a .csv: a comma, or the semicolon or tab of a heading that has no comma."""
    first = text.partition("\n")[0]
    return next((d for d in ",;\t" if d in first), ",")


def _with_pyarrow(path: Path, kind: str) -> list[Any]:
    try:
        import pyarrow
        from pyarrow import ArrowException, ipc, parquet
    except ImportError:
        raise SourceError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    try:
        if kind == ".parquet":
            rows: list[Any] = parquet.read_table(path).to_pylist()
        else:
            with pyarrow.memory_map(str(path)) as mapped:
                rows = ipc.open_stream(mapped).read_all().to_pylist()
    except (ArrowException, OSError) as e:
        raise SourceError(f"{path} is no {kind[1:]} file: {str(e).splitlines()[0]}") from None
    return rows


def _columns(row: Any, field: str | None, where: str) -> list[str]:
    """Return the names of the columns that hold a row's text."""
    if not isinstance(row, Mapping):
        raise SourceError(f"{where} is {type(row).__name__}, not a row of named fields")
    names = [field] if field is not None else [n for n in FIELDS if n in row][:1]
    names = names or next((list(pair) for pair in PAIRS if all(n in row for n in pair)), [])
    if not names:  # the only column of texts, whatever its name
        told = [str(n) for n, v in row.items() if isinstance(v, str) and " " in v.strip()]
        names = told if len(told) == 1 else []
    if not names or names[0] not in row:
        have = ", ".join(map(str, row)) or "no field"
        raise SourceError(
            f"{where} has no field {field or ' or '.join(FIELDS[:2])!r}; it has {have}; choose one with field='NAME'"
        )
    return names


def _item(row: Any, names: Sequence[str], where: str) -> str | Chat:
    if not names:
        return str(row)
    values = [row[name] for name in names]
    chats = [chat for v in values if (chat := _chat(v)) is not None]
    if chats and len(chats) == len(values):
        return [turn for chat in chats for turn in chat]
    return "\n".join(_said(v, where) for v in values)


def _chat(value: Any) -> Chat | None:
    """Return a list of turns as templates take them, or None where a value is no chat."""
    turns = list(value) if isinstance(value, (list, tuple)) else []
    chat = []
    for turn in turns:
        role = next((turn[n] for n in ("role", "from") if n in turn), None) if isinstance(turn, Mapping) else None
        if not isinstance(role, str):
            return None
        chat.append({"role": ROLES.get(role, role), "content": _said(turn, "a turn")})
    return chat or None


def said(chat: Chat) -> str:
    """Return what is said in a chat, a line for each turn."""
    return "\n".join(turn["content"] for turn in chat if turn["content"])


def _said(value: Any, where: str) -> str:
    """Return a text, or what is said in a turn: its contents, a line each."""
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
