"""Headers of weight files: what the safetensors library refuses is refused, in one line, before anything is made of it."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rpq_convert.errors import SourceError
from rpq_convert.storage.reader import read_header

CORPUS = sorted((ROOT / "tests/corpus/headers").glob("*.safetensors"))
TENSORS = {"a": torch.zeros(4), "b": torch.zeros(2, 2, dtype=torch.float16), "c": torch.zeros(0)}


@pytest.mark.parametrize("file", CORPUS, ids=[f.stem for f in CORPUS])
def test_corpus_is_refused_in_one_line(file):
    with pytest.raises(SourceError) as refused:
        read_header(file)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 600


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The header of a small file, its data, and where to write others."""
    path = tmp_path_factory.mktemp("headers") / "m.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return raw[8 : 8 + length], raw[8 + length :], path


def read(path: Path, head: bytes, data: bytes) -> bool:
    """Return whether a file with this header is accepted; the library must accept it too then."""
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
    try:
        found = read_header(path)
    except SourceError as e:
        assert "\n" not in str(e)
        return False
    with safe_open(path, "pt") as f:
        assert set(f.keys()) == set(found)
    return True


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "F16", "I64"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@QUICK
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3)
)
def test_headers_with_other_bytes(parts, edits):
    head, data, path = parts
    for at, new, gone in edits:
        at %= len(head)
        head = head[:at] + new + head[at + gone :]
    read(path, head, data)


@QUICK
@given(
    name=st.sampled_from([*TENSORS, "__metadata__"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", ""]),
    value=JSON,
)
def test_headers_with_other_values(parts, name, field, value):
    head, data, path = parts
    table = json.loads(head)
    if field and name != "__metadata__":
        table[name][field] = value
    else:
        table[name] = value
    read(path, json.dumps(table).encode(), data)


def test_the_library_is_asked(parts):
    """A header that only it refuses is in the corpus; one that it accepts is read."""
    head, data, path = parts
    assert read(path, head, data)
    with pytest.raises(SafetensorError), safe_open(ROOT / "tests/corpus/headers/metadata_null.safetensors", "pt"):
        pass
