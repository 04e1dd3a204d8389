"""Loading notices flipped bits and folders that are replaced meanwhile."""

import shutil

import pytest
import torch
import transformers as tf
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.storage import verified


def net():
    return nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32)).eval()


def save(out, seed=0):
    torch.manual_seed(seed)
    model = net()
    rpq.convert(model, bits=4, grow=True)
    rpq.save(model, out)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    save(place / "out")
    save(place / "other", seed=1)
    return place


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "out", tmp_path / "out")


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_a_flipped_bit_anywhere_in_the_weights_is_noticed(folder, monkeypatch):
    weights = folder / "model.safetensors"
    base = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    size = weights.stat().st_size
    for at in range(base, size, (size - base) // 25):
        flip(weights, at)
        with pytest.raises(
            SourceError, match=r"model\.safetensors: \d\.\S+ is damaged, it is not what the manifest says"
        ):
            rpq.load(folder, factory=net)
        with pytest.raises(SourceError, match="is damaged"):
            rpq.restore_checkpoint(folder, folder.with_name("dense"))
        with pytest.raises(VerifyError, match=r"does not match its sha256 in the manifest: \d\.\S+$"):
            rpq.verify(folder)
        rpq.load(folder, factory=net, verify=False)
        flip(weights, at)
    flip(weights, size - 1)
    monkeypatch.setenv("RPQ_VERIFY", "0")
    rpq.load(folder, factory=net)
    with pytest.raises(SourceError):
        rpq.load(folder, factory=net, verify=True)


def test_a_folder_without_hashes_of_tensors_or_without_a_manifest_loads(folder):
    (folder / "rpq_manifest.json").write_text('{"files": {}}')
    rpq.load(folder, factory=net)
    (folder / "rpq_manifest.json").write_text("{")
    with pytest.raises(SourceError, match="is not a manifest"):
        rpq.load(folder, factory=net)
    (folder / "rpq_manifest.json").unlink()
    rpq.load(folder, factory=net)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("way", ["renamed", "written over"])
def test_a_folder_that_is_replaced_while_it_is_read(verify, way, folder, saved):
    """The factory runs in the middle of loading."""
    other = shutil.copytree(saved / "other", folder.with_name("other"))

    def replacing():
        if way == "renamed":
            folder.rename(folder.with_name("before"))
            other.rename(folder)
        else:
            shutil.copy(other / "model.safetensors", folder / "model.safetensors")
        return net()

    with pytest.raises(SourceError, match="was replaced while it was read; read it again"):
        rpq.load(folder, factory=replacing, verify=verify)
    rpq.load(folder, factory=net, verify=False)


def test_transformers_loading_notices_too(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = tf.BertModel(config).eval()
    rpq.convert(model, bits=4, grow=True)
    rpq.save(model, tmp_path / "out")
    tf.BertModel.from_pretrained(tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    flip(weights, weights.stat().st_size - 9)
    with pytest.raises(SourceError, match=r"model\.safetensors is damaged, it is not what the manifest says"):
        tf.BertModel.from_pretrained(tmp_path / "out")
    monkeypatch.setenv("RPQ_VERIFY", "0")
    tf.BertModel.from_pretrained(tmp_path / "out")
    before = verified.signatures([weights])
    weights.touch()
    with pytest.raises(SourceError, match="was replaced while it was read"):
        verified.check_signatures(before)
