"""Texts in tables: the words of the rows, not their syntax."""

import json

import pytest

from rpq_convert.errors import SourceError
from rpq_convert.inputs.files import read_text
from rpq_convert.inputs.tables import table_texts

CHAT = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": [{"type": "text", "text": "on a mat"}]}]
KINDS = {
    "text": ([{"text": "one"}, {"text": "two"}], ["one", "two"]),
    "content": ([{"content": "one", "id": 3}], ["one"]),
    "messages": ([{"messages": CHAT}], ["a cat\non a mat"]),
    "old chats": ([{"conversations": [{"from": "human", "value": "hello"}]}], ["hello"]),
    "prompts": ([{"prompt": "one", "completion": "two"}], ["one\ntwo"]),
    "chat prompts": ([{"prompt": CHAT[:1], "completion": CHAT[1:]}], ["a cat\non a mat"]),
    "texts alone": (["one", "two"], ["one", "two"]),
    "empty rows": ([{"text": ""}, {"text": None}, {"text": "two"}], ["two"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_json(name, tmp_path):
    rows, wanted = KINDS[name]
    lines, whole, inside = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.json"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    whole.write_text(json.dumps(rows, indent=1))
    inside.write_text(json.dumps({"version": 1, "data": rows}))
    assert table_texts(lines) == table_texts(whole) == table_texts(inside) == wanted


def test_csv_and_a_chosen_field(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('﻿text,note\n"one, two",x\nthree,"y\nz"\n', "utf8")
    assert table_texts(file) == ["one, two", "three"]
    assert table_texts(file, "note") == ["x", "y\nz"]
    with pytest.raises(
        SourceError, match=r"a.csv, row 1 has no field 'body'; it has text, note; choose one with field='NAME'"
    ):
        table_texts(file, "body")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert table_texts(tmp_path / "a.parquet") == ["one", "two"]


def test_folders_of_texts_and_tables(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "row"}\n')
    assert read_text(tmp_path) == "plain\nrow"


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.jsonl", '{"text": "x"}\nno json', "a.jsonl, line 2: no JSON"), ("a.json", "[1]", "row 1 is int, not a row"),
    ("a.csv", "text\n", "a.csv holds no text"), ("a.jsonl", '{"body": "x"}', "row 1 has no field 'text or content'; it has body"),
])  # fmt: skip
def test_tables_that_hold_no_text(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=said):
        table_texts(tmp_path / name)
