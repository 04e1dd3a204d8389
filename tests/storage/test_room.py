"""What an output may replace."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq


def build():
    return nn.Linear(32, 16)


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("out", ["model", ".", "model.partial/..", "link", "made"])
def test_a_source_is_not_overwritten(out, tmp_path):
    """By Python as by the command: the original would be gone."""
    home = tmp_path / "home"
    source = home / ("made.partial" if out == "made" else "model")
    source.mkdir(parents=True)
    (home / "model.partial").mkdir()
    (home / "link").symlink_to(source)
    save_file({k: t.contiguous() for k, t in build().state_dict().items()}, source / "model.safetensors")
    before = tree(tmp_path)
    with pytest.raises(rpq.FolderError, match="is or holds the source"):
        rpq.convert_checkpoint(source, home / out, factory=build, bits=8, overwrite=True)
    assert tree(tmp_path) == before


def test_a_converted_folder_is_not_restored_over_itself(tmp_path):
    model = build()
    rpq.convert(model, bits=8, grow=True)
    rpq.save(model, tmp_path / "small")
    before = tree(tmp_path)
    with pytest.raises(rpq.FolderError, match="small is or holds the source"):
        rpq.restore_checkpoint(tmp_path / "small", tmp_path / "small", overwrite=True)
    assert tree(tmp_path) == before
    rpq.restore_checkpoint(tmp_path / "small", tmp_path / "dense")
    assert torch.is_tensor(model.weight) and (tmp_path / "dense" / "model.safetensors").is_file()
