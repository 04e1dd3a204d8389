"""A few tokens of an nn.Linear go straight to their kernel, to the bits of the long way, and only where nobody would notice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import rpq_convert as rpq
from rpq_convert.layers import linear_forward

HOW = {
    "entropy-coded": {"bits": 4, "grow": True},
    "sub-vectors": {"dim": 4, "grow": True},
    "outputs": {"dim": 2, "axis": "out", "grow": True},
    "rotated": {"dim": 4, "axis": "in", "rotation": 64, "grow": True},
    "outliers": {"dim": 4, "outliers": 0.02, "grow": True},
}


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    made = {name: nn.Sequential(nn.Linear(128, 192)).eval() for name in HOW}
    for name, how in HOW.items():
        rpq.convert(made[name], check=False, **how)
    return made


def long_way(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def product(layer):
    return layer._modules["weight_rpq"].caches.product


@pytest.mark.parametrize("name", HOW)
def test_to_the_bits_of_the_long_way(layers, name):
    layer = copy.deepcopy(layers[name])[0]
    with torch.no_grad():
        for shape in (
            (128,),
            (1, 128),
            (1, 1, 128),
            (2, 128),
            (3, 128),
            (0, 128),
            (2, 4, 128),
            (1, 9, 128),
            (16, 128),
            (17, 128),
        ):
            x = torch.randn(shape)
            assert torch.equal(layer(x), long_way(layer, x)), shape
    assert bool(product(layer)) is (name not in ("rotated", "outliers"))


CHANGES = {
    "codebooks in place": lambda w: w.codebooks.mul_(2),
    "codebooks behind torch's back": lambda w: w.codebooks.data.mul_(2),
    "other codebooks": lambda w: setattr(w.codebooks, "data", torch.randn_like(w.codebooks)),
    "scales": lambda w: w.scales.data.mul_(3),
    "a state dict": lambda w: w.load_state_dict({k: v.flip(0) for k, v in w.state_dict().items()}),
    "codes": lambda w: w.set_tensor("codes", w.stored_tensor("codes").flip(0)),
    "wider": lambda w: w.widen(),
    "there and back": lambda w: w.to(torch.float16).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["entropy-coded", "outputs"])
def test_what_changes_is_seen(layers, name, change):
    layer, x = copy.deepcopy(layers[name])[0], torch.randn(1, 128)
    with torch.no_grad():
        before = layer(x)
        CHANGES[change](layer._modules["weight_rpq"])
        after = layer(x)
    torch.testing.assert_close(after, F.linear(x, layer.weight.clone(), layer.bias), rtol=1e-4, atol=1e-4)
    assert torch.equal(before, after) is (change in ("wider", "there and back")) and product(layer)


class Watch(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", []) + [func]
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_an_ordinary_layer(layers):
    layer, x = copy.deepcopy(layers["entropy-coded"])[0], torch.randn(1, 128)
    with torch.no_grad():
        plain = layer(x)
        with Watch() as watch:
            layer(x)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x.bfloat16().float()).dtype == torch.float32
        assert torch.func.vmap(layer)(x).shape == plain.shape
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(torch.ones(1, 128)), layer(torch.ones(1, 128)), rtol=1e-4, atol=1e-4)
    assert F.linear in watch.seen and counter.get_total_flops() > 0


def test_gradients_go_the_long_way(layers):
    layer, x = copy.deepcopy(layers["entropy-coded"])[0], torch.randn(1, 128)
    layer(x).sum().backward()
    assert layer.bias.grad is not None and layer._modules["weight_rpq"].codebooks.grad is not None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad and product(layer)
    given = x.clone().requires_grad_()
    layer(given).sum().backward()
    torch.testing.assert_close(given.grad[0], layer.weight.detach().clone().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "x", [torch.randn(1, 64), torch.randn(1, 128).double(), torch.randint(3, (1, 128)), torch.randn(2, 64)]
)
def test_a_wrong_input_is_refused_as_by_torch(layers, x):
    layer = copy.deepcopy(layers["entropy-coded"])[0].requires_grad_(False)
    with torch.no_grad(), pytest.raises(RuntimeError):
        layer(x)


def test_strided_inputs_and_odd_biases(layers):
    layer = copy.deepcopy(layers["entropy-coded"])[0].requires_grad_(False)
    wide, x = torch.randn(1, 256), torch.randn(1, 128)
    assert torch.equal(layer(wide[:, ::2]), layer(wide[:, ::2].contiguous()))
    plain = layer(x)
    layer.bias = nn.Parameter(torch.stack([layer.bias, layer.bias], 1)[:, 0], requires_grad=False)
    assert not layer.bias.is_contiguous() and torch.equal(layer(x), plain)
    layer.bias = None
    assert torch.equal(layer(x), long_way(layer, x))


def test_a_class_with_a_forward_of_its_own_keeps_it():
    class Louder(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    torch.manual_seed(0)
    model = nn.Sequential(Louder(128, 128), nn.Linear(128, 128)).eval().requires_grad_(False)
    rpq.convert(model, dim=4, axis="in", grow=True, check=False)
    x = torch.randn(1, 128)
    assert torch.equal(model[0](x), 2 * F.linear(x, model[0].weight, model[0].bias)) and product(model[0]) is None
    model(x)
    assert type(model[1]).forward is linear_forward.forward and product(model[1])
    with rpq.decoded(model):
        torch.testing.assert_close(model[1](x), F.linear(x, model[1].weight.clone(), model[1].bias))
    rpq.restore(model)
    assert type(model[1]).forward is nn.Linear.forward


def test_what_had_no_memory_is_served_once_it_has(layers):
    layer, x = copy.deepcopy(layers["entropy-coded"])[0].requires_grad_(False), torch.randn(1, 128)
    state, empty = layer.state_dict(), copy.deepcopy(layer).to("meta")
    empty.weight_rpq.caches.product = empty.weight_rpq.product()
    assert empty.weight_rpq.caches.product is False
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), layer(x)) and product(empty)


def test_what_others_put_in_torchs_place_is_called(layers, monkeypatch):
    model, x = layers["entropy-coded"], torch.randn(2, 128)
    plain, linear = nn.Linear.forward, F.linear
    with torch.no_grad():
        expected = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
            assert torch.equal(model(x), 2 * expected)
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", lambda *args: 3 * linear(*args))
            assert torch.equal(model(x), 3 * expected)
        assert torch.equal(model(x), expected) and product(model[0])
