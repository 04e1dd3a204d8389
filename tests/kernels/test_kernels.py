"""Every kernel against plain torch operations: forward, gradients, odd sizes, layouts, stages, dtypes, threads."""

import copy
import math
import threading

import pytest
import torch
from processor import NO_VBMI
from torch import nn
from torch.nn import functional as F

import rpq_convert as rpq
from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference
from rpq_convert.kernels.cpu import cost as costs
from rpq_convert.kernels.cpu import linear as kernels
from rpq_convert.kernels.cpu import one_token
from rpq_convert.kernels.cpu.cost import cost
from rpq_convert.kernels.cpu.decode import decode, decode_rows, tiled_linear
from rpq_convert.kernels.cpu.linear import decoded_linear, linear
from rpq_convert.kernels.cpu.prepared import prepared
from rpq_convert.kernels.jit import amx, threads

# axis, n, length, dim, books, stages, codes stored by rows
CASES = {
    "one book per block": (128, 96, 8, 12, 1, False),
    "padded last block": (70, 43, 5, 1, 1, False),
    "two stages, two books": (100, 64, 4, 2, 2, False),
    "dim 1, codes by rows": (65, 33, 1, 1, 1, True),
    "three stages by rows": (200, 130, 5, 3, 3, True),
    "dim 16": (300, 64, 16, 4, 1, False),
    "dim 2": (64, 128, 2, 1, 1, False),
    "dim 64, heads": (48, 128, 64, 2, 1, False),
    "one row": (1, 24, 8, 1, 1, False),
}


def make(axis, n, length, dim, books, stages, by_rows, dtype=torch.float32):
    torch.manual_seed(0)
    layout = Layout(axis, n, length, dim, books, stages)
    codes = torch.randint(0, 256, (stages, layout.blocks, n), dtype=torch.uint8)
    if by_rows:
        codes = codes.transpose(1, 2).contiguous().transpose(1, 2)
    return layout, codes, torch.randn(stages, books, 256, dim).to(dtype)


def plain_weight(codes, books, scales, layout):
    return reference.decode(codes, books, scales, layout, torch.float32)


def close(a, b, limit=2e-6):
    a, b = a.detach(), b.detach()
    return float((a - b).norm()) <= limit * float(b.norm())


WAYS = {"lookup_time": costs.LOOKUPS, "vector_time": costs.VECTORS, "amx_time": costs.TILES}


def prefer(monkeypatch, way):
    """Let products of codes go one way, whatever the number of tokens."""
    for name in ("lookup_time", "vector_time", "amx_time"):
        monkeypatch.setattr(costs, name, lambda *_, time=0 if WAYS[name] == way else math.inf: time)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 40, 100])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("case", CASES)
