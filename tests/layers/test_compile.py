"""torch.compile, torch.export and torch.func see converted models as they see dense ones, and compute the same."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
import zoo
from often import often
from paths import ROOT
from test_zoo import LAYOUTS, close, generator, pair, run
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import rpq_convert as rpq
from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference, torch_ops
from rpq_convert.layers.surgery import layers_of

CHOICES = list(LAYOUTS.values())


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def calls(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "rpq" in str(n.target)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 64, padding_idx=0), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    rpq.convert(model, bits=4, grow=True)
    return model


ROWS = {row.name: row for row in zoo.ZOO}
EACH_KIND = (
    "Linear", "transformers Conv1D", "Embedding", "EmbeddingBag mean", "Conv2d groups reflect", "MultiheadAttention", "GRUCell",
    "weight norm", "tied", "experts",
)  # fmt: skip


@pytest.mark.parametrize("name", often(ROWS, EACH_KIND))
def test_compiled_forward_and_backward_are_those_of_eager_code(name):
    row = ROWS[name]
    _, model = pair(row, CHOICES[zoo.ZOO.index(row) % len(CHOICES)])
    model.eval()  # a spectral norm goes on with its iteration while it trains
    twin, inputs = copy.deepcopy(model), row.inputs(generator())  # some keep a state
    expected = run(twin, inputs)
    expected.sum().backward()
    wanted = gradients(twin)
    whole = not isinstance(
        model, nn.RNNBase
    )  # the compiler does not look into torch's recurrent layers, dense ones neither
    out = run(torch.compile(model, backend="aot_eager", fullgraph=whole), inputs)
    out.sum().backward()
    close(out, expected, row.dtype)
    found = gradients(model)
    assert set(found) == set(wanted) and any("codebooks" in n for n in found)
    for path in wanted:
        close(found[path], wanted[path], row.dtype, path)


# row -> the operators that its graph must hold: products and lookups on codes, one decode for a convolution
EXPORTS = {
    "Linear": ["rpq.linear.default"],
    "transformers Conv1D": ["rpq.linear.default"],
    "Embedding": ["rpq.decode.default"],
    "EmbeddingBag mean": ["rpq.decode.default"],
    "Conv2d": ["rpq.decode.default"],
    "ConvTranspose2d groups": ["rpq.decode.default"],
    "tied": ["rpq.decode.default", "rpq.linear.default"],
    "nested": ["rpq.linear.default"] * 2,
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_export(name, strict):
    row = zoo.BY_NAME[name]
    _, model = pair(row)
    model.eval()
    inputs = row.inputs(generator())
    program = torch.export.export(model, inputs, strict=strict)
    assert calls(program) == EXPORTS[name]
    assert torch.equal(program.module()(*inputs), run(model, inputs))
    assert any(k.endswith("codes") for k in program.state_dict)  # the weight was not folded into the graph
    shapes = {v.shape for v in program.constants.values() if isinstance(v, torch.Tensor)}
    assert not shapes & {torch.Size(w.shape) for w in layers_of(model).values()}


def test_batch_and_sequence_may_vary(small):
    x = torch.randint(0, 300, (3, 7))
    program = torch.export.export(small, (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    graphs = []
    compiled = torch.compile(
        small, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(1) or graph.forward
    )
    for shape in ((3, 7), (4, 9), (2, 300)):
        y = torch.randint(0, 300, shape)
        close(compiled(y), small(y))
        close(program.module()(y), small(y))
    assert len(graphs) == 1
    assert torch.compile(small, backend="aot_eager")(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 32)
    with pytest.raises(IndexError, match="index 300 is out of range for an embedding of 300 entries"):
        compiled(torch.tensor([[300, 1], [2, 3]]))


def test_autocast_inference_mode_and_kept_weights(small):
    x = torch.randint(0, 300, (3, 7))
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16 and torch.equal(compiled(x), small(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x), small(x))
    with torch.no_grad(), rpq.decoded(small):
        close(compiled(x), small(x))
        program = torch.export.export(small, (x,))
        assert not calls(program)  # a dense program
        close(program.module()(x), small(x))


def test_one_trace_of_jit_holds_for_other_values(small):
    traced = torch.jit.trace(small, (torch.randint(0, 300, (3, 7)),))
    y = torch.randint(0, 300, (3, 7))
    close(traced(y), small(y))


def test_transforms_of_torch_func(small):
    layer, x = small[1], torch.randn(3, 5, 64)
    for function in (torch.func.vmap(layer), torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))):
        expected = function(x)
        close(torch.compile(function, backend="aot_eager", fullgraph=True)(x), expected)
    close(torch.func.vmap(layer)(x), layer(x))
    y = x.clone().requires_grad_()
    close(expected, torch.autograd.grad(layer(y).square().sum(), y)[0])


class ManyUses(nn.Module):
    """A weight used in ways that have no operator of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

    def forward(self, x):
        w = self.a.weight
        x = x.to(w.dtype).to(w.device)
        y = torch.matmul(x, w.t()) + x @ w.T + torch.einsum("bi,oi->bo", x, w) + w[0] + w.mean(0) + w.size(0)
        if w.shape[1] == 64 and w.ndim == w.dim() == 2 and len(w) == 64 and w.is_floating_point():
            y = y * (1 - w).abs().max() - 2 * w.diagonal() + w.numel()
        return y + F.linear(x, torch.cat([self.a.weight, self.b.weight]), None)[:, 32:96]


