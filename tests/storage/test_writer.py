"""Output folders: what a killed run left is taken over where it is right, made again where it is damaged, and never mixed."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.checkpoint.metadata import add_evaluation
from rpq_convert.core.results import Evaluation
from rpq_convert.errors import FolderError, SourceError, TimeLimitReached, VerifyError
from rpq_convert.storage import manifest, swap, writer
from rpq_convert.storage.room import most_bytes

VARYING = ("rpq_report.json", "README.md", "rpq_manifest.json")  # hold times


def net():
    return nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))


def convert(source, out, **more):
    done = []
    how = {"factory": net, "bits": 4, "grow": True, "executor": "serial", "max_shard_size": "3KB"}
    rpq.convert_checkpoint(source, out, **how | {"progress": lambda job, e: done.append(e is not None)} | more)
    return done


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in VARYING}


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("source") / "dense.safetensors"
    save_file(net().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def whole(source):
    convert(source, source.with_name("whole"))
    return source.with_name("whole")


def test_tensors_leave_the_pieces_file_by_file(own, whole, tmp_path, monkeypatch):
    plan = rpq.Plan.from_dict(json.loads((whole / "rpq_plan.json").read_text()))
    assert plan.file_bytes < most_bytes(plan) < plan.file_bytes + sum(sum(job.nbytes.values()) for job in plan.jobs)
    interrupted((manifest, "sha256"), monkeypatch, own, tmp_path / "out")
    pieces = list((tmp_path / "out.partial" / "pieces").iterdir())
    assert len(pieces) == 3 and not any(load_file(piece) for piece in pieces)
    monkeypatch.undo()
    assert not any(convert(own, tmp_path / "out")) and content(tmp_path / "out") == content(whole)


@pytest.fixture
def own(source, tmp_path):
    """A copy of the source."""
    return shutil.copy2(source, tmp_path / source.name)


@pytest.fixture
def unfinished(own, tmp_path):
    """A run that was stopped after its first weight."""

    def first(job, encoded):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(own, tmp_path / "out", progress=first)
    return tmp_path / "out.partial"


def interrupted(place, monkeypatch, *call, **more):
    """Convert, and stop where a function is called."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*place, stop)
        convert(*call, **more)


def test_a_copied_or_touched_source_goes_on(own, unfinished, whole, tmp_path):
    os.utime(own, (1, 1))
    other = tmp_path / "other"
    other.mkdir()
    moved = shutil.move(own, other / own.name)
    assert convert(moved, tmp_path / "out").count(False) == 1
    assert content(tmp_path / "out") == content(whole)


def test_a_changed_source_is_refused_before_any_work(own, unfinished, tmp_path, source):
    tensors, status = load_file(own), own.stat()
    save_file({k: v + 1 for k, v in tensors.items()}, own)
    os.utime(own, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        FolderError, match=r"of a source that has changed since: dense\.safetensors has another content"
    ):
        convert(own, tmp_path / "out", progress=stop)
    done = convert(own, tmp_path / "out", overwrite=True)
    assert all(done) and len(done) == 3
    convert(own, tmp_path / "at once")
    assert content(tmp_path / "out") == content(tmp_path / "at once")


def edge_changed(own):
    """Change a number that no sample of the first weight looks at."""
    tensors = load_file(own)
    tensors["0.weight"][0, 0] += 1
    save_file(tensors, own)


