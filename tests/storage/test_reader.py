"""Tensors of safetensors files, read into memory or mapped."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rpq_convert as rpq
from rpq_convert.checkpoint.opening import open_checkpoint
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.reader import SafetensorsSource, mapped, read_header

SIDE, LAYERS = 1024, 16


def build():
    return torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "model.safetensors"
    torch.manual_seed(0)
    save_file(build().state_dict(), path)
    path.chmod(0o400)
    return path


def anonymous():
    """Bytes of this process that the system cannot drop."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc")
def test_a_model_that_runs_stays_in_the_pages_of_its_file(file):
    """All of it is read, and a small part of it is memory that the system could not drop."""
    opened = open_checkpoint(file, SourceOptions(factory=build))
    before = anonymous()
    model = opened.filled()
    total = sum(float(p.detach().sum()) for p in model.parameters())
    grown, size = anonymous() - before, SIDE * SIDE * 4 * LAYERS
    assert grown < size / 8
    assert total == pytest.approx(sum(float(opened.source[k].sum()) for k in opened.source), rel=1e-6)


def test_writing_to_a_mapped_tensor_leaves_the_file(file):
    source = SafetensorsSource([read_header(file)])
    with mapped(source):
        tensor = source["0.weight"]
    kept = tensor.clone()
    tensor.zero_()
    assert torch.equal(source["0.weight"], kept) and not tensor.any()


def test_mapped_tensors_are_those_that_are_read(tmp_path):
    """Of every size of number, empty ones, and ones that begin between two numbers."""
    tensors = {
        "a": torch.arange(5, dtype=torch.uint8), "b": torch.arange(6.0).reshape(2, 3), "c": torch.empty(0, 4),
        "d": torch.tensor(2.5, dtype=torch.float64), "e": torch.tensor([True, False]), "f": torch.ones(3, dtype=torch.bfloat16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "m.safetensors")
    raw = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    shifted = (length + 3).to_bytes(8, "little") + raw[8 : 8 + length] + b"   " + raw[8 + length :]
    (tmp_path / "odd.safetensors").write_bytes(shifted)
    for name in ("m", "odd"):
        source = SafetensorsSource([read_header(tmp_path / f"{name}.safetensors")])
        with mapped(source):
            for key, value in tensors.items():
                assert torch.equal(source[key], value) and source[key].dtype == value.dtype


def test_calibrated_bits_are_those_of_a_model_in_memory(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    save_file(model.state_dict(), tmp_path / "m.safetensors")

    def made():
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))

    data = [torch.randn(32, 64)]
    how = {"bits": 4, "grow": True, "calibration": data, "progress": False}
    rpq.convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", factory=made, **how)
    rpq.convert(model, **how)
    rpq.save(model, tmp_path / "memory")
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "memory"))
    assert first == second
