"""A source is told by its content: not by its place, its times or its size."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.origin import Origin, difference


def origin(path, **how):
    return Origin.of(open_folder(path, **how).infos.values())


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    save_file({"a": torch.randn(50, 40), "b": torch.randn(3), "empty": torch.empty(0)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_copy_and_a_touched_file_are_the_same_source(file, tmp_path):
    before = origin(file)
    record, seen = before.record(), before.seen()
    (tmp_path / "copy").mkdir()
    shutil.copyfile(file, tmp_path / "copy" / file.name)
    os.utime(file, (1, 1))
    for now in (origin(file), origin(tmp_path / "copy")):
        assert difference(record, now.record()) == "" and now.seen() != seen
    assert str(tmp_path) not in str(record)  # a manifest has no paths


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: {**t, "a": t["a"] + 1e-3}, "model.safetensors has another content"),
        (lambda t: {**t, "b": t["b"] * 2}, "model.safetensors has another content"),
        (lambda t: {**t, "b": t["b"].view(torch.int32)}, "model.safetensors has another content"),
        (lambda t: {**t, "c": t["b"] * 1}, "model.safetensors has another size"),
    ],
    ids=["a little", "a small tensor", "a dtype", "one more"],
)
def test_other_values_are_another_source_whatever_size_and_time(change, says, file):
    record, status = origin(file).record(), file.stat()
    save_file(change(load_file(file)), file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert difference(record, origin(file).record()) == says


def test_one_changed_number_is_told_by_all_bytes(file):
    quick, whole = origin(file).record(), origin(file).record(whole=True)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    data[-8000] ^= 1
    file.write_bytes(data)
    assert difference(quick, origin(file).record(whole=True)) in ("", "model.safetensors has another content")
    assert difference(whole, origin(file).record(whole=True)) == "model.safetensors has another content"


def test_files_that_came_or_went(tmp_path):
    save_file({"b": torch.ones(2)}, tmp_path / "x.safetensors")
    record = origin(tmp_path).record()
    save_file({"c": torch.ones(2)}, tmp_path / "more.safetensors")
    assert difference(record, origin(tmp_path).record()) == "more.safetensors is in one of them only"
    assert difference(origin(tmp_path).record(), record) == "more.safetensors is in one of them only"


def test_pickled_files(tmp_path):
    file = tmp_path / "model.bin"
    tensors = {"a": torch.randn(300, 400), "b": torch.randn(3)}
    torch.save(tensors, file)
    record = origin(file, allow_pickle=True).record()
    shutil.copyfile(file, tmp_path / "copy.bin")
    assert difference(record, origin(file, allow_pickle=True).record()) == ""
    tensors["a"][7, 7] += 1  # its checksum is in the table of contents, at the file's end
    torch.save(tensors, file)
    assert difference(record, origin(file, allow_pickle=True).record()) == "model.bin has another content"
