"""Products that expand the matrix piece by piece, in vector registers or Intel's tiles, against sums in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processor import NO_AMX

from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference
from rpq_convert.kernels.cpu import amx_products, cost, linear, vector_products
from rpq_convert.kernels.cpu.cost import TILES, VECTORS

tiles = pytest.param(TILES, marks=pytest.mark.skipif(bool(NO_AMX), reason=NO_AMX))
ways = pytest.mark.parametrize("way", [VECTORS, tiles])


def make(axis, n, length, dim, books, stages, dtype=torch.float16):
    torch.manual_seed(0)
    layout = Layout(axis, n, length, dim, -(-length // dim) if books == 0 else books, stages)
    codes = torch.randint(0, 256, (stages, layout.blocks, n), dtype=torch.uint8)
    return layout, codes, (torch.randn(stages, layout.books, 256, dim) * 0.1).to(dtype)


def multiplied(way, x, codes, books, layout, scales=None, bias=None):
    """x [images, tokens, inputs] of any strides."""
    out = torch.full((*x.shape[:2], layout.outputs), torch.nan)
    linear._by_pieces(way, layout.axis == "in", x, x.dtype, codes, books, layout, None, scales, bias, out)
    return out


def error(out, x, codes, books, layout, scales=None, bias=None):
    """Return the largest error, relative to the sum of the sizes of the terms."""
    weight = reference.decode(codes, books, scales, layout, torch.float32).double().T
    bias = torch.zeros(layout.outputs) if bias is None else bias
    sizes = x.double().abs() @ weight.abs() + bias.abs()
    return float(((out - x.double() @ weight - bias).abs() / sizes).max())


@ways
@settings(max_examples=60, deadline=None)
@given(
    axis=st.sampled_from(["in", "out"]), n=st.integers(1, 300), length=st.integers(1, 300),
    dim=st.sampled_from([1, 2, 3, 4, 8, 12, 64, 128]), books=st.sampled_from([0, 1]), stages=st.integers(1, 2),
    tokens=st.integers(1, 70), images=st.integers(1, 3), dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_as_exact_as_float32(way, axis, n, length, dim, books, stages, tokens, images, dtype):
    layout, codes, tables = make(axis, n, length, dim, books, stages, dtype)
    x = (
        torch.randn(images, layout.inputs, tokens).transpose(1, 2)
        if images == 2
        else torch.randn(images, tokens, layout.inputs)
    )
    scales, bias = torch.rand(layout.outputs) + 0.5, torch.randn(layout.outputs)
    assert error(multiplied(way, x, codes, tables, layout, scales, bias), x, codes, tables, layout, scales, bias) < 1e-6


@ways
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_bfloat16(way, axis, dim):
    layout, codes, tables = make(axis, 190, 203, dim, 1, 1, torch.bfloat16)
    x = torch.randn(2, 40, layout.inputs).bfloat16()
    out = torch.empty(2, 40, layout.outputs)
    linear._by_pieces(way, axis == "in", x.float(), x.dtype, codes, tables, layout, None, None, None, out)
    assert error(out, x, codes, tables, layout) < 1e-5, "codebooks in bfloat16 are multiplied as they are"
    if way == VECTORS and vector_products.takes_short(x):
        short = torch.empty(2, 40, layout.outputs, dtype=torch.bfloat16)
        linear._by_pieces(way, axis == "in", x, x.dtype, codes, tables, layout, None, None, None, short)
        assert float((short.double() - out).abs().max() / out.abs().max()) < 2**-8


@ways
@pytest.mark.parametrize("axis", ["in", "out"])
def test_books_shared_by_some_blocks(way, axis):
    layout, codes, tables = make(axis, 70, 196, 4, 5, 2)
    x = torch.randn(1, 20, layout.inputs)
    assert error(multiplied(way, x, codes, tables, layout), x, codes, tables, layout) < 1e-6


@ways
def test_many_tokens_are_served_in_slabs(way, monkeypatch):
    layout, codes, tables = make("in", 40, 96, 8, 0, 1)
    x = torch.randn(3, 300, layout.inputs)
    whole = multiplied(way, x, codes, tables, layout)
    for module in (amx_products, vector_products):
        monkeypatch.setattr(module, "LEAST", 64)
        monkeypatch.setattr(module, "SLAB", 64)
    assert torch.equal(multiplied(way, x, codes, tables, layout), whole)
    monkeypatch.setattr(amx_products, "HELD", 1 << 10)  # what holds the tokens' parts is not kept then
    assert torch.equal(multiplied(way, x, codes, tables, layout), whole)
    small = x[:, :20]
    assert torch.equal(multiplied(way, small, codes, tables, layout), whole[:, :20])


@pytest.mark.skipif(bool(NO_AMX), reason=NO_AMX)
def test_precision_is_torchs_own_setting():
    way = TILES
    layout, codes, tables = make("in", 200, 500, 4, 0, 1)
    x = torch.randn(1, 50, layout.inputs)
    before, errors = torch.get_float32_matmul_precision(), []
    try:
        for asked in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(asked)
            errors.append(error(multiplied(way, x, codes, tables, layout), x, codes, tables, layout))
    finally:
        torch.set_float32_matmul_precision(before)
    assert 50 * errors[0] < 10 * errors[1] < errors[2] < 1e-2


@ways
@pytest.mark.parametrize("axis", ["in", "out"])
def test_bits_do_not_depend_on_threads(way, axis):
    layout, codes, tables = make(axis, 600, 700, 4, 0, 2)
    x = torch.randn(2, 90, layout.inputs)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(multiplied(way, x, codes, tables, layout))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@ways
def test_numbers_that_are_none_stay_in_their_token(way):
    layout, codes, tables = make("in", 64, 64, 8, 0, 1)
    x = torch.randn(1, 40, 64)
    good = multiplied(way, x, codes, tables, layout)
    x[0, 3, 5], x[0, 7, 9] = torch.inf, torch.nan
    out = multiplied(way, x, codes, tables, layout)
    assert not out[0, [3, 7]].isfinite().any()
    others = [t for t in range(40) if t not in (3, 7)]
    assert torch.equal(out[0, others], good[0, others])


@ways
def test_layers_choose_them_where_they_are_faster(way, monkeypatch):
    layout, codes, tables = make("in", 1024, 1024, 2, 0, 1)
    if way == VECTORS:  # as on an AMD processor, whichever this is
        monkeypatch.setattr(cost, "VECTOR", 0.3)
        monkeypatch.setattr(cost, "amx_time", lambda *_: torch.inf)
    assert cost.best(True, layout, 512, torch.float32)[1] == cost.best_for_pixels(layout, 2, 300)[1] == way
    x = torch.randn(512, 1024)
    assert torch.equal(
        linear.linear(x, codes, tables, None, None, layout), multiplied(way, x[None], codes, tables, layout)[0]
    )
    images = torch.randn(2, 1024, 300)
    wanted = multiplied(way, images.transpose(1, 2), codes, tables, layout).transpose(1, 2)
    assert torch.equal(linear.pointwise(images, codes, tables, None, None, layout), wanted)
