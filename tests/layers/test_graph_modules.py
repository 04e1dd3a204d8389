"""torch.fx: converted models are traced, the layers of a GraphModule are converted, its own parameters are not."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import rpq_convert as rpq

X = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))


class Reads(nn.Module):
    """A layer that is called, and a weight that is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.read = nn.Sequential(nn.Linear(32, 32), nn.ReLU()), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.called(x), self.read.weight, self.read.bias) + self.read.weight.sum()


def test_a_converted_model_is_traced():
    model = Reads().eval()
    rpq.convert(model, bits=8, grow=True)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(X), model(X))
    assert set(graph.state_dict()) == set(model.state_dict()) and not [n for n in vars(model) if "constant" in n]
    twin = copy.deepcopy(graph)
    twin.recompile()
    assert torch.equal(twin(X), graph(X))
    graph.read.weight_rpq.codebooks.data.mul_(2)  # the graph reads the module's codebooks
    assert not torch.equal(graph(X), twin(X))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.layer = nn.Parameter(torch.randn(32, 32)), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(F.linear(x, self.w))


def test_a_graph_modules_own_parameters_stay_dense():
    graph = torch.fx.symbolic_trace(Raw().eval())
    expected = graph(X)
    report = rpq.convert(graph, bits=8, grow=True, rules=[{"match": "w", "view": "out in"}])
    rows = {r.name: r for r in report.rows}
    assert rows["w"].reason == "owned by a GraphModule, whose class is made anew with its code"
    assert rows["layer.weight"].decision == "rpq"
    graph.recompile()
    out = graph(X)
    assert (out - expected).norm() < 0.02 * expected.norm() and torch.equal(copy.deepcopy(graph)(X), out)


def test_an_exported_module_is_converted_by_a_rule():
    exported = torch.export.export(Reads().eval(), (X,)).module()
    expected = exported(X)
    (warning,) = rpq.convert(exported, bits=8, grow=True).warnings
    assert warning.startswith(
        "nothing is converted: 2 x raw parameter of Module: no known axes; a rule with a view of 2"
    )
    report = rpq.convert(exported, bits=8, grow=True, rules=[{"match": "*weight", "view": "out in"}])
    assert len([r for r in report.rows if r.decision == "rpq"]) == 2
    with torch.no_grad():
        assert (exported(X) - expected).norm() < 0.02 * expected.norm()