def test_linear_and_its_gradients(case, axis, tokens, monkeypatch):
    layout, codes, books = make(axis, *CASES[case])
    inputs = [torch.randn(tokens, layout.inputs), books, torch.rand(layout.outputs) + 0.5, torch.randn(layout.outputs)]
    x, books, scales, bias = (t.requires_grad_() for t in inputs)
    expected = x @ plain_weight(codes, books, scales, layout).T + bias
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, gradient)
    tried = [(linear, costs.LOOKUPS), (decoded_linear, costs.LOOKUPS), (linear, costs.VECTORS)]
    for function, way in tried + [(linear, costs.TILES)] * amx.amx_allowed():
        prefer(monkeypatch, way)
        out = function(x, codes, books, scales, bias, layout)
        assert close(out, expected)
        for found, want in zip(torch.autograd.grad(out, inputs, gradient), wanted):
            assert close(found, want)
        given = gradient, x.detach(), codes, books.detach(), scales.detach(), layout, (True,) * 3
        for way in (kernels.linear_gradients, kernels.decoded_gradients):
            assert all(map(close, way(*given), wanted))
    with torch.no_grad():
        assert close(linear(x, codes, books, scales, None, layout), expected - bias)
        assert close(tiled_linear(x, codes, books, scales, bias, layout), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("case", CASES)
def test_decode_gives_the_bits_of_plain_torch(case, axis, dtype):
    layout, codes, books = make(axis, *CASES[case], dtype=torch.float16)
    scales = torch.rand(layout.outputs).half()
    table = books.reshape(layout.stages, layout.books * 256, layout.dim).float()
    first = torch.arange(layout.blocks) * layout.books // layout.blocks * 256
    matrix = sum(F.embedding(codes[s].T.int() + first, table[s]) for s in range(layout.stages))
    matrix = matrix.flatten(1)[:, : layout.length].to(dtype)
    plain = matrix if axis == "in" else matrix.T
    assert torch.equal(decode(codes, books, None, layout, dtype), plain)
    assert torch.equal(decode(codes, books, scales, layout, dtype), plain * scales.to(dtype)[:, None])
    if axis == "in":
        index = torch.randint(0, layout.n, (37,))
        rows = decode_rows(codes, books, scales, index, layout, dtype)
        assert torch.equal(rows, (plain * scales.to(dtype)[:, None])[index])


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_decode(case, axis):
    layout, codes, books = make(axis, *CASES[case])
    inputs = [books.requires_grad_(), (torch.rand(layout.outputs) + 0.5).requires_grad_()]
    expected = plain_weight(codes, *inputs, layout)
    gradient = torch.randn_like(expected)
    out = decode(codes, *inputs, layout, torch.float32)
    for found, want in zip(torch.autograd.grad(out, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)):
        assert close(found, want)


def test_gradient_of_a_gradient():
    layout, codes, books = make("in", *CASES["one book per block"])
    x = torch.randn(5, layout.inputs, dtype=torch.float32, requires_grad=True)
    books.requires_grad_()

    def penalty(product):
        (first,) = torch.autograd.grad(product.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, books])

    wanted = penalty(x @ plain_weight(codes, books, None, layout).T)
    for found, want in zip(penalty(linear(x, codes, books, None, None, layout)), wanted):
        assert close(found, want, 1e-5)


WHOLE = {
    "tables": ("in", 1000, 4096, 8, 512, 1, False),
    "entries turned around": ("in", 3000, 600, 2, 1, 1, True),
    "digits": ("out", 4096, 1000, 2, 1, 1, False),
}


