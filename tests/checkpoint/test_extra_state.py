"""What a state dict holds beside plain numbers: extra states, infinite masks, unusual dtypes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import FolderError, SourceError, VerifyError

OPTIONS = {"bits": 8, "grow": True}


class Scaled(nn.Module):
    """As float8 layers: a number that is no buffer."""

    def __init__(self):
        super().__init__()
        self.fc, self.state = nn.Linear(32, 48), torch.tensor(1.0)

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return self.fc(x) * float(self.state)


class Counting(Scaled):
    def __init__(self):
        super().__init__()
        self.state = None


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Scaled(), Counting()

    def forward(self, x):
        return self.a(x) + self.b.fc(x)


@pytest.mark.parametrize(
    "state", [torch.tensor(7.0), torch.arange(5), torch.zeros(0), {"amax": [1.5, 2], "name": "x"}, 3, None]
)
def test_an_extra_state_is_kept_by_save_and_load(tmp_path, state):
    model = Inside().eval()
    model.b.state = state
    model.a.state = torch.tensor(7.0)
    rpq.convert(model, **OPTIONS)
    report = rpq.save(model, tmp_path / "out")
    assert report.weight_file_bytes == report.predicted_bytes
    rpq.verify(tmp_path / "out")
    found = rpq.load(tmp_path / "out", factory=Inside)
    assert float(found.a.state) == 7
    assert torch.equal(found.b.state, state) if isinstance(state, torch.Tensor) else found.b.state == state
    x = torch.randn(2, 32)
    assert torch.equal(found(x), model(x))


@pytest.mark.parametrize("state", [object(), {"a": torch.ones(1)}, {1: 2}, float("nan"), b"pickled", (1, 2)])
def test_a_state_that_only_pickle_could_keep_is_refused_before_anything_is_written(tmp_path, state):
    model = Counting()
    model.state = state
    rpq.convert(model, **OPTIONS)
    with pytest.raises(SourceError, match=r"_extra_state .*only pickle"):
        rpq.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_extra_states_of_files(tmp_path):
    model = Scaled().eval()
    model.state = torch.tensor([3.0])
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    rpq.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "a", factory=Scaled, **OPTIONS)
    assert rpq.load(tmp_path / "a", factory=Scaled).state.tolist() == [3]
    model.state = {"amax": 3}
    torch.save(model.state_dict(), tmp_path / "x.pt")
    rpq.convert_checkpoint(tmp_path / "x.pt", tmp_path / "b", factory=Counting, allow_pickle=True, **OPTIONS)
    assert rpq.load(tmp_path / "b", factory=Counting).state == {"amax": 3}
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["quantization_config"]["extra_state"] = {"fc._extra_state": 1}
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="takes an extra state"):
        rpq.load(tmp_path / "b", factory=Counting)


class Masked(nn.Module):
    def __init__(self, value=float("-inf"), persistent=True):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("mask", torch.full((7, 7), value).triu(1), persistent=persistent)


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("road", ["save", "stream"])
def test_what_was_not_finite_before_is_no_damage(tmp_path, value, road):
    model = Masked(value)
    if road == "save":
        rpq.convert(model, **OPTIONS)
        rpq.save(model, tmp_path / "out")
    else:
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        rpq.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", factory=lambda: Masked(value), **OPTIONS)
    rpq.verify(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/rpq_manifest.json").read_text())
    assert manifest.pop("not_finite") == ["mask"]
    (tmp_path / "out/rpq_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerifyError, match="mask holds NaN or infinite values"):
        rpq.verify(tmp_path / "out")


def test_parameters_that_were_not_finite_are_named(tmp_path):
    model = Masked(0.0)
    with torch.no_grad():
        model.fc.bias[3] = float("nan")
    rpq.convert(model, **OPTIONS)
    assert any("fc.bias" in w for w in rpq.save(model, tmp_path / "out").warnings)
    with pytest.raises(VerifyError, match=r"fc\.bias holds NaN"):
        rpq.verify(tmp_path / "out")


class Buffered(nn.Module):
    def __init__(self, tensor, persistent=True):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("f", tensor, persistent=persistent)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2, torch.bool]
)
def test_buffers_of_unusual_dtypes_are_kept(tmp_path, dtype):
    tensor = torch.tensor([1, 0, 3]).to(dtype)
    model = Buffered(tensor)
    rpq.convert(model, **OPTIONS)
    report = rpq.save(model, tmp_path / "out")
    assert report.weight_file_bytes == report.predicted_bytes
    found = rpq.load(tmp_path / "out", factory=lambda: Buffered(torch.zeros(3).to(dtype)))
    assert found.f.dtype == dtype and torch.equal(found.f.view(torch.uint8), tensor.view(torch.uint8))
    rpq.verify(tmp_path / "out")


def test_buffers_that_no_file_holds_are_converted_in_memory_and_refused_on_save(tmp_path):
    for tensor in (torch.ones(3, dtype=torch.complex128), torch.eye(4).to_sparse()):
        model = Buffered(tensor)
        rpq.convert(model, **OPTIONS)
        with pytest.raises((SourceError, FolderError), match=r"f is .*cannot hold"):
            rpq.save(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        other = Buffered(tensor, persistent=False)
        rpq.convert(other, **OPTIONS)
        rpq.save(other, tmp_path / "kept", overwrite=True)
        shutil.rmtree(tmp_path / "kept")
