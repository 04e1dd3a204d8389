"""The GPU's kernels against plain torch over random shapes; run by test_gpu.py, in Triton's interpreter or on a device."""

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import rpq_convert as rpq
from rpq_convert import kernels
from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference
from rpq_convert.kernels.gpu import backend, products

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
LIMIT = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
cases = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def close(found, wanted, limit):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    found, wanted = found.detach().double(), wanted.detach().double()
    assert float((found - wanted).norm()) <= limit * float(wanted.norm()) + 1e-6


def same(found, wanted):
    if DEVICE == "cpu" and wanted.dtype == torch.bfloat16:  # the interpreter rounds towards zero
        return close(found, wanted, LIMIT[torch.bfloat16])
    assert torch.equal(found, wanted)


@st.composite
def coded(draw, axis=None):
    """A coded matrix: (cut, codes, codebooks, scales, the dtype to compute in)."""
    dim = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12, 16, 20, 64]))
    blocks = draw(st.integers(1, max(1, 70 // dim)))
    length = max(1, blocks * dim - draw(st.integers(0, dim - 1)))
    n, stages = draw(st.sampled_from([1, 2, 17, 64, 70, 300])), draw(st.integers(1, 3))
    books = draw(st.sampled_from([1, blocks, (blocks + 1) // 2]))
    layout = Layout(axis or draw(st.sampled_from(["in", "out"])), n, length, dim, books, stages)
    make = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    codes = torch.randint(0, 256, (stages, blocks, n), dtype=torch.uint8, generator=make)
    if draw(st.booleans()):
        codes = codes.transpose(1, 2).contiguous().transpose(1, 2)
    kind, dtype = (draw(st.sampled_from(list(LIMIT))) for _ in range(2))
    tables = torch.randn(stages, books, 256, dim, generator=make).to(kind)
    scales = (torch.rand(layout.outputs, generator=make) + 0.5).to(kind) if draw(st.booleans()) else None
    tables, scales = (None if t is None else t.to(DEVICE).requires_grad_() for t in (tables, scales))
    return layout, codes.to(DEVICE), tables, scales, dtype


def like(draw, tensor_shape, dtype, seed):
    """A random tensor whose strides may be any."""
    make = torch.Generator().manual_seed(seed)
    wide = torch.randn(*(2 * s for s in tensor_shape), generator=make).to(dtype).to(DEVICE)
    way = draw(st.sampled_from(["plain", "apart", "turned"]))
    if way == "apart":
        return wide[::2, 1::2]
    part = wide[: tensor_shape[0], : tensor_shape[1]]
    return part.T.contiguous().T if way == "turned" else part.contiguous()


def gradients(out, gradient, *inputs):
    return torch.autograd.grad(out, [t for t in inputs if t is not None], gradient)


@cases
@given(st.data(), coded(), st.sampled_from([1, 2, 15, 17, 64, 70]))
def test_linear_and_its_gradients(data, matrix, tokens):
    layout, codes, tables, scales, dtype = matrix
    x = like(data.draw, (tokens, layout.inputs), dtype, 1).requires_grad_()
    bias = torch.randn(layout.outputs, device=DEVICE).requires_grad_() if data.draw(st.booleans()) else None
    out = backend.linear(x, codes, tables, scales, bias, layout)
    wanted = reference.linear(
        x.float(), codes, tables.float(), None if scales is None else scales.float(), bias, layout
    )
    close(out, wanted.to(dtype), LIMIT[dtype])
    gradient = like(data.draw, (tokens, layout.outputs), dtype, 2)
    found = gradients(out, gradient, x, tables, scales, bias)
    for a, b in zip(found, gradients(wanted, gradient.float(), x, tables, scales, bias)):
        close(a, b, max(LIMIT[dtype], LIMIT[tables.dtype] if a.dtype != torch.float32 else 0) * 3)
    with torch.no_grad():
        bare = out if bias is None else out - bias.to(dtype)
        close(backend.linear(x, codes, tables, scales, None, layout), bare, 3 * LIMIT[dtype])


@cases
@given(st.data(), coded())
def test_decode_and_its_gradients(data, matrix):
    layout, codes, tables, scales, dtype = matrix
    out, wanted = (kernel.decode(codes, tables, scales, layout, dtype) for kernel in (backend, reference))
    same(out, wanted)
    assert out.is_contiguous() and out.dtype == dtype
    gradient = like(data.draw, tuple(out.shape), dtype, 2)
    exact = reference.decode(codes, tables.float(), None if scales is None else scales.float(), layout, torch.float32)
    for a, b in zip(gradients(out, gradient, tables, scales), gradients(exact, gradient.float(), tables, scales)):
        close(a, b, 3 * LIMIT[tables.dtype])


@cases
@given(st.data(), coded("in"))
def test_rows_and_their_gradients(data, matrix):
    layout, codes, tables, scales, dtype = matrix
    picked = data.draw(st.lists(st.integers(0, layout.n - 1), max_size=80))
    index = torch.tensor(picked, dtype=torch.long, device=DEVICE)
    out, wanted = (kernel.decode_rows(codes, tables, scales, index, layout, dtype) for kernel in (backend, reference))
    same(out, wanted)
    gradient = like(data.draw, tuple(out.shape), dtype, 2)
    wide = None if scales is None else scales.float()
    exact = reference.decode_rows(codes, tables.float(), wide, index, layout, torch.float32)
    for a, b in zip(gradients(out, gradient, tables, scales), gradients(exact, gradient.float(), tables, scales)):
        close(a, b, 3 * LIMIT[tables.dtype])


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_sums_in_parts(axis, tokens):
    """Long sums are cut into parts, which the small shapes above are too short for."""
    layout = Layout("in", 100, 560, 4, 1, 1) if axis == "in" else Layout("out", 4200, 40, 4, 1, 1)
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (1, layout.blocks, layout.n), dtype=torch.uint8, device=DEVICE)
    tables, scales = torch.randn(1, 1, 256, 4, device=DEVICE), torch.rand(layout.outputs, device=DEVICE)
    x, bias = torch.randn(tokens, layout.inputs, device=DEVICE), torch.randn(layout.outputs, device=DEVICE)
    found = backend.linear(x, codes, tables, scales, bias, layout)
    close(found, reference.linear(x, codes, tables, scales, bias, layout), 3e-6)
    used = []
    original = products.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "launch", lambda kernel, *a, **k: used.append(kernel) or original(kernel, *a, **k))
        assert torch.equal(backend.linear(x, codes, tables, scales, bias, layout), found)
    assert used[1:] == [products.finish_kernel]


def test_nothing_comes_of_nothing_and_bad_rows_are_refused():
    layout = Layout("in", 5, 8, 4, 1, 1)
    codes, tables = torch.zeros(1, 2, 5, dtype=torch.uint8, device=DEVICE), torch.randn(1, 1, 256, 4, device=DEVICE)
    assert backend.linear(torch.randn(0, 8, device=DEVICE), codes, tables, None, None, layout).shape == (0, 5)
    if DEVICE == "cpu":
        for bad in ([5], [-1]):
            with pytest.raises(IndexError, match="5 entries"):
                backend.decode_rows(codes, tables, None, torch.tensor(bad), layout, torch.float32)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_gradient_of_a_gradient_and_ordered_sums(axis):
    torch.manual_seed(0)
    layout = Layout(axis, 20, 12, 4, 3, 1)
    codes = torch.randint(0, 256, (1, 3, 20), dtype=torch.uint8, device=DEVICE)
    tables = torch.randn(1, 3, 256, 4, device=DEVICE, requires_grad=True)
    x = torch.randn(4, layout.inputs, device=DEVICE, requires_grad=True)

    def twice(kernel):
        out = kernel.linear(x, codes, tables, None, None, layout)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, tables])

    for a, b in zip(twice(backend), twice(reference)):
        close(a, b, 1e-5)
    torch.use_deterministic_algorithms(True)
    try:
        inputs = (x, codes, tables, None, layout, (True, True, False))
        gradient = torch.randn(4, layout.outputs, device=DEVICE)
        with torch.no_grad():
            a, b = backend.linear_gradients(gradient, *inputs), reference.linear_gradients(gradient, *inputs)
        assert torch.equal(a[1], b[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_a_model_computes_with_it(axis, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 32), nn.Linear(32, 48), nn.Linear(48, 30, bias=False))
    rpq.convert(model, dim=4, axis=axis, fit="random", grow=True)
    model.to(DEVICE)
    index = torch.randint(0, 60, (2, 3), device=DEVICE)

    def run():
        model.zero_grad()
        out = model(index)
        out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters() if p.grad is not None)]

    used, original = [], products.product
    monkeypatch.setattr(products, "product", lambda *a, **k: used.append(1) or original(*a, **k))
    monkeypatch.setattr(kernels, "backend_for", lambda device: reference)
    wanted = run()
    assert not used
    monkeypatch.setattr(kernels, "backend_for", lambda device: backend)
    for a, b in zip(run(), wanted, strict=True):
        close(a, b, 2e-3)  # half precision is what codebooks, and so their gradients, are kept in
    assert used