def test_one_changed_number_is_found_where_the_time_has_changed_or_all_is_compared(own, unfinished, tmp_path):
    before, status = own.read_bytes(), own.stat()
    edge_changed(own)
    with pytest.raises(FolderError, match=r"has changed since: 0\.weight has other values"):
        convert(own, tmp_path / "out", progress=stop)
    with pytest.raises(FolderError, match=r"has changed since: 0\.weight"):  # nor the second time
        convert(own, tmp_path / "out", progress=stop)
    os.utime(own, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(FolderError, match=r"has changed since: 0\.weight"):
        convert(own, tmp_path / "out", progress=stop, check_source=True)
    own.write_bytes(before)
    convert(own, tmp_path / "out", check_source=True)
    made = json.loads((tmp_path / "out" / "rpq_manifest.json").read_text())["made"]
    assert made["source"]["files"][0]["sha256"] == manifest.sha256(own)


@pytest.mark.parametrize("change", ["all", "one number", "gone"])
def test_a_source_that_changes_meanwhile_is_noticed(change, own, tmp_path):
    def meddle(job, encoded):
        if job.name == "3.weight":
            if change == "one number":
                edge_changed(own)
            else:
                save_file({k: v + 1 for k, v in load_file(own).items()}, own)

    with (
        pytest.raises(SourceError, match="source has changed while it was converted")
        if change != "gone"
        else pytest.raises(OSError)
    ):
        convert(
            own, tmp_path / "out", progress=meddle if change != "gone" else lambda job, e: own.unlink(missing_ok=True)
        )
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_an_unfinished_run_are_made_again(own, whole, tmp_path, monkeypatch, caplog):
    interrupted((manifest, "sha256"), monkeypatch, own, tmp_path / "out")
    work = tmp_path / "out.partial"
    shard = sorted(work.glob("model-*"))[1]
    piece = sorted((work / "pieces").iterdir())[0]
    for damaged in (shard, piece):
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
    for stray in (
        ".tmpAbC123",
        "model-00001-of-00009.safetensors",
        "tokenizer.json.partial",
        "pieces/x.safetensors.partial",
    ):
        (work / stray).write_text("of a killed run")
    (work / "deep" / "er").mkdir(parents=True)
    done = convert(own, tmp_path / "out")
    assert done.count(True) == 2 and done.count(False) == 1  # one whose piece, one whose weight file is damaged
    assert f"{shard} is damaged" in caplog.messages[0] and any(f"{piece} of " in said for said in caplog.messages[1:])
    assert content(tmp_path / "out") == content(whole) and rpq.verify(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["dense.safetensors", "out"]


def test_a_piece_that_is_damaged_before_the_assembly_is_no_part_of_it(own, whole, tmp_path):
    def damage(job, encoded):
        for piece in (tmp_path / "out.partial" / "pieces").glob("*.safetensors"):
            data = bytearray(piece.read_bytes())
            data[-1] ^= 1
            piece.write_bytes(data)

    with pytest.raises(FolderError, match=r"is damaged: .*; run the same command again, it is fitted again"):
        convert(own, tmp_path / "out", progress=damage)
    convert(own, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.parametrize(
    "place, overwrite",
    [
        ((swap, "put_in_place"), False),
        ((writer, "write_manifest"), False),
        ((swap, "exchange"), True),
        ((writer, "write_manifest"), True),
    ],
    ids=lambda value: str(value[-1] if isinstance(value, tuple) else value),
)
def test_a_run_that_is_killed_at_its_end_has_nothing_left_to_fit(place, overwrite, own, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if overwrite:
        convert(own, out, bits=2)
        before = content(out)
    interrupted(place, monkeypatch, own, out, overwrite=overwrite)
    assert content(out) == before if overwrite else not out.exists()
    assert True not in convert(own, out, overwrite=overwrite)
    assert content(out) == content(whole) and rpq.verify(out)
    assert sorted(os.listdir(tmp_path)) == ["dense.safetensors", "out"]


def test_restore_goes_on(whole, tmp_path, monkeypatch):
    rpq.restore_checkpoint(whole, tmp_path / "at once", max_shard_size="10KB")
    names = []

    def told(name, done, total):
        names.append(name)
        if len(names) == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        rpq.restore_checkpoint(whole, out, max_shard_size="10KB", progress=told)
    assert list((tmp_path / "out.partial").glob("model-*")) and not out.exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(swap, "put_in_place", stop)
        again = []
        rpq.restore_checkpoint(whole, out, max_shard_size="10KB", progress=lambda name, *_: again.append(name))
    assert again and len(again) < 6
    rpq.restore_checkpoint(whole, out, max_shard_size="10KB", progress=stop)
    assert content(out) == content(tmp_path / "at once")
    assert sorted(os.listdir(tmp_path)) == ["at once", "out"]


def test_a_killed_save_is_not_mixed_with_a_later_one(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = net()
    rpq.convert(model, bits=4, grow=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "sha256", stop)
        rpq.save(model, tmp_path / "out")
    with torch.no_grad():
        model[1].bias += 1
    rpq.save(model, tmp_path / "out")
    rpq.save(model, tmp_path / "at once")
    assert content(tmp_path / "out") == content(tmp_path / "at once")


def test_a_time_limit_ends_after_a_weight_and_the_same_call_goes_on(own, whole, tmp_path):
    for done in (1, 2):
        with pytest.raises(
            TimeLimitReached, match=f"the time limit of 1e-06 is reached: {done} of 3 weights are done and kept"
        ):
            convert(own, tmp_path / "out", time_limit=1e-06)
    convert(own, tmp_path / "out", time_limit=1e-06)
    assert content(tmp_path / "out") == content(whole)
    for wrong in ("soon", 0, "-3s", "2 hours 5"):
        with pytest.raises(rpq.PlanError, match="is no time; give one such as 90s"):
            convert(own, tmp_path / "other", time_limit=wrong)


def test_a_folder_is_whole_while_a_result_is_written_into_it(whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    found, calls = Evaluation("outputs", {"cosine": 0.5}, 3), []
    plain = manifest.write_file

    def killed_before(number):
        def write(path, text):
            if len(calls) == number:
                raise KeyboardInterrupt
            calls.append(path)
            plain(path, text)

        return write

    for number in range(4):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(manifest, "write_file", killed_before(number))
            add_evaluation(out, "a text", found)
        assert rpq.verify(out)
    add_evaluation(out, "a text", found)
    assert rpq.verify(out) and "earlier" not in (out / "rpq_manifest.json").read_text()
    (out / "README.md").write_text("mine")
    with pytest.raises(VerifyError):
        rpq.verify(out)


def test_the_manifest_says_how_a_folder_was_made(whole, source):
    made = json.loads((whole / "rpq_manifest.json").read_text())["made"]
    assert made["plan"] == json.loads((whole / "config.json").read_text())["quantization_config"]["plan_sha256"]
    assert (
        [f["name"] for f in made["source"]["files"]] == ["dense.safetensors"] and made["version"] and made["processor"]
    )
    assert set(made["source"]["tensors"]) == {"0.weight", "1.weight", "3.weight"} and str(source.parent) not in str(
        made
    )
