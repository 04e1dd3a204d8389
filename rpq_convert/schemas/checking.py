"""Check a value that was read from a file against its schema, and say in one line what is wrong: the file, the field, what was expected.

msgspec finds the first field that does not fit. Its message has the field's path, but no keys of free mappings and not what was found:
both are added here. Only a file that is refused pays for that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from rpq_convert.schemas.kinds import Kind

MAX_BYTES = 64 << 20  # of one file: a plan of 90,000 parameters
MAX_NESTING = 32  # objects and lists inside each other
NESTED = (dict, list, tuple, Mapping)

_MESSAGE = re.compile(r"(.*?)(?: - at `(key` in `)?\$([\w.\[\]]*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\[(\.\.\.)\]")
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_LIBRARY = ("Expected `", "Invalid enum value", "Number out of range", "Integer value out of range")
_WORDS: dict[Any, str] = {
    inspect.StrType: "text", inspect.BoolType: "true or false", inspect.NoneType: "null", inspect.ListType: "a list",
    inspect.IntType: "a whole number", inspect.FloatType: "a number", inspect.AnyType: "anything",
}  # fmt: skip


def read_json(path: str | Path, kind: Kind, error: type[Exception], hint: str = "") -> Any:
    """Return what a JSON file holds, checked; see `check`."""
    data = parse_json(read_text(path, kind, error, hint), kind, path, error, hint)
    check(data, kind, path, error, hint)
    return data


def read_text(path: str | Path, kind: Kind, error: type[Exception], hint: str = "") -> str:
    """Return a file's text; one that is too long or not UTF-8 is refused."""
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise error(f"{path} is not {kind.title}: it has {size:,} bytes, at most {MAX_BYTES:,} are read{hint}")
    try:
        return Path(path).read_text("utf8")
    except UnicodeDecodeError as e:
        raise error(f"{path} is not {kind.title}: it is not UTF-8 text: {e}{hint}") from None


def parse_json(text: str, kind: Kind, where: str | Path, error: type[Exception], hint: str = "") -> Any:
    """Return what a JSON text says; whether it is of the kind is left to `check`."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise error(_nested(where, kind, hint)) from None
    except ValueError as e:
        raise error(f"{where} is not {kind.title}: it is not JSON: {e}{hint}") from None
    if "\\ud" in text.lower() and not _whole(data):
        raise error(f"{where} is not {kind.title}: a text in it holds half of a character{hint}")
    return data


def check(data: Any, kind: Kind, where: str | Path, error: type[Exception], hint: str = "") -> None:
    """Raise where a value is not of a kind.

    Args:
        data: what was read: mappings, lists, texts and numbers.
        where: the file's name, for the message.
        error: the class to raise.
        hint: what to do about it, as the end of the sentence.

    Raises:
        error: in one line, the file, the field such as `jobs[3].spec.dim`, what was expected and what was found.
    """
    if _too_deep(data):
        raise error(_nested(where, kind, hint))
    try:
        msgspec.convert(data, kind.type)
    except msgspec.ValidationError as e:
        raise error(f"{where} is not {kind.title}: {_explain(str(e), data, kind)}{hint}") from None


def _whole(data: Any) -> bool:
    """Whether no text holds half of a surrogate pair, which cannot be written again."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _nested(where: str | Path, kind: Kind, hint: str) -> str:
    return f"{where} is not {kind.title}: its values are nested more than {MAX_NESTING} deep{hint}"


def _too_deep(data: Any) -> bool:
    level = [data] if isinstance(data, NESTED) else []
    for _ in range(MAX_NESTING):
        inside = (v for outer in level for v in (outer.values() if isinstance(outer, Mapping) else outer))
        level = [v for v in inside if isinstance(v, NESTED)]
    return bool(level)


def _explain(text: str, data: Any, kind: Kind) -> str:
    """Return msgspec's message with the whole path of the field, what was expected there and what was found."""
    said, key, place = _MESSAGE.fullmatch(text).groups()  # type: ignore[union-attr]
    try:
        path = _path(text, data, kind, place or "")
        name, value, expected = _show(path), _at(data, path), _type_at(kind.type, path)
    except (LookupError, TypeError, StopIteration):  # an unknown field whose name looks like a path
        return " ".join(text.split())
    if found := _FIELD.fullmatch(said):
        field = _show([*path, found[2]])
        return f"{field} is missing" if found[1].startswith("missing") else f"{field} is unknown{_known(expected)}"
    if key:
        keys = next(t.key_type for t in _types(expected) if isinstance(t, inspect.DictType))
        return f"the keys of {name or 'it'} must be {_words(keys, kind)}"
    if not said.startswith(_LIBRARY):  # a message of ours, which names the field
        return f"{name}{said}".removeprefix(".")
    return f"{name or 'it'} must be {_words(expected, kind, value)}, not {_value(value, kind)}"


