"""Models that accelerate offloads: their codes lie elsewhere too, come for each operation, and are saved from there."""

import copy

import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import SourceError

accelerate = pytest.importorskip("accelerate")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 64, padding_idx=0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.conv, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(64)
        self.lstm = nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index):
        x = self.down(self.up(self.table(index)).relu())
        return self.head(self.lstm(self.norm(self.conv(x)))[0])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Net().eval()
    rpq.convert(net, bits=8, grow=True, outliers=0.01, executor="serial")
    return net


INDEX = torch.randint(0, 100, (2, 8))
OFFLOADS = {
    "cpu": lambda m, at: accelerate.cpu_offload(m, execution_device="cpu"),
    "disk": lambda m, at: accelerate.disk_offload(m, str(at / "off"), execution_device="cpu"),
    "buffers too": lambda m, at: accelerate.disk_offload(
        m, str(at / "off"), execution_device="cpu", offload_buffers=True
    ),
    "some": lambda m, at: accelerate.dispatch_model(
        m,
        {"table": "cpu", "up": "disk", "down": "cpu", "conv": "disk", "norm": "cpu", "lstm": "disk", "head": "cpu"},
        main_device="cpu",
        offload_dir=str(at / "off"),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_model_computes_and_is_saved(model, how, tmp_path):
    wanted = model(INDEX)
    away = OFFLOADS[how](copy.deepcopy(model), tmp_path)
    assert away.up.weight_rpq.codes.is_meta and away.up.weight.device.type == "cpu"
    for _ in range(2):
        assert torch.equal(away(INDEX), wanted)
    assert away.up.weight_rpq.codes.is_meta
    rpq.save(away, tmp_path / "saved")
    assert torch.equal(rpq.load(tmp_path / "saved", factory=Net)(INDEX), wanted)
    with pytest.raises(SourceError, match=r"Net is offloaded .* no weights to restore"):
        rpq.restore(away)
    if how == "cpu":
        accelerate.hooks.remove_hook_from_submodules(away)
        assert torch.equal(away(INDEX), wanted)


def test_an_offloaded_dense_model_is_refused_as_it_is(tmp_path):
    away = accelerate.cpu_offload(Net().eval(), execution_device="cpu")
    wanted = away(INDEX)
    with pytest.raises(SourceError, match=r"Net is offloaded .* no weights to convert"):
        rpq.convert(away, bits=8, grow=True)
    assert torch.equal(away(INDEX), wanted)


def test_a_parameter_made_of_an_offloaded_weight_is_a_copy(model):
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    for read in (lambda w: w, lambda w: w[:8], lambda w: w.data):
        own = nn.Parameter(read(offloaded.up.weight))
        assert type(own) is nn.Parameter and torch.equal(own, read(model.up.weight))
