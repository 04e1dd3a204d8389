"""What the walker says of weights that are computed from others, that belong to classes it does not know, or that stay dense."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import rpq_convert as rpq


def orthogonal(kind: str, outputs: int = 64, trivial: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(nn.Linear(64, outputs), orthogonal_map=kind, use_trivialization=trivial)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.1 * torch.randn(outputs, 64))
    return layer.eval()


@pytest.mark.parametrize(
    "kind, outputs, trivial", [("matrix_exp", 64, False), ("matrix_exp", 96, True), ("cayley", 48, True)]
)
def test_an_orthogonal_weight_follows_its_codes(kind, outputs, trivial):
    layer, x = orthogonal(kind, outputs, trivial), torch.randn(4, 64)
    expected = layer(x)
    report = rpq.convert(layer, bits=8, grow=True)
    assert [r.decision for r in report.rows if r.name.endswith("original")] == ["rpq"]
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("outputs, trivial", [(64, False), (48, True)])
def test_householder_reflections_stay_dense(outputs, trivial):
    layer, x = orthogonal("householder", outputs, trivial), torch.randn(4, 64)
    expected = layer(x)
    for options in ({}, {"rules": [{"match": "*original", "view": "out in"}]}):
        report = rpq.convert(layer, bits=8, grow=True, **options)
        (row,) = [r for r in report.rows if r.name.endswith("original")]
        assert (
            row.decision == "dense"
            and row.reason == "orthogonal by householder: whole numbers are read from its diagonal"
        )
    assert torch.equal(layer(x), expected)


class Sign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sign()


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


@pytest.mark.parametrize("kind", [Sign, Symmetric])
def test_a_parametrization_of_its_own_is_converted_by_a_rule_alone(kind):
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    parametrize.register_parametrization(layer, "weight", kind())
    expected = layer(x)
    report = rpq.convert(layer, bits=8, grow=True)
    (row,) = [r for r in report.rows if r.name.endswith("original")]
    assert (
        row.reason
        == f"parametrized by {kind.__name__}, which may not follow its errors; a rule with a view of 2 converts it"
    )
    assert torch.equal(layer(x), expected) and any(f"parametrized by {kind.__name__}" in w for w in report.warnings)
    rule = {"match": "*original", "view": "out in"}
    assert [j.name for j in rpq.plan(layer, bits=8, grow=True, rules=[rule]).jobs] == [
        "parametrizations.weight.original"
    ]


def test_norms_beside_a_weight_stay_dense():
    model = nn.Sequential(
        nn.utils.weight_norm(nn.LSTM(16, 16), "weight_hh_l0"), nn.utils.weight_norm(nn.Linear(16, 16))
    )
    plan = rpq.plan(model, bits=8, grow=True)
    assert [j.name for j in plan.jobs] == ["0.weight_ih_l0", "0.weight_hh_l0_v", "1.weight_v"]
    assert {s.name for s in plan.skips if s.reason.startswith("parametrized")} == {"0.weight_hh_l0_g", "1.weight_g"}


class Unknown(nn.Module):
    """A layer with a weight of these axes and these attributes."""

    def __init__(self, shape, bias=None, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias))
        for name, value in attributes.items():
            setattr(self, name, value)


class SomeLinear(Unknown):
    pass


class DenseLayer(Unknown):
    pass


@pytest.mark.parametrize("layer, view", [
    (Unknown((64, 32), in_channels=32, out_channels=64), "out in"),  # PyG
    (Unknown((64, 64), in_features=64, out_features=64), "out in"),
    (Unknown((32, 64), in_features=32, out_features=64), "in out"),
    (Unknown((32, 64), nf=64, nx=32), "in out"),  # copies of GPT-2's Conv1D
    (Unknown((100, 16), num_embeddings=100, embedding_dim=16), "out in"),
    (Unknown((64, 32, 3), in_channels=32, out_channels=64), "out in k0"),
    (Unknown((64, 8, 3, 3), in_channels=32, out_channels=64, groups=4), "out in k0 k1"),
    (Unknown((32, 64, 3, 3), in_channels=32, out_channels=64), "in out k0 k1"),
    (SomeLinear((64, 32)), "out in"),
    (SomeLinear((64, 32), 64), "out in"),
    (DenseLayer((64, 32), 32), "in out"),
    (Unknown((64, 32), 64), None),  # a router, for all that is known
    (Unknown((64, 32)), None),
    (Unknown((64, 32), in_features=7, out_features=9), None),
    (Unknown((1, 64, 1, 1), in_channels=64), None),
])  # fmt: skip
def test_the_axes_of_an_unknown_class_are_those_that_it_names(layer, view):
    plan = rpq.plan(nn.Sequential(layer), bits=8, grow=True)
    assert [j.view for j in plan.jobs] == ([] if view is None else [view])
    if view is None:
        assert "raw parameter of Unknown: no known axes; a rule with a view of" in plan.skips[0].reason


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.table)


def test_large_weights_that_stay_dense_are_named():
    model = nn.Sequential(nn.Linear(64, 64), Mixer(), Mixer())
    (warning,) = rpq.convert(model, bits=8, grow=True).warnings
    assert (
        "2 weights of two or more axes stay dense" in warning and "1.table [64, 64]: raw parameter of Mixer" in warning
    )
    assert "register_layer" in warning


def test_small_ones_are_not():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    model.scale = nn.Parameter(torch.ones(4, 4))
    assert not rpq.plan(model, bits=8, grow=True).warnings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build, why", [
    (lambda: torch.jit.script(nn.Sequential(nn.Linear(64, 64))), "2 x inside a ScriptModule, whose class is compiled"),
    (lambda: nn.LayerNorm(64), "2 x one axis: nothing to cut"),
    (lambda: nn.Sequential(nn.ReLU()), "the model has no parameters"),
    (Mixer, "1 x raw parameter of Mixer: no known axes; a rule with a view of 2 converts it"),
])  # fmt: skip
def test_nothing_converted_is_said_with_the_reason(build, why):
    report = rpq.convert(build(), bits=4)
    assert report.warnings == (f"nothing is converted: {why}",)


@pytest.mark.parametrize("taken", [3, nn.Linear(4, 4), nn.Parameter(torch.ones(2)), "on the class"])
def test_a_weight_whose_codes_have_no_place_stays_dense(taken):
    class Taken(nn.Linear):
        pass

    if taken == "on the class":
        Taken.weight_rpq = property(lambda self: self.weight)
    layer = Taken(16, 8)
    if taken != "on the class":
        layer.weight_rpq = taken
    model, x = nn.Sequential(layer, nn.Linear(8, 8)), torch.randn(2, 16)
    expected = layer(x)
    report = rpq.convert(model, bits=8, grow=True)
    assert "weight_rpq of its own" in next(r.reason for r in report.rows if r.name == "0.weight")
    assert type(layer) is Taken and torch.equal(layer(x), expected) and type(model[1]) is not nn.Linear
