"""Reads of a computed weight that make something of their own, marks and hooks on it, freezing it, and gradients in batches."""

from __future__ import annotations

import copy
import io

import numpy
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import rpq_convert as rpq


def converted(bits: float = 8, mode: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(32, 24).train(mode)
    rpq.convert(layer, bits=bits, grow=True)
    return layer


READS = {
    "the weight": lambda m: m.weight,
    "some rows": lambda m: m.weight[:8],
    "its data": lambda m: m.weight.data,
    "a turned row of its data": lambda m: m.weight.data.T[3],
    "detached": lambda m: m.weight.detach(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_parameter_made_of_a_weight_is_a_copy_of_its_own(read, wanted):
    layer = converted()
    expected = read(layer).detach().clone()
    own = nn.Parameter(read(layer), requires_grad=wanted)
    assert type(own) is nn.Parameter and own.requires_grad is wanted and own.is_leaf and torch.equal(own, expected)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        own.add_(1)
    assert torch.equal(own, expected + 1) and torch.equal(layer.weight, before)
    twin = copy.deepcopy(own)
    assert type(twin) is nn.Parameter and torch.equal(twin, own)
    if wanted:
        own.square().sum().backward()
        assert torch.equal(own.grad, 2 * own.detach()) and layer.weight_rpq.codebooks.grad is None


def test_layers_are_made_of_weights():
    layer, ids = converted(), torch.arange(24)
    table = nn.Embedding.from_pretrained(layer.weight.data)
    assert torch.equal(table(ids), layer.weight.detach()) and not table.weight.requires_grad
    head = nn.Linear(32, 8, bias=False)
    head.weight = nn.Parameter(layer.weight[:8])
    x = torch.randn(3, 32)
    torch.testing.assert_close(head(x), (layer(x) - layer.bias)[:, :8])
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    assert set(head.state_dict()) == {"weight"} and type(head.state_dict()["weight"]) is torch.Tensor


def test_writes_are_refused_as_before():
    layer = converted()
    for write in (
        lambda: layer.weight.detach().zero_(),
        lambda: layer.weight.data.requires_grad_(),
        lambda: layer.weight.data[0].requires_grad_(),
        lambda: layer.weight.data.T.fill_(1),
    ):
        with pytest.raises(RuntimeError, match="would be lost"):
            write()


def test_arrays_of_a_weight_are_read_only():
    layer = converted()
    expected = layer.weight.detach().clone()
    for array in (layer.weight.detach().numpy(), layer.weight.data[1:].numpy(), numpy.asarray(layer.weight.detach())):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
        array.copy()[0] = 0
    assert torch.equal(layer.weight, expected) and layer.bias.detach().numpy().flags.writeable


@pytest.mark.parametrize("change", [
    lambda layer: delattr(layer, "weight"),
    lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    lambda layer: nn.utils.prune.random_structured(layer, "weight", 0.5, dim=0),
    lambda layer: layer.register_parameter("other", layer.weight),
    lambda layer: nn.utils.fuse_linear_bn_eval(layer, nn.BatchNorm1d(24).eval()),
    lambda layer: torch.jit.script(layer),
])  # fmt: skip
def test_what_takes_the_weight_away_is_refused_and_changes_nothing(change):
    layer = converted()
    names, expected = list(layer.state_dict()), layer(torch.ones(2, 32))
    with pytest.raises((RuntimeError, TypeError), match=r"^RPQLinear.*rpq_convert.restore\(model\) first") as refused:
        change(layer)
    assert "\n" not in str(refused.value)
    assert list(layer.state_dict()) == names and torch.equal(layer(torch.ones(2, 32)), expected)


def test_values_are_formatted():
    layer = converted()
    value = float(layer.weight.detach()[0, 0])
    assert f"{layer.weight[0, 0]:.3f} {layer.weight.data[0, 0]:>9.2e}" == f"{value:.3f} {value:>9.2e}"
    assert all(repr(w).startswith("tensor(") for w in (layer.weight, layer.weight[:2], layer.weight.data[0, 0]))


def test_copies_and_files_of_a_weight_are_ordinary_tensors():
    layer = converted()
    expected = layer.weight.detach().clone()
    copied = copy.deepcopy({"w": layer.weight, "again": layer.weight})
    assert type(copied["w"]) is nn.Parameter and copied["again"] is copied["w"] and torch.equal(copied["w"], expected)
    rows = copy.deepcopy(layer.weight.data[:3])
    assert type(rows) is torch.Tensor and torch.equal(rows.add_(1), expected[:3] + 1)
    file = io.BytesIO()
    torch.save({"whole": layer.weight, "data": layer.weight.data, "rows": layer.weight.detach()[:3]}, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert (
        torch.equal(read["data"], expected)
        and torch.equal(read["whole"], expected)
        and torch.equal(read["rows"], expected[:3])
    )
    assert torch.equal(layer.weight, expected)


def test_a_slice_of_a_list_of_parameters_shares_its_weights():
    torch.manual_seed(0)
    listed = nn.ParameterList([nn.Parameter(torch.randn(16, 16)) for _ in range(3)] + [nn.Parameter(torch.ones(3))])
    rpq.convert(listed, bits=8, grow=True, rules=[{"match": "*", "view": "out in"}])
    some = listed[1:]
    assert len(some) == 3 and all(torch.equal(a, listed[i]) for i, a in zip((1, 2, 3), some))
    assert some.get_submodule("0_rpq") is listed.get_submodule("1_rpq") and some[2] is listed[3]
    assert torch.equal(listed[-2], listed[2]) and len(listed[::2]) == 2 and len(listed[5:]) == 0


@pytest.mark.parametrize("freeze", [
    lambda w, wanted: w.requires_grad_(wanted),
    lambda w, wanted: setattr(w, "requires_grad", wanted),
])  # fmt: skip
def test_freezing_a_computed_weight_freezes_its_codebooks(freeze):
    layer, x = converted(mode=True), torch.randn(2, 32)
    freeze(layer.weight, False)
    assert not layer.weight.requires_grad and not any(p.requires_grad for p in layer.weight_rpq.parameters())
    layer(x).sum().backward()
    assert layer.bias.grad is not None and layer.weight_rpq.codebooks.grad is None
    freeze(layer.weight, True)
    assert (
        layer.weight.requires_grad
        and layer.weight_rpq.codebooks.requires_grad
        and layer.weight_rpq.scales.requires_grad
    )
    assert not layer.weight_rpq.codes.requires_grad
    layer(x).sum().backward()
    assert layer.weight_rpq.codebooks.grad.dtype == torch.float32  # wide enough for an optimizer


HOOKS = {
    "register_hook": lambda w: w.register_hook(print),
    "after accumulation": lambda w: w.register_post_accumulate_grad_hook(print),
    "retain_grad": lambda w: w.retain_grad(),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_a_computed_weight_are_refused(hook):
    with pytest.raises(RuntimeError, match=r"Linear.weight is computed from RPQ codes, so \w+ on it would be lost"):
        hook(converted().weight)


@pytest.mark.parametrize("hook", [nn.Parameter.register_hook, nn.Parameter.register_post_accumulate_grad_hook])
def test_a_weight_with_hooks_on_its_gradient_stays_dense(hook):
    seen, layer = [], nn.Linear(32, 24)
    hook(layer.weight, lambda *_: seen.append(1))
    report = rpq.convert(layer, bits=8, grow=True)
    assert "hooks on its gradient: nothing would call them" in str(report.warnings)
    layer(torch.randn(2, 32)).sum().backward()
    assert seen == [1]


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 24)
        self.layer.weight.no_weight_decay = True
        self.layer.bias.lr_scale = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_marks_on_a_weight_stay_with_it_and_with_what_trains(tmp_path):
    model = Marked()
    rpq.convert(model, bits=8, grow=True)
    model.layer.weight.group = "tables"
    rpq.save(model, tmp_path / "out")
    for each, marks in (
        (model, {"no_weight_decay", "group"}),
        (rpq.load(tmp_path / "out", factory=Marked), {"no_weight_decay"}),
    ):
        weight = each.layer.weight
        assert (
            weight.no_weight_decay and ("group" in marks) == hasattr(weight, "group") and not hasattr(weight, "other")
        )
        assert each.layer.weight_rpq.codebooks.no_weight_decay and each.layer.bias.lr_scale == 0.5
        assert not hasattr(weight, "__cuda_array_interface__x")


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("build, shape", [
    (lambda: nn.Linear(32, 24), (3, 32)),
    (lambda: nn.Sequential(nn.Linear(32, 32), nn.Conv1d(3, 5, 1)), (2, 3, 32)),
])  # fmt: skip
def test_gradients_in_batches_are_those_of_the_dense_model(build, shape, bits):
    torch.manual_seed(0)
    model = build()
    rpq.convert(model, bits=bits, grow=True)
    dense = rpq.restore(copy.deepcopy(model))
    x = torch.randn(shape, requires_grad=True)
    many = torch.randn(4, *dense(x).shape)

    def gradients(m: nn.Module, wanted: list) -> list:
        return list(torch.autograd.grad(m(x), wanted, many, is_grads_batched=True))

    torch.testing.assert_close(gradients(model, [x]), gradients(dense, [x]))
    books = [p for p in model.parameters() if p.requires_grad]
    one_by_one = [torch.autograd.grad(model(x), books, g) for g in many]
    for number, found in enumerate(gradients(model, books)):
        expected = torch.stack([g[number] for g in one_by_one])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(model, x.detach(), vectorize=True), jacobian(dense, x.detach(), vectorize=True))


@pytest.mark.parametrize("build, shape", [
    (lambda: nn.Linear(32, 24), (3, 32)),
    (lambda: nn.Conv2d(4, 6, 3), (2, 4, 6, 6)),
])  # fmt: skip
def test_forward_derivatives_are_those_of_the_dense_model(build, shape):
    model = build()
    rpq.convert(model, bits=8, grow=True)
    dense, x, along = rpq.restore(copy.deepcopy(model)), torch.randn(shape), torch.randn(shape)

    def derivative(m):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(m(forward_ad.make_dual(x, along))).tangent

    model.requires_grad_(False)(x)  # a kept product has no derivative
    for each in (model, model.requires_grad_(True)):
        torch.testing.assert_close(derivative(each), derivative(dense))
    torch.testing.assert_close(torch.func.jvp(model, (x,), (along,))[1], derivative(dense))


@pytest.mark.parametrize("build, shape", [
    (lambda: nn.Embedding(50, 32), (4, 7)),
    (lambda: nn.Embedding(50, 32, padding_idx=3), (4, 7)),
    (lambda: nn.EmbeddingBag(50, 32), (4, 3, 7)),
])  # fmt: skip
def test_lookups_are_mapped(build, shape):
    model, index = build(), torch.randint(0, 50, shape)
    rpq.convert(model, bits=8, grow=True)
    torch.testing.assert_close(torch.vmap(model)(index), torch.stack([model(i) for i in index]))


def test_what_is_converted_or_restored_in_inference_mode_trains():
    layer, x = nn.Linear(32, 24), torch.randn(2, 32)
    with torch.inference_mode():
        rpq.convert(layer, bits=8, grow=True)
        layer(x)
    layer.train()(x).sum().backward()
    assert layer.weight_rpq.codebooks.grad is not None
    with torch.inference_mode():
        rpq.restore(layer)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("bits", [8, 4, 2])
@torch.no_grad()
def test_a_write_through_data_is_seen_by_the_next_call(bits):
    """It leaves no mark on a tensor's version; one codeword or one scale is enough."""
    layer, x = nn.Linear(64, 640).eval(), torch.randn(4, 64)
    rpq.convert(layer, bits=bits, grow=True)
    for part, at in (("codebooks", (..., 17, 0)), ("scales", 5), ("codebooks", (..., 255, -1))):
        layer(x)
        getattr(layer.weight_rpq, part).data[at] += 1
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight.clone(), layer.bias))
