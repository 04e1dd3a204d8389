"""Data as people have it: recognised, read, and told in words; what is none is named."""

import gzip
import io
import json
import zipfile
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rpq_convert.errors import CalibrationError, HubError, SourceError
from rpq_convert.inputs.files import read_text, words_of
from rpq_convert.inputs.found import find_data, is_path
from rpq_convert.inputs.hub_data import hub_items, parts_of
from rpq_convert.inputs.tables import scored_pairs, table_items

ROWS = [{"id": i, "body": f"row {i} has words"} for i in range(3)]
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "well met"}]


def zipped(name):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as packed:
        packed.writestr(name, "x")
    return data.getvalue()


class Template:
    """A tokenizer, as far as chats go."""

    chat_template = "yes"

    def apply_chat_template(self, chat, tokenize):
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(path, field=None, tokenizer=None):
    said = []
    text = read_text(path, field, tokenizer, said.append)
    (line,) = said
    return text, line


KINDS = {  # name -> (contents, text, what is said)
    "a.txt": (b"one two\n\nthree\n", "one two\n\nthree\n", "read 2 lines, 3 words of a.txt"),
    "a.md": ("é".encode(), "é", "read 1 line, 1 words of a.md"),
    "notes": (b"no ending", "no ending", "read 1 line, 2 words of notes"),
    "a.txt.gz": (gzip.compress(b"one two"), "one two", "read 1 line, 2 words of a.txt.gz"),
    "wide.txt": ("één".encode("utf-16"), "één", "read 1 line, 1 words of wide.txt"),
    "a.jsonl": (b'{"text": "one two"}\n{"text": "three"}', "one two\nthree", "read 2 rows, 3 words, column text of a.jsonl"),
    "a.jsonl.gz": (gzip.compress(b'{"text": "one"}'), "one", "read 1 row, 1 words, column text of a.jsonl.gz"),
    "lines.json": (b'{"text": "one"}\n{"text": "two"}\n', "one\ntwo", "read 2 rows, 2 words, column text of lines.json"),
    "a.json": (b'[{"content": "one"}]', "one", "read 1 row, 1 words, column content of a.json"),
    "only.jsonl": (json.dumps(ROWS[0]).encode(), "row 0 has words", "read 1 row, 4 words, column body of only.jsonl"),
    "a.csv": (b'text,n\n"one, two",3\n', "one, two", "read 1 row, 2 words, column text of a.csv"),
    "semicolons.csv": (b"text;n\none, two;3\n", "one, two", "read 1 row, 2 words, column text of semicolons.csv"),
    "a.tsv": (b"text\tn\none two\t3\n", "one two", "read 1 row, 2 words, column text of a.tsv"),
    "long.csv": (b"text\n" + b"word " * 50_000, "word " * 50_000, "read 1 row, 50,000 words, column text of long.csv"),
    "pairs.jsonl": (b'{"prompt": "one", "completion": "two"}', "one\ntwo", "read 1 row, 2 words, column prompt and completion of pairs.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_texts_and_tables_are_read_and_told(name, place):
    contents, text, said = KINDS[name]
    (place / name).write_bytes(contents)
    assert read(name) == (text, said)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_arrow(kind, place):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        parquet.write_table(table, "rows.parquet")
    else:
        with pa.ipc.new_stream("rows.arrow", table.schema) as stream:
            stream.write_table(table)
    assert read(f"rows.{kind}", "body")[1] == f"read 3 rows, 12 words, column body of rows.{kind}"


def test_chats_go_through_the_template_of_the_tokenizer(place):
    (place / "chat.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT}))
    other = [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "well met"}]
    (place / "old.jsonl").write_text(json.dumps({"conversations": other}))
    one = "<user>hello there<assistant>well met"
    assert read("chat.jsonl", tokenizer=Template()) == (
        f"{one}\n{one}",
        "read 2 chats, 6 words, column messages of chat.jsonl",
    )
    assert read("old.jsonl", tokenizer=Template())[0] == one
    assert read("chat.jsonl")[0] == "hello there\nwell met\nhello there\nwell met"  # without one, what is said
    assert table_items(place / "old.jsonl")[0] == [CHAT]


def test_a_folder_is_read_without_what_tells_of_it(place):
    data = place / "data"
    (data / "train" / ".cache").mkdir(parents=True)
    for name in (
        "README.md",
        "LICENSE",
        "dataset_infos.json",
        "config.json",
        "train/readme.txt",
        "train/.cache/x.txt",
        ".hidden.txt",
    ):
        (data / name).write_text("{} not this")
    (data / "train" / "a.txt").write_text("one two")
    (data / "b.jsonl").write_text('{"text": "three"}')
    (data / "none.txt").write_text("")
    (data / "logo.png").write_bytes(b"x")
    assert read("data") == ("three\none two", "read 2 files, 1 line, 1 row, 3 words, column text of data")
    assert find_data("data").kind == "texts"


def test_pictures_lie_in_folders_of_their_classes(place):
    for name in ("cats/1.png", "dogs/2.JPG"):
        (place / "pictures" / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "pictures" / name)
    (place / "pictures" / "README.md").write_text("about")
    found = find_data("pictures")
    assert found.kind == "pictures" and [p.name for p in found.files] == ["1.png", "2.JPG"]
    assert find_data("pictures/cats/1.png").kind == "pictures"
    with pytest.raises(SourceError, match="holds pictures, where a text is needed"):
        read_text(place / "pictures")


REFUSED = {  # name -> (contents, field, what is said)
    "none.txt": (b"", None, "none.txt is empty"),
    "blank.txt": (b" \n \n", None, "blank.txt: the text is empty"),
    "data.bin": (b"\x00\x01\x02", None, "data.bin is no text, and no data of a kind that is read"),
    "latin.txt": ("é è".encode("latin-1"), None, "latin.txt is no UTF-8 text: .*; save it as UTF-8"),
    "a.docx": (zipped("word/document.xml"), None, "a.docx is an archive, not data"),
    "a.gguf": (b"GGUF", None, "a.gguf is a GGUF file of llama.cpp, not data"),
    "a.npz": (zipped("a.npy"), None, "is a file of numpy arrays, not data"),
    "lfs.txt": (b"version https://git-lfs.github.com/spec/v1\n", None, "is a Git LFS pointer"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\n", None, "is a Git LFS pointer"),
    "cut.txt.gz": (gzip.compress(b"words " * 99)[:-12], None, "cut.txt.gz cannot be read"),
    "a.jsonl": (b"no rows", None, "a.jsonl, line 1: no JSON"),
    "b.jsonl": (b'{"a": 1, "b": "x y", "c": "z w"}', None, "row 1 has no field 'text or content'; it has a, b, c; choose one with"),
    "c.jsonl": (b'{"text": "x"}', "body", "row 1 has no field 'body'; it has text"),
    "late.jsonl": (b'{"text": "x"}\n{"words": 3}', None, "row 2 has no field"),
    "words.txt": (b"x", "body", "words.txt is no table, so it has no column 'body'"),
    "a.json": (b"words", None, "is no JSON of rows: it begins with 'words'"),
    "a.csv": (b"text\n", None, "a.csv holds no text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_is_named(name, place):
    contents, field, says = REFUSED[name]
    (place / name).write_bytes(contents)
    with pytest.raises((SourceError, CalibrationError), match=says):
        words_of(find_data(name, field), None, field)


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "model.gguf", "rpq_report.json", "sub/model.onnx"],
)
def test_a_model_is_no_data(file, place):
    (place / "model" / file).parent.mkdir(parents=True)
    (place / "model" / file).write_bytes(b"x")
    (place / "model" / "notes.txt").write_text("words")
    with pytest.raises(SourceError, match=f"model is a model's folder, not data: it holds {file}"):
        find_data("model")


def test_weights_are_no_data_and_tensors_are(place):
    save_file({"x": torch.zeros(2, 3)}, "x.safetensors")
    assert find_data("x.safetensors").kind == "tensors"
    (place / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"x\.safetensors is the weights of a model, not data"):
        find_data("x.safetensors")


@pytest.mark.parametrize(("text", "path"), [
    ("text.txt", True), ("data/rows.jsonl", True), ("a.parquet", True), ("hub:user/set", True), ("here", True), ("x.safetensors", True),
    ("A sentence, and more.", False), ("See text.txt", False), ("one\ntwo.txt", False), ("word", False), ("", False),
])  # fmt: skip
def test_a_text_that_is_a_path(text, path, place):
    (place / "here").mkdir()
    assert is_path(text) is path


@pytest.mark.parametrize(("given", "name"), [
    ("hub:user/set", "user/set"), ("hub:set", "set"), ("hub:user/set:small:train", "user/set:small:train"), ("user/set", "user/set"),
    ("user/set:small", "user/set:small"), ("https://huggingface.co/datasets/user/set", "user/set"),
    ("https:/huggingface.co/datasets/user/set/viewer/default", "user/set"),
])  # fmt: skip
def test_data_sets_of_the_hub_are_told_by_their_names(given, name, place):
    if find_spec("datasets") is None:
        with pytest.raises(SourceError, match="needs the package datasets: pip install datasets"):
            find_data(given)
        return
    assert (find_data(given).kind, find_data(given).name) == ("hub", name)


def test_parts_of_a_data_set():
    assert parts_of("user/set") == ("user/set", None, None)
    assert parts_of("user/set:small") == ("user/set", "small", None)
    assert parts_of("user/set:test") == ("user/set", None, "test")
    assert parts_of("user/set:small:train[:10%]") == ("user/set", "small", "train[:10%]")


@pytest.mark.parametrize("given", ["here/set", "words.txt", "hub:", "hub:a b", "hub:a:b:c:d"])
def test_what_is_no_data_set(given, place):
    (place / "here").mkdir()
    with pytest.raises(SourceError, match=r"does not exist|is no data set; write it as hub:user/name"):
        find_data(given)


def test_a_data_set_is_read_by_datasets(place, monkeypatch):
    """Of a folder, as the hub has them; where it cannot be fetched, one line says so."""
    pytest.importorskip("datasets")
    (place / "set").mkdir()
    (place / "set" / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(5)))
    (place / "set" / "test.jsonl").write_text(json.dumps({"text": "kept aside"}))
    assert hub_items("./set") == ([f"row {i}" for i in range(5)], "text")
    assert hub_items("./set:test") == (["kept aside"], "text")
    (place / "set" / "train.jsonl").write_text("no rows")
    with pytest.raises(SourceError, match=r"hub:\./set could not be read: "):
        hub_items("./set")


def test_a_hub_that_is_not_reached_is_told_at_once(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="user/set is no local folder, and HF_HUB_OFFLINE forbids to ask the hub"):
        hub_items("user/set")


PAIRS = [("a b", "c", 0.5), ("d", "e, f", 1.0)]


@pytest.mark.parametrize(("name", "text"), [
    ("plain.csv", 'a b,c,0.5\nd,"e, f",1\n'), ("heading.csv", 'one,two,how\na b,c,0.5\nd,"e, f",1\n'), ("wide.tsv", "a b\tc\t0.5\nd\te, f\t1\n"),
    ("named.csv", 'split,score,sentence2,sentence1\nx,0.5,c,a b\nx,1,"e, f",d\n'),
    ("rows.jsonl", '{"label": 0.5, "sentence1": "a b", "sentence2": "c"}\n{"label": 1, "sentence1": "d", "sentence2": "e, f"}'),
])  # fmt: skip
def test_scored_pairs(name, text, place):
    (place / name).write_text(text)
    assert scored_pairs(place / name) == PAIRS


def test_pairs_that_are_none(place):
    (place / "a.csv").write_text("a,b,0.5\nc,d\n")
    (place / "b.jsonl").write_text('{"text": "x"}')
    for name, says in (("a.csv", "a.csv, line 2: not sentence, sentence, score"), ("b.jsonl", "b.jsonl, line 1: not")):
        with pytest.raises(SourceError, match=says):
            scored_pairs(place / name)