@pytest.mark.skipif(bool(NO_VBMI), reason=NO_VBMI)
@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("outlier", [1, 30])
def test_whole_numbers_are_as_good_as_floats(case, outlier):
    layout, codes, books = make(*WHOLE[case])
    x = torch.randn(1, layout.inputs)
    x[0, 5] *= outlier
    exact = x.double() @ plain_weight(codes, books, None, layout).double().T
    error = float((linear(x, codes, books, None, None, layout) - exact).norm() / exact.norm())
    assert error < 2e-6  # one ordinary product in float32 is off by 4e-7
    launch = kernels.launch_for(layout.axis == "in", codes, books, layout)
    assert (launch.by_rows, launch.digits is not None) == (
        case.startswith("entries"),
        case == "digits",
    )  # each by its own way
    assert sorted(one_token.POSITIONS) == list(range(64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("case", ["one book per block", "dim 1, codes by rows", "dim 2"])
def test_nan_and_infinity_do_not_come_out_as_numbers(case, axis, bad):
    layout, codes, books = make(axis, *CASES[case])
    for tokens in (1, 4, 20):
        x = torch.randn(tokens, layout.inputs)
        x[0, 3] = bad
        out = linear(x, codes, books, None, None, layout)
        assert not torch.isfinite(out[0]).any() and torch.isfinite(out[1:]).all()
    assert torch.equal(
        linear(torch.zeros(1, layout.inputs), codes, books, None, None, layout), torch.zeros(1, layout.outputs)
    )


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("tokens", [1, 8, 100])
@pytest.mark.parametrize(
    "cutting", [(1500, 1024, 8, 128, 1, False), (1500, 512, 2, 1, 1, False), (2500, 256, 2, 1, 1, True)]
)
def test_bits_do_not_depend_on_threads(cutting, axis, tokens, monkeypatch):
    layout, codes, books = make(axis, *cutting)
    x = torch.randn(tokens, layout.inputs, requires_grad=True)
    books.requires_grad_()

    def run():
        out = linear(x, codes, books, None, None, layout)
        return out, *torch.autograd.grad(out.square().sum(), [x, books])

    before = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(run())
        monkeypatch.setattr(threads, "_openmp", lambda: None)  # the fallback: Python's threads
        found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_many_threads_call_one_layer():
    torch.manual_seed(0)
    layer = nn.Linear(512, 512)
    rpq.convert(layer, bits=1)
    x = torch.randn(3, 512)
    expected, wrong = layer(x), []

    def work():
        for _ in range(20):
            if not torch.equal(layer(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_tables_follow_the_codebooks():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    rpq.convert(layer, bits=1)
    x = torch.randn(4, 64)
    books = layer.weight_rpq.codebooks
    for change in (lambda: books.mul_(2), lambda: books.data.mul_(2), lambda: setattr(books, "data", books.data * 2)):
        before = layer(x)
        with torch.no_grad():
            change()
        assert close(layer(x), 2 * before, 1e-5)
    assert prepared(books, "lookup")[0] is prepared(books, "lookup")[0]


@pytest.mark.parametrize("kind", ["lookup", "digits", "float32", "float16 transposed"])
def test_tables_get_new_values_where_they_lie(kind):
    """Whatever was made of their addresses stays right in training; tables of another shape or place are made anew."""

    def tables(of):
        found = prepared(of, kind)
        return list(found) if isinstance(found, tuple) else [found]

    books = torch.randn(1, 2, 256, 3)
    with torch.inference_mode():
        made = tables(books)
    places, launch = [t.data_ptr() for t in made], prepared(books, "a launch", object)
    for change in (lambda: books.mul_(2.5), lambda: books.data.add_(1)):
        change()
        for fresh, found in zip(made, tables(books), strict=True):
            assert found is fresh
        assert all(torch.equal(a, b) for a, b in zip(made, tables(books.clone()), strict=True))
        assert [t.data_ptr() for t in tables(books)] == places and prepared(books, "a launch", object) is launch
    books.data = torch.randn(1, 2, 256, 3)
    assert prepared(books, "a launch", object) is not launch


def test_tensors_that_end_with_the_process_end_silently(monkeypatch):
    """Python sets the names of modules to None first."""
    from rpq_convert.kernels.cpu import prepared as module

    said = []
    monkeypatch.setattr("sys.unraisablehook", said.append)
    books = torch.randn(1, 1, 256, 2)
    prepared(books, "lookup")
    for name, value in vars(module).copy().items():
        if not name.startswith("__") and not isinstance(value, type):
            monkeypatch.setattr(module, name, None)
    del books
    assert not said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_and_autocast(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(96, 80).to(dtype)
    rpq.convert(layer, dim=8)
    x = torch.randn(2, 5, 96).to(dtype)
    expected = F.linear(x.float(), layer.weight_rpq().float(), layer.bias.float())
    assert layer(x).dtype == dtype and close(layer(x).float(), expected, 2e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.float())
    wide = nn.Linear(96, 80)
    rpq.convert(wide, dim=8)
    with torch.autocast("cpu", dtype=dtype):
        assert wide(x.float()).dtype == dtype


def test_wrong_shapes_get_torchs_own_error():
    layer = nn.Linear(96, 80)
    rpq.convert(layer, dim=8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(3, 95))
    assert layer(torch.randn(0, 96)).shape == (0, 80)
    table = nn.Embedding(50, 64)
    rpq.convert(table, bits=2, grow=True)
    for index in ([0, 50], [-1, 3]):
        with pytest.raises(IndexError, match="out of range for an embedding of 50 entries"):
            table(torch.tensor(index))


def test_training_saves_no_dense_weight():
    torch.manual_seed(0)
    layer = nn.Linear(512, 512)
    rpq.convert(layer, dim=8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(16, 512, requires_grad=True)).sum().backward()
    assert (512, 512) not in saved and saved


def test_copies_do_not_share_what_kernels_keep():
    layer = nn.Linear(64, 64)
    rpq.convert(layer, bits=1)
    x = torch.randn(2, 64)
    expected = layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight_rpq.codebooks.zero_()
    assert torch.equal(layer(x), expected) and torch.equal(other(x), other.bias.expand(2, -1))


CONVOLUTIONS = {
    "3 x 3": (nn.Conv2d(32, 48, 3, padding=1, stride=2), (2, 32, 9, 9)),
    "grouped": (nn.Conv2d(32, 48, 3, groups=4, bias=False), (2, 32, 9, 9)),
    "points": (nn.Conv2d(64, 80, 1), (3, 64, 5, 7)),
    "points of a line": (nn.Conv1d(64, 80, 1, bias=False), (2, 64, 40)),
    "points with a stride": (nn.Conv2d(64, 80, 1, stride=2), (3, 64, 6, 6)),
    "volumes": (nn.Conv3d(16, 32, 1), (2, 16, 3, 4, 5)),
}


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, axis):
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(CONVOLUTIONS[name][0]), CONVOLUTIONS[name][1]
    rpq.convert(layer, dim=16, axis=axis, fit="random", grow=True)
    x = torch.randn(shape)
    plain = copy.deepcopy(layer)
    rpq.restore(plain)
    with torch.no_grad():
        assert close(layer(x), plain(x))
    x.requires_grad_()
    expected, out = plain(x), layer(x)
    assert close(out, expected)
    found, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    assert close(found, want)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_one_expert_is_served_without_the_others(axis, transposed, monkeypatch):
    class Experts(nn.Module):
        is_transposed = transposed

        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 64, 48) if transposed else torch.randn(4, 48, 64))

        def forward(self, x, expert):
            weight = self.up_proj[expert]
            return x @ weight if transposed else F.linear(x, weight)

    torch.manual_seed(0)
    model = Experts()
    rpq.convert(model, dim=4, axis=axis, grow=True)
    dense = rpq.restore(copy.deepcopy(model))
    x = torch.randn(5, 64, requires_grad=True)
    wanted = dense(x, 2)
    for index in (2, torch.tensor(2)):
        found = model(x, index)
        assert close(found, wanted)
        a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, dense(x, 2)))
        assert close(a, b)
    model(x, 1).sum().backward()
    assert model.up_proj_rpq.codebooks.grad.abs().sum() > 0 and model.up_proj_rpq.scales.grad[1].abs().sum() > 0
    assert not model.up_proj_rpq.scales.grad[0].any()
    assert torch.equal(model.up_proj[3].clone(), dense.up_proj[3]) and torch.equal(model.up_proj[-1], dense.up_proj[-1])
    assert torch.equal(model.up_proj[1:3], dense.up_proj[1:3])
    with pytest.raises(IndexError):
        model.up_proj[4]
    with pytest.raises(RuntimeError, match="would be lost"):
        model.up_proj[2].add_(1)
    whole = type(model.up_proj_rpq)
    original = whole.forward
    monkeypatch.setattr(
        whole, "forward", lambda self: original(self) if self.shape != model.up_proj_rpq.shape else 1 / 0
    )
    model(x, 0)


