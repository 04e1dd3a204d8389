"""Every architecture: streaming equals in-memory bit for bit, reload is exact, almost every parameter is covered."""

import hashlib

import pytest
import torch
from architectures import ARCHITECTURES, outputs

import rpq_convert as rpq
from rpq_convert.integrations import transformers as hub
from rpq_convert.source import open_folder


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, tmp_path):
    torch.manual_seed(0)
    model = ARCHITECTURES[name](64).eval()
    model.save_pretrained(tmp_path / "src")
    dense = type(model).from_pretrained(tmp_path / "src").eval()

    empty = hub.build_empty(hub.load_config(tmp_path / "src"))
    source = hub.ModuleSource(empty, open_folder(tmp_path / "src"))
    source.check()
    for key, tensor in dense.state_dict().items():
        assert torch.equal(source[key].to(tensor.dtype), tensor), key

    report = rpq.convert_checkpoint(tmp_path / "src", tmp_path / "stream", bits=4, grow=True)
    rpq.convert(dense, bits=4, grow=True)
    rpq.save(dense, tmp_path / "memory")
    assert digest(tmp_path / "stream") == digest(tmp_path / "memory")
    size = (tmp_path / "stream" / "model.safetensors").stat().st_size
    assert size == report.predicted_bytes == rpq.plan(tmp_path / "src", bits=4, grow=True).file_bytes

    loaded = rpq.load(tmp_path / "stream")
    assert torch.equal(outputs(loaded), outputs(dense))
    assert report.covered > 0.95
    assert all(r.reason for r in report.rows)