def test_other_uses_of_a_weight_decode_it():
    torch.manual_seed(0)
    model = ManyUses()
    rpq.convert(model, bits=4, grow=True)
    x = torch.randn(2, 64)
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("write", [
    lambda w: w.mul_(2), lambda w: nn.init.zeros_(w), lambda w: w.data.copy_(w), lambda w: w.__setitem__(0, 1),
], ids=["mul_", "init", "data", "setitem"])  # fmt: skip
def test_a_write_is_refused_under_the_compiler_too(write):
    class Writes(nn.Linear):
        def forward(self, x):
            write(self.weight)
            return super().forward(x)

    model = Writes(64, 64)
    rpq.convert(model, bits=4, grow=True)
    for run_it in (model, torch.compile(model, backend="aot_eager")):
        with pytest.raises(RuntimeError, match="would be lost"):
            run_it(torch.randn(2, 64))


def coded(axis, stages, n=33, length=20, dim=3, books=2, dtype=torch.float32):
    torch.manual_seed(1)
    layout = Layout(axis, n, length, dim, books, stages)
    codes = torch.randint(0, 256, (stages, layout.blocks, n), dtype=torch.uint8)
    books = torch.randn(stages, books, 256, dim).requires_grad_()
    return layout, codes, books, (torch.rand(layout.outputs) + 0.5).to(dtype).requires_grad_()


@pytest.mark.parametrize("axis, stages", [("in", 1), ("out", 2)])
def test_operators_pass_torchs_own_check(axis, stages):
    layout, codes, books, scales = coded(axis, stages)
    x = torch.randn(5, layout.inputs, requires_grad=True)
    bias = torch.randn(layout.outputs, requires_grad=True)
    for one, two in ((scales, bias), (None, None)):
        torch.library.opcheck(torch.ops.rpq.linear.default, (x, codes, books, one, two, axis, layout.length))
        torch.library.opcheck(
            torch.ops.rpq.decode.default, (codes, books, one, None, axis, layout.length, torch.float32)
        )
    if axis == "in":
        index = torch.tensor([3, 32, 3])
        torch.library.opcheck(
            torch.ops.rpq.decode.default, (codes, books, scales, index, axis, layout.length, torch.bfloat16)
        )
    gradient = torch.randn(5, layout.outputs)
    inputs = (gradient, *(t.detach() for t in (x, codes, books, scales)), axis, layout.length, [True, True, True])
    torch.library.opcheck(torch.ops.rpq.linear_backward.default, inputs)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_gradients_of_the_reference_are_autograds(axis, stages):
    layout, codes, books, scales = coded(axis, stages)
    x = torch.randn(5, layout.inputs, requires_grad=True)
    index = torch.tensor([3, 32, 3, 0]) if axis == "in" else None
    for out, function in (
        (reference.linear(x, codes, books, scales, None, layout), None),
        (reference.decode(codes, books, scales, layout, torch.float32), reference.decode),
        (reference.decode_rows(codes, books, scales, index, layout, torch.float32) if axis == "in" else None, index),
    ):
        if out is None:
            continue
        gradient = torch.randn_like(out)
        inputs = (x, books, scales) if function is None else (books, scales)
        wanted = torch.autograd.grad(out, inputs, gradient)
        with torch.no_grad():
            if function is None:
                found = reference.linear_gradients(gradient, x, codes, books, scales, layout, (True,) * 3)
            else:
                rows = index if function is index else None
                found = reference.decode_gradients(gradient, codes, books, scales, rows, layout, (True,) * 2)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_program_can_be_saved_and_made_independent_of_this_library(small, tmp_path):
    x = torch.randint(0, 300, (3, 7))
    program = torch.export.export(small, (x,))
    bare = program.run_decompositions({**torch.export.default_decompositions(), **rpq.decompositions()})
    assert not calls(bare)
    close(bare.module()(x), small(x))
    torch.export.save(program, tmp_path / "coded.pt2")
    torch.save((x, small(x).detach()), tmp_path / "expected.pt")
    code = """
import rpq_convert, torch
x, y = torch.load("expected.pt")
out = torch.export.load("coded.pt2").module()(x)
assert float((out - y).detach().norm()) <= 2e-6 * float(y.norm())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_language_model_is_one_graph():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    rpq.convert(model, bits=4, grow=True)
    x, y = torch.randint(0, 100, (2, 7)), torch.randint(0, 100, (3, 9))
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x).logits, model(x).logits)
        shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
        program = torch.export.export(model, (x,), {"use_cache": False}, dynamic_shapes=shapes)
        close(program.module()(y, use_cache=False).logits, model(y).logits)
    assert calls(program).count("rpq.linear.default") == 8 and calls(program).count("rpq.decode.default") == 1


NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler, and none is here"
)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_the_compilers_own_decompositions_and_code(small, backend):
    """The first backend runs inductor's decompositions and its split into forward and backward without generated code."""
    x = torch.randint(0, 300, (3, 7))
    expected = small(x)
    expected.sum().backward()
    wanted = gradients(small)
    out = torch.compile(small, backend=backend, fullgraph=True)(x)
    out.sum().backward()
    close(out, expected)
    for name, found in gradients(small).items():
        torch.testing.assert_close(found, wanted[name], rtol=2e-3, atol=1e-4)  # those of codebooks are half precision


def test_operators_have_the_functions_of_a_backend():
    from rpq_convert.kernels import backend_for

    for module in (reference, torch_ops, backend_for("cpu")):
        assert all(hasattr(module, name) for name in ("linear", "decode", "decode_rows"))
    assert backend_for("meta") is reference