def _path(text: str, data: Any, kind: Kind, place: str) -> list[str | int]:
    """Return the steps to a field; keys of mappings, which msgspec leaves out, are found by halving the mapping."""
    path: list[str | int] = []
    for name, index, _ in _STEP.findall(place):
        if name or index:
            path.append(name or int(index))
            continue
        entries = list(_at(data, path).items())
        while len(entries) > 1:
            half = entries[: len(entries) // 2]
            entries = half if _fails(text, _replaced(data, path, dict(half)), kind) else entries[len(half) :]
        data = _replaced(data, path, dict(entries))
        path.append(entries[0][0])
    return path


def _fails(text: str, data: Any, kind: Kind) -> bool:
    try:
        msgspec.convert(data, kind.type)
    except msgspec.ValidationError as e:
        return str(e) == text
    return False


def _at(data: Any, path: list[str | int]) -> Any:
    for step in path:
        data = data[step]
    return data


def _replaced(data: Any, path: list[str | int], value: Any) -> Any:
    if not path:
        return value
    copy: Any = dict(data) if isinstance(data, Mapping) else list(data)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], value)
    return copy


def _type_at(kind: Any, path: list[str | int]) -> Any:
    """Return msgspec's description of the type of a field."""
    info: Any = inspect.type_info(kind)
    for step in path:
        for part in _types(info):
            if isinstance(part, inspect.StructType):
                info = next(f.type for f in part.fields if f.encode_name == step)
            elif isinstance(part, inspect.DictType):
                info = part.value_type
            elif isinstance(part, inspect.ListType):
                info = part.item_type
            elif isinstance(part, inspect.TupleType):
                info = part.item_types[int(step)]
    return info


def _types(info: Any) -> tuple[Any, ...]:
    return info.types if isinstance(info, inspect.UnionType) else (info,)


def _words(info: Any, kind: Kind, value: Any = None) -> str:
    """Say what a type accepts."""
    if isinstance(info, inspect.UnionType):
        return " or ".join(_words(t, kind, value) for t in info.types)
    if isinstance(info, inspect.LiteralType):
        return ("one of " if len(info.values) > 1 else "") + ", ".join(json.dumps(v) for v in info.values)
    if isinstance(info, (inspect.StructType, inspect.DictType)):
        return kind.table + (" with at least one entry" if getattr(info, "min_length", None) else "")
    if isinstance(info, inspect.TupleType):
        return f"a list of {len(info.item_types)}"
    words = _WORDS[type(info)]
    if getattr(info, "pattern", None):
        return f"{words} that matches {info.pattern}"
    if getattr(info, "max_length", None) is not None:
        return f"{words} of at most {info.max_length}"
    low, above, high = (getattr(info, limit, None) for limit in ("ge", "gt", "le"))
    large = high is not None and high > 1e6 and not (isinstance(value, (int, float)) and value > high)
    limits = [f"of at least {low:g}"] if low is not None else [f"above {above:g}"] if above is not None else []
    limits += [f"at most {high:,}"] if high is not None and not large else []
    return " ".join([words, " and ".join(limits)]).rstrip()


def _known(info: Any) -> str:
    fields = [f.encode_name for f in getattr(info, "fields", ())]
    return f"; known: {', '.join(fields)}" if fields else ""


def _value(value: Any, kind: Kind) -> str:
    if isinstance(value, Mapping):
        return kind.table if value else f"{kind.table} without entries"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = json.dumps(value, default=lambda v: type(v).__name__)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _show(path: list[str | int]) -> str:
    """Return a path as `jobs[3].spec.dim`; other keys than names as `modules["0.weight"]`."""
    parts = [f".{s}" if isinstance(s, str) and s.isascii() and s.isidentifier() else f"[{json.dumps(s)}]" for s in path]
    return "".join(parts).removeprefix(".")
