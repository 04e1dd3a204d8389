"""Rotated weights: codes describe `W R^T`, layers compute as dense ones with the weight that comes back."""

import copy

import architectures
import pytest
import torch
import torch.fx.experimental.proxy_tensor
from torch import nn
from transformers.pytorch_utils import Conv1D

import rpq_convert as rpq
from rpq_convert.core.axes import WeightView
from rpq_convert.core.rotation import _steps, fitting, matrix, rotate
from rpq_convert.core.spec import Spec
from rpq_convert.kernels.cpu import backend
from rpq_convert.layers.surgery import layers_of


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(320, 24, padding_idx=3), nn.Linear(24, 320)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).tanh())


MODELS = {  # model, input, how many of its weights have inputs that a rotation fits
    "Linear": (lambda: nn.Linear(48, 70), lambda: torch.randn(5, 48), 1),
    "Conv1D": (lambda: Conv1D(70, 48), lambda: torch.randn(5, 48), 1),
    "Conv2d": (lambda: nn.Conv2d(8, 70, 3), lambda: torch.randn(2, 8, 6, 6), 1),
    "Conv2d 1 x 1": (lambda: nn.Conv2d(32, 70, 1), lambda: torch.randn(2, 32, 6, 6), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 70, 3), lambda: torch.randn(2, 16, 6, 6), 1),
    "Bilinear": (lambda: nn.Bilinear(8, 12, 70), lambda: (torch.randn(5, 8), torch.randn(5, 12)), 1),
    "LSTM": (lambda: nn.LSTM(16, 24), lambda: torch.randn(5, 2, 16), 2),
    "tied": (Tied, lambda: torch.randint(320, (5, 4)), 1),
    "no size fits": (lambda: nn.Linear(50, 70), lambda: torch.randn(5, 50), 0),
}
every = pytest.mark.parametrize("name", MODELS)


def run(model, x):
    out = model(*x) if isinstance(x, tuple) else model(x)
    return out[0] if isinstance(out, tuple) else out


def converted(name, **options):
    torch.manual_seed(0)
    build, inputs, _ = MODELS[name]
    dense = build().eval()
    model = copy.deepcopy(dense)
    rpq.convert(model, **{"bits": 4, "rotation": 64, "grow": True, **options})
    return dense, model, inputs()


def test_the_transform_is_orthogonal_and_a_compiler_gets_the_same():
    x = torch.randn(3, 5, 192, dtype=torch.float64)
    for size in (8, 16, 32, 64):
        turn = matrix(size, torch.float64, x.device)
        torch.testing.assert_close(backend.rotate(x.float(), size), rotate(x, size).float())
        torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64))
        assert set((turn * size**0.5).round(decimals=9).flatten().tolist()) == {1.0, -1.0}
        blocks = torch.cat([part @ turn.T for part in x.split(size, -1)], -1)  # by the definition
        torch.testing.assert_close(rotate(x, size), blocks)
        torch.testing.assert_close(rotate(blocks, size, back=True), x)
        for back in (False, True):
            torch.testing.assert_close(_steps(x, size, back), rotate(x, size, back=back))
    assert rotate(x, 0) is x
    assert [fitting(64, n) for n in (576, 96, 24, 12, 4096)] == [64, 32, 8, 0, 64] and fitting(0, 64) == 0
    assert fitting(100, 4096) == 64
    # part of the file format: these may never change
    assert matrix(8, torch.float64, x.device)[0].mul(8**0.5).round().tolist() == [-1, 1, 1, 1, -1, 1, -1, -1]


