"""Folders written at an address: there they are whole, or they are not there."""

import pytest
import torch
from safetensors.torch import save_file
from stores import Unsure, fails, filled, fresh, heal, held
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import FolderError, SourceError
from rpq_convert.storage import addresses
from rpq_convert.storage.delivery import SCRATCH, UPLOAD


def build():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("source") / "w.safetensors"
    save_file(build().state_dict(), file)
    return file


@pytest.fixture
def convert(source, tmp_path, monkeypatch):
    monkeypatch.setenv(SCRATCH, str(tmp_path))
    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    fresh()
    given = {"bits": 8, "fit": "random", "factory": build, "progress": False}
    return lambda out, **how: rpq.convert_checkpoint(source, out, **given | how)


def sent():
    return [name for kind, name, _ in Unsure.log if kind == "put" and name != UPLOAD]


def test_the_manifest_is_sent_last_and_nothing_stays_here(convert, tmp_path):
    convert("unsure://new/my 50% folder/")
    assert sent()[0] == "model.safetensors" and sent()[-2:] == ["config.json", "rpq_manifest.json"]
    convert(tmp_path / "my 50% folder")
    local = {p.name: p.read_bytes() for p in (tmp_path / "my 50% folder").iterdir()}
    found = held("new/my 50% folder")
    assert found.keys() == local.keys() and found["model.safetensors"] == local["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["my 50% folder"]
    rpq.load("unsure://new/my 50% folder", factory=build)
    rpq.restore_checkpoint("unsure://new/my 50% folder", "unsure://new/dense")
    assert "model.safetensors" in held("new/dense")


def test_an_interrupted_upload_is_not_whole_and_goes_on(convert, tmp_path):
    fails("put .*config.json", OSError("connection reset"))
    with pytest.raises(
        FolderError,
        match=r"torn was not reached: connection reset; .* is whole, and the same command, or rpq push, sends",
    ):
        convert("unsure://torn")
    assert "model.safetensors" in held("torn") and "rpq_manifest.json" not in held("torn")
    with pytest.raises(SourceError):
        rpq.load("unsure://torn", factory=build)
    heal()
    with pytest.raises(FolderError, match="unfinished run with other settings"):
        convert("unsure://torn", bits=4)
    assert convert("unsure://torn").rows
    assert sent() == ["config.json", "rpq_manifest.json"]  # what was there is not sent again, nor fitted
    assert rpq.verify("unsure://torn") and UPLOAD not in held("torn") and not list(tmp_path.iterdir())


def test_what_the_store_has_lost_or_changed_is_sent_again(convert):
    fails("put .*config.json", OSError("connection reset"))
    with pytest.raises(FolderError):
        convert("unsure://lost")
    heal()
    from fsspec import filesystem

    filesystem("unsure").pipe_file("/lost/model.safetensors", b"other")
    filesystem("unsure").rm("/lost/README.md")
    heal()
    convert("unsure://lost")
    assert sent() == ["model.safetensors", "README.md", "config.json", "rpq_manifest.json"] and rpq.verify(
        "unsure://lost"
    )


def test_what_is_there_is_not_written_over_unasked(convert, source):
    convert("unsure://there")
    before = held("there")
    with pytest.raises(FolderError, match="unsure://there already exists; choose another place or pass overwrite=True"):
        convert("unsure://there", bits=4)
    filled(source.parent, "foreign")
    for place in ("unsure://foreign", "unsure://foreign/w.safetensors"):
        with pytest.raises(FolderError, match=r"holds w.safetensors, which rpq-convert has not written"):
            convert(place)
    with pytest.raises(SourceError):  # it fails before anything is made, and leaves what is there
        rpq.convert_checkpoint(
            source.parent / "none.safetensors", "unsure://there", overwrite=True, factory=build, bits=8
        )
    assert held("there") == before and held("foreign") == {"w.safetensors": source.read_bytes()}


def test_shards_of_an_earlier_folder_go(convert):
    convert("unsure://over", max_shard_size="10KB")
    assert len([n for n in held("over") if n.endswith(".safetensors")]) > 1
    heal()
    convert("unsure://over", overwrite=True)
    assert Unsure.log[[k for k, *_ in Unsure.log].index("remove") + 0][1] == UPLOAD  # the try whether it can be written
    assert [n for n in held("over") if ".safetensors" in n] == ["model.safetensors"] and rpq.verify("unsure://over")


def test_a_store_that_refuses_does_so_before_the_work(convert, tmp_path):
    fails("put", PermissionError("Access Denied"))
    with pytest.raises(FolderError, match="unsure://closed may not be used with these credentials: Access Denied"):
        convert("unsure://closed")
    assert not list(tmp_path.iterdir()) and not held("closed")


def test_of_two_runs_one_ends_with_an_error(convert, source, tmp_path, monkeypatch):
    taken = []

    def other(job, encoded):
        if not taken:
            taken.append(1)

    original = Unsure.put_file

    def put(self, lpath, rpath, **kwargs):
        original(self, lpath, rpath, **kwargs)
        if rpath.endswith("/config.json"):  # another machine begins to send
            super(Unsure, self).pipe_file(f"/two/{UPLOAD}", b'{"run": "other"}')

    monkeypatch.setattr(Unsure, "put_file", put)
    with pytest.raises(FolderError, match="another run is sending a folder to unsure://two"):
        convert("unsure://two")
    assert "rpq_manifest.json" not in held("two")


def test_a_model_in_memory_and_a_finished_folder(convert, tmp_path):
    torch.manual_seed(0)
    model = build()
    rpq.convert(model, bits=8, progress=False)
    rpq.save(model, "unsure://saved")
    assert rpq.verify("unsure://saved")
    convert(tmp_path / "local")
    assert rpq.push(tmp_path / "local", "unsure://pushed") == "unsure://pushed"
    assert held("pushed") == {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()}
    with pytest.raises(FolderError, match="already exists"):
        rpq.push(tmp_path / "local", "unsure://pushed")
    assert [p.name for p in tmp_path.iterdir()] == ["local"]
