"""Layers built by hand: RPQ-pytorch's signatures, torch's layers behind them, and the seed's bugs gone."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert import nn as rnn

# name -> (constructor, the torch layer it must equal, input, which axis the codebooks divide)
LAYERS = {
    "Linear": (lambda **k: rnn.RPQLinear(6, 12, 4, **k), lambda: nn.Linear(6, 12), [(2, 6)]),
    "Linear without bias": (lambda **k: rnn.RPQLinear(6, 12, 4, False, **k), lambda: nn.Linear(6, 12, False), [(2, 6)]),
    "Bilinear": (lambda **k: rnn.RPQBilinear(3, 4, 6, 2, **k), lambda: nn.Bilinear(3, 4, 6), [(2, 3), (2, 4)]),
    "Conv1d": (lambda **k: rnn.RPQConv1d(4, 6, 3, 2, stride=2, **k), lambda: nn.Conv1d(4, 6, 3, stride=2), [(2, 4, 9)]),
    "Conv2d": (
        lambda **k: rnn.RPQConv2d(4, 6, (2, 3), 3, groups=2, padding_mode="circular", padding=1, **k),
        lambda: nn.Conv2d(4, 6, (2, 3), groups=2, padding_mode="circular", padding=1), [(1, 4, 6, 6)],
    ),
    "Conv3d": (lambda **k: rnn.RPQConv3d(2, 4, 2, 4, dilation=2, **k), lambda: nn.Conv3d(2, 4, 2, dilation=2),
        [(1, 2, 4, 4, 4)]),
    "ConvTranspose1d": (
        lambda **k: rnn.RPQConvTranspose1d(4, 6, 3, 3, stride=2, output_padding=1, **k),
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), [(2, 4, 5)],
    ),
    "ConvTranspose2d": (
        lambda **k: rnn.RPQConvTranspose2d(4, 8, 3, 2, groups=2, bias=False, **k),
        lambda: nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False), [(1, 4, 5, 5)],
    ),
    "ConvTranspose3d": (lambda **k: rnn.RPQConvTranspose3d(2, 4, 2, 2, **k), lambda: nn.ConvTranspose3d(2, 4, 2),
        [(1, 2, 3, 3, 3)]),
}  # fmt: skip
layers = pytest.mark.parametrize("make, dense, shapes", LAYERS.values(), ids=LAYERS)


@layers
def test_a_layer_is_the_torch_layer_with_a_computed_weight(make, dense, shapes):
    torch.manual_seed(0)
    layer, plain = make(), dense()
    assert isinstance(layer, type(plain)) and type(layer).__name__ == "RPQ" + type(plain).__name__
    assert isinstance(layer, getattr(rnn, type(layer).__name__)) and not isinstance(
        plain, getattr(rnn, type(layer).__name__)
    )
    assert layer.weight.shape == plain.weight.shape and (layer.bias is None) == (plain.bias is None)
    weight = layer.weight_rpq
    assert weight.codebooks.shape[:2] == (layer.num_codebooks, 256) and weight.codebooks.dtype == torch.float32
    assert weight.codes.shape[0] == layer.num_codebooks and weight.codes.dtype == torch.uint8 and weight.scales is None
    plain.load_state_dict({k: getattr(layer, k).detach().clone() for k in plain.state_dict()})
    inputs = [torch.randn(s) for s in shapes]
    torch.testing.assert_close(layer(*inputs), plain(*inputs))
    layer(*inputs).sum().backward()
    assert weight.codebooks.grad.any()


@layers
def test_a_layer_can_be_copied_pickled_saved_and_restored(make, dense, shapes, tmp_path):
    layer = make(seed=1).eval()
    inputs = [torch.randn(s) for s in shapes]
    expected = layer(*inputs)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*inputs), expected)
    rpq.save(layer, tmp_path / "out")
    for factory in (dense, make):  # the dense layer's constructor or the RPQ layer's own
        assert torch.equal(rpq.load(tmp_path / "out", factory=factory)(*inputs), expected)
    assert type(rpq.restore(layer)) is type(dense())
    torch.testing.assert_close(layer(*inputs), expected)


@layers
def test_the_seed_decides_and_by_default_torchs_generator_does(make, dense, shapes):
    def state(**how):
        return make(**how).state_dict()

    def equal(a, b):
        return all(torch.equal(a[k], b[k]) for k in a)

    assert equal(state(seed=3), state(seed=3)) and not equal(state(seed=3), state(seed=4))
    g = [torch.Generator().manual_seed(7) for _ in range(2)]
    first = state(generator=g[0])
    assert equal(first, state(generator=g[1])) and not equal(first, state(generator=g[0]))
    torch.manual_seed(5)
    one, two = state(), state()
    torch.manual_seed(5)
    assert equal(one, state()) and not equal(one, two)
    before = torch.get_rng_state()
    state(seed=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("books", [1, 16, 128])
@pytest.mark.parametrize("make, dense", [
    (lambda n, **k: rnn.RPQLinear(256, 512, n, **k), lambda: nn.Linear(256, 512)),
    (lambda n, **k: rnn.RPQConv2d(32, 128, 3, n, **k), lambda: nn.Conv2d(32, 128, 3)),
    (lambda n, **k: rnn.RPQConvTranspose2d(32, 128, 3, n, **k), lambda: nn.ConvTranspose2d(32, 128, 3)),
    (lambda n, **k: rnn.RPQEmbedding(512, 256, n, **k), lambda: nn.Embedding(512, 256)),
], ids=["Linear", "Conv2d", "ConvTranspose2d", "Embedding"])  # fmt: skip
def test_initial_deviations_are_torchs_whatever_the_number_of_codebooks(make, dense, books):
    """RPQ-pytorch's Linear started at 0.25 of nn.Linear's deviation with 16 codebooks on 1024 x 1024."""
    torch.manual_seed(0)
    layer, plain = make(books, seed=0), dense()
    assert float(layer.weight.detach().std()) == pytest.approx(float(plain.weight.detach().std()), rel=0.1)
    if getattr(plain, "bias", None) is not None:
        assert float(layer.bias.detach().std()) == pytest.approx(float(plain.bias.detach().std()), rel=0.2)
        assert float(layer.bias.detach().abs().max()) <= float(plain.bias.detach().abs().max()) * 1.1


def test_embedding_padding():
    """RPQ-pytorch's padding row was not zero, and other tokens' updates moved it."""
    layer = rnn.RPQEmbedding(10, 8, 2, padding_idx=-1)
    assert layer.padding_idx == 9 and not layer(torch.tensor([9])).any() and layer(torch.tensor([0])).any()
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.tensor([0, 9, 3])).square().sum().backward()
    optimiser.step()
    assert not layer.weight[9].any()


def test_embedding_arguments_do_what_torchs_do():
    """RPQ-pytorch accepted index -1, and later ignored max_norm, scale_grad_by_freq and sparse."""
    layer = rnn.RPQEmbedding(10, 8, 4, None, 0.25, scale_grad_by_freq=True, sparse=True)
    ids = torch.tensor([1, 1, 1, 2])
    out = layer(ids)
    assert (out.norm(dim=-1) < 0.25 + 1e-4).all() and layer.weight.norm(dim=-1).min() > 0.25
    out.sum().backward()  # "sparse=True" failed here
    assert layer.weight_rpq.codebooks.grad.layout == torch.strided
    once = rnn.RPQEmbedding(10, 8, 4, scale_grad_by_freq=True, seed=0)
    once(torch.tensor([1, 1, 1])).sum().backward()
    assert float(once.weight_rpq.codebooks.grad.sum()) == pytest.approx(8.0)  # three times a third of a row of ones
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))


def test_arguments_keep_the_seeds_order():
    """Between RPQ-pytorch's releases `bias` moved; 0.0.2's order is kept."""
    order = {
        rnn.RPQLinear: ["in_features", "out_features", "num_codebooks", "bias", "device", "dtype"],
        rnn.RPQEmbedding: ["num_embeddings", "embedding_dim", "num_codebooks", "padding_idx", "max_norm", "norm_type",
                           "scale_grad_by_freq", "sparse", "device", "dtype"],
        rnn.RPQConv2d: ["in_channels", "out_channels", "kernel_size", "num_codebooks"],
        rnn.RPQBilinear: ["in1_features", "in2_features", "out_features", "num_codebooks", "bias", "device", "dtype"],
    }  # fmt: skip
    for kind, names in order.items():
        found = [p.name for p in inspect.signature(kind.__new__).parameters.values() if p.kind != p.VAR_KEYWORD]
        assert found[1:] == names


def test_bits_instead_of_codebooks():
    layer = rnn.RPQLinear(64, 32, bits=2)
    assert layer.weight_rpq.spec.bits == 2 and layer.weight_rpq.codebooks.shape == (1, 256, 4)
    assert layer(torch.randn(3, 64)).shape == (3, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    """RPQ-pytorch's layers raised in bfloat16 and float64."""
    layer = rnn.RPQLinear(8, 6, 2, dtype=dtype)
    assert {layer.weight.dtype, layer.bias.dtype, layer.weight_rpq.codebooks.dtype} == {dtype}
    layer(torch.randn(2, 8, dtype=dtype)).sum().backward()
    assert layer.weight_rpq.codebooks.grad.dtype == dtype


