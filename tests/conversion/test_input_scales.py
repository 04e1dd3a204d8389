"""Scales of inputs: one number for each column of a weight, which its layer multiplies its inputs by."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rpq_convert as rpq
from rpq_convert.core.axes import WeightView
from rpq_convert.core.spec import Spec
from rpq_convert.fit.gptq import step_sizes
from rpq_convert.layers.surgery import layers_of

SCALED = {"match": "*", "input_scales": "float16"}


def uneven(*size: int) -> torch.Tensor:
    """A weight whose columns differ in size by a factor of about 20."""
    weight = torch.randn(size)
    return weight * torch.exp(torch.randn(size[1])).view(1, -1, *[1] * (len(size) - 2))


def build(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = nn.Linear(96, 200), torch.randn(7, 96)
        layer.weight.data = uneven(200, 96)
    elif kind == "conv1d of GPT-2":
        layer, x = Conv1D(200, 96), torch.randn(2, 5, 96)
        layer.weight.data = uneven(200, 96).T.contiguous()
    elif kind == "embedding":
        layer, x = nn.Embedding(200, 96, padding_idx=3), torch.randint(200, (4, 9))
        layer.weight.data = uneven(200, 96)
        layer.weight.data[3] = 0
    elif kind == "convolution":
        layer, x = nn.Conv2d(24, 64, 3, stride=2), torch.randn(2, 24, 9, 9)
        layer.weight.data = uneven(64, 24, 3, 3)
    else:
        layer, x = nn.ConvTranspose1d(24, 64, 3), torch.randn(2, 24, 9)
        layer.weight.data = torch.randn(24, 64, 3) * torch.exp(torch.randn(24))[:, None, None]
    return nn.Sequential(layer).eval(), x


KINDS = ("linear", "conv1d of GPT-2", "embedding", "convolution", "transposed convolution")
SIZES = ({"bits": 4}, {"bits": 4, "storage": "bytes"}, {"dim": 4, "axis": "out"}, {"bits": 4, "outliers": 0.03})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_the_expanded_weight(kind, size, tmp_path):
    model, x = build(kind)
    dense = copy.deepcopy(model)
    rpq.convert(model, **size, rules=[SCALED], grow=True)
    (weight,) = layers_of(model).values()
    assert weight.spec.input_scales == "float16" and weight.input_scales is not None
    restored = copy.deepcopy(model)
    rpq.restore(restored)
    with torch.no_grad():
        torch.testing.assert_close(model(x), restored(x), rtol=1e-4, atol=1e-4)
        error = (restored[0].weight - dense[0].weight).square().sum() / dense[0].weight.square().sum()
    assert weight.record["error"] == pytest.approx(float(error), rel=1e-3)
    rpq.save(model, tmp_path / "out")
    loaded = rpq.load(tmp_path / "out", factory=lambda: build(kind)[0])
    assert rpq.verify(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_multiplies_by_them(kind):
    model, x = build(kind)
    rpq.convert(model, bits=4, rules=[SCALED], grow=True)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind):
    model, x = build(kind)
    rpq.convert(model, bits=4, rules=[SCALED], grow=True)
    (weight,) = layers_of(model.train()).values()
    model(x).square().sum().backward()
    got = weight.input_scales.grad.clone()
    model.zero_grad()
    parameter = weight()
    out = torch.func.functional_call(
        build(kind)[0],
        {"0.weight": parameter, **{f"0.{n}": p for n, p in model[0].named_parameters() if n == "bias"}},
        x,
    )
    out.square().sum().backward()
    torch.testing.assert_close(got, weight.input_scales.grad, rtol=1e-3, atol=1e-3)


def test_entropy_coded_layers_have_them_and_lose_less():
    """Columns of large weights meet quiet inputs here, as behind a norm that learned."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 192)
    layer.weight.data = uneven(192, 256)
    x = torch.randn(512, 256) / layer.weight.detach().square().mean(0).sqrt()
    found = {}
    for name, rules, calibration in (
        ("scales", [], None),
        ("none", [{"match": "*", "input_scales": "none"}], None),
        ("scales, calibrated", [], [x]),
        ("none, calibrated", [{"match": "*", "input_scales": "none"}], [x]),
    ):
        model = nn.Sequential(copy.deepcopy(layer))
        report = rpq.convert(model, bits=3, rules=rules, calibration=calibration)
        (row,) = (r for r in report.rows if r.decision == "rpq")
        with torch.no_grad():
            found[name] = float((model(x) - layer(x)).square().sum() / layer(x).square().sum())
        assert row.scale_bytes == 2 * (192 + 256 * ("none" not in name))
        assert row.code_bytes <= 3 * 192 * 256 // 8 + 512
    assert found["scales"] < 0.5 * found["none"]
    assert found["scales, calibrated"] < 0.5 * found["none, calibrated"]
    assert found["scales, calibrated"] < found["scales"]


def test_steps_are_in_inverse_proportion_to_what_later_inputs_cannot_compensate():
    power = torch.tensor([4.0, 1.0, 0.25, 1.0])
    steps = step_sizes(torch.diag(power))
    torch.testing.assert_close(steps * power.sqrt(), torch.ones(4), rtol=0.03, atol=0)
    assert torch.equal(step_sizes(torch.zeros(4, 4)), torch.ones(4))
    tied = torch.tensor([[1.0, 0.999], [0.999, 1.0]])  # the second compensates nearly all that the first does
    assert step_sizes(tied)[0] > 3 * step_sizes(tied)[1]


def test_who_gets_them():
    with torch.device("meta"):
        model = nn.ModuleDict({
            "layer": nn.Linear(256, 256), "table": nn.Embedding(1000, 64), "head": nn.Linear(64, 1000), "few": nn.Linear(512, 64),
            "conv": nn.Conv2d(64, 64, 3),
        })  # fmt: skip
    specs = {j.name.partition(".")[0]: j.spec for j in rpq.plan(model, bits=4).jobs}
    assert {name for name, spec in specs.items() if spec.input_scales} == {"layer"}
    assert all(spec.rate for spec in specs.values())
    rotated = rpq.plan(model, bits=4, rotation=32)
    assert not any(j.spec.input_scales for j in rotated.jobs) and any(j.spec.rotation for j in rotated.jobs)
    with pytest.raises(rpq.PlanError, match="one of the two"):
        rpq.plan(model, bits=4, rotation=32, rules=[{"match": "layer", "input_scales": "float16"}])
    with pytest.raises(ValueError, match="experts have no scales of their inputs"):
        Spec(2, input_scales="float16").tensors(WeightView("expert out in"), (2, 8, 8))