@every
def test_a_rotated_layer_is_the_dense_one_with_its_weight(name):
    dense, model, x = converted(name, fit="random")
    found = layers_of(model)
    assert sum(w.spec.rotation > 0 for w in {id(w): w for w in found.values()}.values()) == MODELS[name][2]
    with torch.no_grad():
        for path, weight in found.items():
            dense.get_parameter(path).copy_(weight())
    expected, got = run(dense, x), run(model, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (got.square().sum()).backward()
    assert all(w.codebooks.grad is not None and bool(w.codebooks.grad.any()) for w in found.values())
    with torch.no_grad(), rpq.decoded(model):
        torch.testing.assert_close(run(model, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Linear", "Conv1D", "Conv2d 1 x 1", "tied"])
def test_compiled_as_eager(name):
    _, model, x = converted(name)
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


@every
def test_fits_errors_and_files(name, tmp_path):
    dense, model, x = converted(name)
    report = rpq.save(model, tmp_path / "saved")
    for row in (r for r in report.rows if r.decision == "rpq"):
        before, after = dense.get_parameter(row.name).detach(), layers_of(model)[row.name]().detach()
        assert row.error == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-3)
        assert row.error < 0.05
    again = rpq.load(tmp_path / "saved", factory=MODELS[name][0])
    assert torch.equal(run(again, x), run(model, x))
    restored = rpq.restore(again)
    torch.testing.assert_close(run(restored, x), run(model, x), rtol=1e-5, atol=1e-5)
    plain = copy.deepcopy(dense)
    assert rpq.convert(plain, bits=4, grow=True).bytes == report.bytes  # a rotation weighs nothing


def test_an_outlier_is_spread():
    torch.manual_seed(0)
    weight = torch.randn(400, 64)
    weight[torch.arange(0, 400, 7), torch.randint(64, (58,))] *= 30
    largest = [float(w.abs().max() / w.square().mean().sqrt()) for w in (weight, rotate(weight, 64))]
    assert largest[1] < 0.5 * largest[0]


def test_statistics_are_rotated_as_the_weight_is():
    torch.manual_seed(0)
    mix = torch.randn(64, 64) * torch.logspace(0, -2, 64)
    data = [torch.randn(200, 64) @ mix for _ in range(4)]
    base = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).eval()
    found = {}
    for fed in (False, True):
        for axis in ("out", "in"):
            model = copy.deepcopy(base)
            options = {"calibration": data} if fed else {}
            rpq.convert(model, bits=2, rotation=32, axis=axis, grow=True, **options)
            found[fed, axis] = rpq.evaluate(base, model, data).metrics["relative_error"]
    assert found[True, "out"] < found[False, "out"] and found[True, "in"] < found[False, "in"]


def test_experts_and_streaming(tmp_path):
    torch.manual_seed(0)
    base = architectures.ARCHITECTURES["Mixtral"](64).eval()
    base.save_pretrained(tmp_path / "base")
    rpq.convert_checkpoint(tmp_path / "base", tmp_path / "out", bits=2, rotation=32, grow=True)
    streamed = rpq.load(tmp_path / "out")
    rpq.convert(base, bits=2, rotation=32, grow=True)
    ours, theirs = base.state_dict(), streamed.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert any(w.spec.rotation and "expert" in w.view.axes for w in layers_of(streamed).values())
    ids = torch.randint(60, (2, 9))
    with torch.no_grad():
        expected = base(ids).logits
        torch.testing.assert_close(rpq.restore(streamed)(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_rotated_is_told():
    with pytest.raises(rpq.PlanError, match="rotation must be a whole number"):
        rpq.plan(nn.Linear(64, 64), rules=[{"match": "*", "rotation": 0.5}], bits=2)
    with pytest.raises(ValueError, match="power of two"):
        Spec(2, rotation=48)
    with pytest.raises(ValueError, match="does not divide"):
        Spec(2, rotation=32).tensors(WeightView("out in"), (64, 48))


def test_what_watches_operations_sees_the_rotation():
    _, layer, x = converted("Linear")
    layer.requires_grad_(False)
    other = torch.randn_like(x)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(other), layer(other))
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], layer(x))
    out, slope = torch.func.jvp(layer, (x,), (other,))
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close(slope, other @ layer.weight.T + 0)
    watched = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    torch.testing.assert_close(watched(other), layer(other))