def test_device():
    with torch.device("meta"):
        assert rnn.RPQLinear(8, 6, 2).weight_rpq.codes.is_meta
    layer = rnn.RPQLinear(8, 6, 2, device="meta")
    assert layer.bias.is_meta and layer.weight.is_meta


@pytest.mark.parametrize("make, message", [
    (lambda: rnn.RPQLinear(64, 128, 7), "do not divide .*128; try 8"),
    (lambda: rnn.RPQEmbedding(10, 9, 2), "do not divide .*9; try"),
    (lambda: rnn.RPQConvTranspose1d(4, 6, 3, 2, groups=2), "do not divide .*3; try"),
    (lambda: rnn.RPQLinear(64, 128, 0), "at least 1"),
    (lambda: rnn.RPQLinear(64, 128, 2.0), "whole number"),
    (lambda: rnn.RPQLinear(64, 128), "num_codebooks or bits"),
    (lambda: rnn.RPQLinear(64, 128, 2, bits=2), "num_codebooks or bits"),
    (lambda: rnn.RPQEmbedding(10, 8, 2, padding_idx=10), None),
    (lambda: rnn.RPQConv1d(4, 6, 3, 2, groups=4), "divisible"),
])  # fmt: skip
def test_what_cannot_be_built_says_why(make, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        make()


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="strides"):
        rnn.RPQConv2d(4, 6, 3, 2, strides=2)
    with pytest.raises(TypeError, match="nonsense"):
        rnn.RPQLinear(4, 6, 2, nonsense=2)


def test_a_layer_from_scratch_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x @ torch.randn(16, 4)).tanh()
    model = nn.Sequential(rnn.RPQLinear(16, 64, 8), nn.ReLU(), rnn.RPQLinear(64, 4, 2))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


def test_a_layer_whose_first_call_was_in_inference_mode_trains_afterwards():
    model = nn.Sequential(nn.Linear(32, 64), nn.Embedding(9, 32))
    rpq.convert(model, bits=2, grow=True)
    x = torch.randn(3, 32)
    with torch.inference_mode():
        first = model[0](x), model[1](torch.arange(9))
    again = model[0](x), model[1](torch.arange(9))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    (again[0].sum() + again[1].sum()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