def test_decoded_keeps_weights_for_a_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 64))
    rpq.convert(model, bits=4)
    x = torch.randint(0, 300, (7,))
    with torch.no_grad():
        expected = model(x)
        with rpq.decoded(model) as same:
            assert same is model and model[1].weight is model[1].weight
            assert close(model(x), expected)
            with pytest.raises(RuntimeError, match="would be lost"):
                model[1].weight.add_(1)
    assert model[1].weight_rpq.caches.expanded is None
    with rpq.decoded(model):
        model(x).sum().backward()  # gradients are not cut off
    assert model[1].weight_rpq.codebooks.grad is not None


def test_cost_prefers_codes_where_they_win(monkeypatch):
    wide = Layout("in", 4096, 4096, 8, 512, 1)
    assert max(cost(wide, t) for t in (1, 8, 64, 512)) < 1
    for name in ("vector_time", "amx_time"):
        monkeypatch.setattr(costs, name, lambda *_: math.inf)
    assert cost(Layout("out", 4096, 4096, 1, 1, 1), 512) > 1


def test_the_kernels_are_used(monkeypatch):
    """A layer that quietly fell back to decoding would pass every test above but this one."""
    layer = nn.Linear(512, 512)
    rpq.convert(layer, dim=8)
    monkeypatch.setattr(type(layer.weight_rpq), "forward", None)
    with torch.no_grad():
        layer(torch.randn(4, 512))
    called = []
    original = kernels.apply
    monkeypatch.setattr(kernels, "apply", lambda *a, **k: called.append(1) or original(*a, **k))
    with torch.no_grad():
        layer(torch.randn(4, 512))
    assert called
