"""Weight files written tensor by tensor are those that the safetensors library writes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rpq_convert.core.safetensors import SAFETENSORS_NAMES
from rpq_convert.errors import FolderError
from rpq_convert.storage.assembly import digest, write_tensors_to
from rpq_convert.storage.records import sha256
from rpq_convert.storage.writer import is_finite

TENSORS = {
    **{
        f"of.{str(dtype).removeprefix('torch.')}": torch.arange(1, 7).reshape(2, 3).to(dtype)
        for dtype in SAFETENSORS_NAMES
    },
    "empty": torch.empty(0, 3),
    "one": torch.tensor(3.0),
    "ünïcode": torch.ones(2),
}


def test_bytes_are_those_of_the_library(tmp_path):
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    asked = []

    def tensor(key):
        asked.append(key)
        return TENSORS[key]

    entries = {k: (t.dtype, tuple(t.shape)) for k, t in TENSORS.items()}
    found = write_tensors_to(tmp_path / "ours.safetensors", entries, tensor)
    assert found.sha256 == sha256(tmp_path / "ours.safetensors")
    assert found.tensors == {k: digest(t) for k, t in TENSORS.items()}
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert sorted(asked) == sorted(TENSORS)
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["one"], TENSORS["one"])


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "ours.safetensors"
    (tmp_path / "ours.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(FolderError, match=r"cannot write .*ours\.safetensors: No space left"):
        write_tensors_to(path, {"a": (torch.float32, (9000,))}, lambda key: torch.zeros(9000))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16, torch.float8_e4m3fn])
def test_is_finite_looks_at_all_parts(dtype, monkeypatch):
    monkeypatch.setattr("rpq_convert.storage.writer.FINITE", 4)
    numbers = torch.zeros(3, 5).to(dtype)
    assert is_finite(numbers) and is_finite(numbers.T) and is_finite(torch.empty(0, dtype=dtype))
    numbers[2, 4] = float("nan")
    assert not is_finite(numbers) and not is_finite(numbers.T)
