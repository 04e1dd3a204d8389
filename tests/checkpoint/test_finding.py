"""Models at addresses, read from a store that notes what is asked of it."""

import http.server
import json
import re
import threading
from functools import partial
from importlib.util import find_spec
from shutil import copytree

import fsspec
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from stores import Unsure, fails, filled, fresh, heal, held
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import SourceError
from rpq_convert.storage import addresses


def build():
    return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "my 50% model"
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    tf.BertModel(config).save_pretrained(folder, max_shard_size="200KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit('never run')")
    return folder


@pytest.fixture(scope="module")
def small(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "small"
    rpq.convert_checkpoint(dense, out, bits=8, progress=False)
    return out


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    fresh()


def asked(kind):
    return [(name, size) for what, name, size in Unsure.log if what == kind]


def test_a_plan_reads_headers_alone(dense):
    address = filled(dense, "plan/my 50% model")
    assert rpq.plan(f"{address}/", bits=8).file_bytes == rpq.plan(dense, bits=8).file_bytes
    assert [n for n, _ in asked("get")] == ["config.json", "model.safetensors.index.json"]


def test_a_conversion_is_that_of_the_folder(dense, small, tmp_path):
    address = filled(dense, "convert/my 50% model")
    rpq.convert_checkpoint(address, tmp_path / "out", bits=8, progress=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    assert not [n for n, _ in asked("get") if n.endswith((".safetensors", ".py"))]  # weights by ranges of bytes
    assert (tmp_path / "out/tokenizer.json").is_file() and f"rpq convert '{address}'" in (
        tmp_path / "out/README.md"
    ).read_text()
    made = json.loads((tmp_path / "out/rpq_manifest.json").read_text())["made"]["source"]
    assert made["repository"] == address and all(f["mark"] and "sample" not in f for f in made["files"])
    read = len(asked("read"))
    assert rpq.verify(tmp_path / "out")
    from rpq_convert.checkpoint.against import compare_with_source
    from rpq_convert.storage.options import SourceOptions

    assert compare_with_source(tmp_path / "out", address, SourceOptions()).refitted == 3
    assert len(asked("read")) > read and not [n for n, _ in asked("get") if n.endswith(".safetensors")]


def test_a_converted_folder_is_loaded_checked_and_restored(small, tmp_path):
    address = filled(small, "small")
    expected = rpq.load(small).state_dict()
    found = rpq.load(address).state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in found)
    assert not [n for n, _ in asked("get") if n.endswith(".safetensors")]
    assert rpq.audit(address).rows == rpq.audit(small).rows and rpq.verify(address) == rpq.verify(small)
    rpq.restore_checkpoint(address, tmp_path / "dense")
    rpq.restore_checkpoint(small, tmp_path / "other")
    assert (tmp_path / "dense/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_what_is_no_whole_converted_folder_is_refused(small, dense, tmp_path):
    torn = copytree(small, tmp_path / "torn")
    (torn / "rpq_manifest.json").unlink()
    address = filled(torn, "torn")
    for refuse in (rpq.load, rpq.audit, rpq.verify, lambda a: rpq.restore_checkpoint(a, tmp_path / "out")):
        with pytest.raises(SourceError, match="its upload has not ended"):
            refuse(address)
    with pytest.raises(
        SourceError, match=r"unsure://dense is not an RPQ checkpoint.* convert it first: rpq-convert unsure://dense"
    ):
        rpq.load(filled(dense, "dense"))
    with pytest.raises(SourceError, match="quantized already"):
        rpq.plan(filled(small, "again"), bits=8)
    flipped = bytearray((small / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    fsspec.filesystem("unsure").pipe_file("/again/model.safetensors", bytes(flipped))
    with pytest.raises(SourceError, match=r"unsure://again/model.safetensors: .* is damaged"):
        rpq.load("unsure://again")


def test_a_single_file_with_a_factory(tmp_path):
    torch.manual_seed(0)
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    address = filled(tmp_path, "files") + "/w.safetensors"
    for source, out in ((address, "a"), (tmp_path / "w.safetensors", "b")):
        rpq.convert_checkpoint(source, tmp_path / out, bits=8, factory=build, progress=False)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    with pytest.raises(SourceError, match=r"has no config.json: give factory="):
        rpq.convert_checkpoint(address, tmp_path / "c", bits=8)
    torch.save(build().state_dict(), tmp_path / "p.bin")
    address = filled(tmp_path, "pickled") + "/p.bin"
    with pytest.raises(SourceError, match="allow_pickle=True"):
        rpq.plan(address, bits=8, factory=build)
    assert rpq.plan(address, bits=8, factory=build, allow_pickle=True).jobs


def test_nothing_missing_files_and_no_rights_are_one_line(dense, tmp_path):
    with pytest.raises(SourceError, match=r"^unsure://nowhere/x does not exist: nothing is there"):
        rpq.plan("unsure://nowhere/x", bits=8)
    torn = copytree(dense, tmp_path / "torn")
    gone = sorted(torn.glob("*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises(SourceError, match=rf"unsure://gap/{gone.name} is missing, the index names it"):
        rpq.plan(filled(torn, "gap"), bits=8)
    fails("info", PermissionError("Access Denied"))
    with pytest.raises(SourceError, match="unsure://gap may not be used with these credentials: Access Denied"):
        rpq.plan("unsure://gap", bits=8)
    assert not (tmp_path / "out").exists()


def test_a_store_that_fails_is_asked_again(dense, tmp_path):
    address = filled(dense, "failing")
    fails("read .*safetensors", OSError("connection reset"), times=3)
    assert rpq.plan(address, bits=8).jobs
    heal()
    fails("read .*safetensors", OSError("connection reset"))
    with pytest.raises(
        SourceError, match=r"unsure://failing/model-0000\d-of-\d+.safetensors was not reached: connection reset"
    ):
        rpq.convert_checkpoint(address, tmp_path / "out", bits=8, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    torch.manual_seed(0)
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    address = filled(tmp_path, "changing") + "/w.safetensors"
    before = held("changing")["w.safetensors"]

    def change(values):
        def told(job, encoded):
            fsspec.filesystem("unsure").pipe_file("/changing/w.safetensors", values)

        return told

    how = {"bits": 8, "factory": build, "executor": "serial"}
    other = before[:-4] + b"\0\0\0\0"
    with pytest.raises(SourceError, match=r"the source has changed while it was converted: .* has other values"):
        rpq.convert_checkpoint(address, tmp_path / "out", progress=change(other), **how)
    with pytest.raises(OSError, match="holds an unfinished run of a source that has changed"):
        rpq.convert_checkpoint(address, tmp_path / "out", progress=False, **how)
    fsspec.filesystem("unsure").pipe_file("/changing/w.safetensors", before)
    rpq.convert_checkpoint(
        address, tmp_path / "same", progress=change(before), **how
    )  # written anew, with the same bytes


@pytest.mark.skipif(find_spec("aiohttp") is None, reason="aiohttp is not installed")
def test_a_web_server_that_knows_no_ranges(dense, tmp_path):
    torch.manual_seed(0)
    save_file(build().state_dict(), tmp_path / "a b.safetensors")
    copytree(dense, tmp_path / "my model")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        planned = rpq.plan(f"{url}/a%20b.safetensors", bits=8, factory=build)
        assert planned.file_bytes == rpq.plan(tmp_path / "a b.safetensors", bits=8, factory=build).file_bytes
        assert rpq.plan(f"{url}/my%20model", bits=8).file_bytes == rpq.plan(dense, bits=8).file_bytes
        with pytest.raises(SourceError, match=re.escape(f"{url}/none.safetensors does not exist")):
            rpq.plan(f"{url}/none.safetensors", bits=8, factory=build)
    finally:
        server.shutdown()
        server.server_close()


def test_ranges_are_read_as_they_lie(tmp_path):
    from rpq_convert.storage.remote import find
    from rpq_convert.storage.remote_file import BLOCK

    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(n) for i, n in enumerate((3, BLOCK // 4 - 2, 5, BLOCK // 2, 1, 0))}
    save_file(tensors, tmp_path / "model.safetensors")
    source = find(addresses.address_of(filled(tmp_path, "ranges"))).tensors()
    heal()
    assert all(torch.equal(source[k], v) for k, v in load_file(tmp_path / "model.safetensors").items())
    assert len(asked("read")) <= 4  # small tensors share a block


def test_a_model_that_runs_is_fetched(tmp_path):
    torch.manual_seed(0)
    save_file(build().state_dict(), tmp_path / "w.safetensors")
    address = filled(tmp_path, "run") + "/w.safetensors"
    how = {"bits": 8, "factory": build, "progress": False, "calibration": [torch.randn(32, 256)]}
    rpq.convert_checkpoint(address, tmp_path / "a", **how)
    rpq.convert_checkpoint(tmp_path / "w.safetensors", tmp_path / "b", **how)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert [n for n, _ in asked("get")] == ["w.safetensors"]
