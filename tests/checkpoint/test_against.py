"""A folder is held against its source: `rpq verify --against`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.checkpoint.against import compare_with_source
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.storage.options import SourceOptions

OPTIONS = SourceOptions(factory=lambda: net())


def net():
    return nn.Sequential(nn.Embedding(64, 32), *(nn.Linear(32, 32) for _ in range(5))).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("against")
    torch.manual_seed(0)
    save_file(net().state_dict(), place / "dense.safetensors")
    how = {"factory": net, "bits": 4, "grow": True}
    rpq.convert_checkpoint(place / "dense.safetensors", place / "out", **how)
    data = list(torch.randint(64, (4, 2, 8)))
    rpq.convert_checkpoint(place / "dense.safetensors", place / "fed", calibration=data, **how)
    return place


def compare(folder, source, **more):
    return compare_with_source(folder, source, OPTIONS, **more)


def test_weights_are_fitted_again_to_the_same_bytes(place):
    some, every = (compare(place / "out", place / "dense.safetensors", every=every) for every in (False, True))
    assert (some.weights, some.total, some.traced, some.refitted, some.dense) == (3, 6, 3, 3, 3)
    assert (every.weights, every.traced, every.refitted, every.dense) == (6, 6, 6, 5)
    assert "3 of 6 weights have the errors of the report" in str(some)


def test_calibrated_weights_have_their_errors_measured_again(place):
    found = compare(place / "fed", place / "dense.safetensors", every=True)
    assert (found.weights, found.traced) == (6, 6) and found.refitted < 6


def test_another_source_is_named(place, tmp_path):
    torch.manual_seed(1)
    save_file(net().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        VerifyError, match=r"0\.weight: .*other\.safetensors holds other values than those that .* was made from"
    ):
        compare(place / "out", tmp_path / "other.safetensors")
    tensors = load_file(place / "dense.safetensors")
    tensors["3.bias"][0] += 1
    save_file(tensors, tmp_path / "dense.safetensors")
    with pytest.raises(VerifyError, match=r"3\.bias: .* which keeps it dense"):
        compare(place / "out", tmp_path / "dense.safetensors", every=True)
    with pytest.raises(SourceError, match="does not exist"):
        compare(place / "out", tmp_path / "nothing.safetensors")


def changed(place, tmp_path, **made):
    folder = shutil.copytree(place / "out", tmp_path / "out")
    file = folder / "rpq_manifest.json"
    manifest = json.loads(file.read_text())
    manifest["made"] |= made
    file.write_text(json.dumps(manifest))
    return folder


def test_other_weights_than_a_conversion_makes_are_found(place, tmp_path):
    folder = changed(place, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["5.weight_rpq.codes"][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerifyError, match=r"5\.weight: (its error against|fitted again)"):
        compare(folder, place / "dense.safetensors")


def test_on_another_processor_nothing_is_fitted_again(place, tmp_path):
    found = compare(changed(place, tmp_path, processor="an abacus"), place / "dense.safetensors")
    assert (found.weights, found.refitted) == (3, 0) and "another kind of processor (an abacus)" in found.note


def test_reproducible_weights_are_fitted_again_on_any_processor(place, tmp_path):
    rpq.convert_checkpoint(
        place / "dense.safetensors", tmp_path / "out", factory=net, bits=4, grow=True, reproducible=True
    )
    assert json.loads((tmp_path / "out" / "rpq_manifest.json").read_text())["made"]["reproducible"]
    found = compare(changed(tmp_path, tmp_path / "other", processor="an abacus"), place / "dense.safetensors")
    assert (found.weights, found.refitted, found.note) == (3, 3, "")


def test_a_folder_that_does_not_know_its_source_has_its_errors_measured(place, tmp_path):
    found = compare(changed(place, tmp_path, source=None), place / "dense.safetensors")
    assert (found.weights, found.traced, found.refitted) == (3, 0, 0) and "does not say" in found.note
