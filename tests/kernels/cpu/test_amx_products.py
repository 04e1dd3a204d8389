"""Products in Intel's tile registers against sums in float64: shapes, precisions, images, threads, numbers that are none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpq_convert.core.layout import Cut
from rpq_convert.kernels import reference
from rpq_convert.kernels.cpu import amx_products, cost, linear
from rpq_convert.kernels.jit import amx

pytestmark = pytest.mark.skipif(not amx.allowed(), reason="this processor has no tile registers")


def make(axis, n, length, dim, books, stages, dtype=torch.float16):
    torch.manual_seed(0)
    cut = Cut(axis, n, length, dim, -(-length // dim) if books == 0 else books, stages)
    codes = torch.randint(0, 256, (stages, cut.blocks, n), dtype=torch.uint8)
    return cut, codes, (torch.randn(stages, cut.books, 256, dim) * 0.1).to(dtype)


def multiplied(x, codes, books, cut, scales=None, bias=None):
    """x [images, tokens, inputs] of any strides."""
    out = torch.full((*x.shape[:2], cut.outputs), torch.nan)
    linear._by_tiles(cut.axis == "in", x, x.dtype, codes, books, cut, None, scales, bias, out)
    return out


def error(out, x, codes, books, cut, scales=None, bias=None):
    """Return the largest error, relative to the sum of the sizes of the terms."""
    weight = reference.decode(codes, books, scales, cut, torch.float32).double().T
    bias = torch.zeros(cut.outputs) if bias is None else bias
    sizes = x.double().abs() @ weight.abs() + bias.abs()
    return float(((out - x.double() @ weight - bias).abs() / sizes).max())


@settings(max_examples=60, deadline=None)
@given(
    axis=st.sampled_from(["in", "out"]), n=st.integers(1, 300), length=st.integers(1, 300),
    dim=st.sampled_from([1, 2, 3, 4, 8, 12, 64, 128]), books=st.sampled_from([0, 1]), stages=st.integers(1, 2),
    tokens=st.integers(1, 70), images=st.integers(1, 3), dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_as_exact_as_float32(axis, n, length, dim, books, stages, tokens, images, dtype):
    cut, codes, tables = make(axis, n, length, dim, books, stages, dtype)
    x = (
        torch.randn(images, cut.inputs, tokens).transpose(1, 2)
        if images == 2
        else torch.randn(images, tokens, cut.inputs)
    )
    scales, bias = torch.rand(cut.outputs) + 0.5, torch.randn(cut.outputs)
    assert error(multiplied(x, codes, tables, cut, scales, bias), x, codes, tables, cut, scales, bias) < 1e-6


@pytest.mark.parametrize("axis", ["in", "out"])
def test_books_shared_by_some_blocks(axis):
    cut, codes, tables = make(axis, 70, 196, 4, 5, 2)
    x = torch.randn(1, 20, cut.inputs)
    assert error(multiplied(x, codes, tables, cut), x, codes, tables, cut) < 1e-6


def test_many_tokens_are_served_in_slabs(monkeypatch):
    cut, codes, tables = make("in", 40, 96, 8, 0, 1)
    x = torch.randn(3, 300, cut.inputs)
    whole = multiplied(x, codes, tables, cut)
    monkeypatch.setattr(amx_products, "LEAST", 64)
    monkeypatch.setattr(amx_products, "SLAB", 64)
    assert torch.equal(multiplied(x, codes, tables, cut), whole)
    monkeypatch.setattr(amx_products, "HELD", 1 << 10)  # what holds the tokens' parts is not kept then
    assert torch.equal(multiplied(x, codes, tables, cut), whole)
    small = x[:, :20]
    assert torch.equal(multiplied(small, codes, tables, cut), whole[:, :20])


def test_precision_is_torchs_own_setting():
    cut, codes, tables = make("in", 200, 500, 4, 0, 1)
    x = torch.randn(1, 50, cut.inputs)
    before, errors = torch.get_float32_matmul_precision(), []
    try:
        for asked in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(asked)
            errors.append(error(multiplied(x, codes, tables, cut), x, codes, tables, cut))
    finally:
        torch.set_float32_matmul_precision(before)
    assert 50 * errors[0] < 10 * errors[1] < errors[2] < 1e-2


@pytest.mark.parametrize("axis", ["in", "out"])
def test_bits_do_not_depend_on_threads(axis):
    cut, codes, tables = make(axis, 600, 700, 4, 0, 2)
    x = torch.randn(2, 90, cut.inputs)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(multiplied(x, codes, tables, cut))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_numbers_that_are_none_stay_in_their_token():
    cut, codes, tables = make("in", 64, 64, 8, 0, 1)
    x = torch.randn(1, 40, 64)
    good = multiplied(x, codes, tables, cut)
    x[0, 3, 5], x[0, 7, 9] = torch.inf, torch.nan
    out = multiplied(x, codes, tables, cut)
    assert not out[0, [3, 7]].isfinite().any()
    others = [t for t in range(40) if t not in (3, 7)]
    assert torch.equal(out[0, others], good[0, others])


def test_layers_choose_them_where_they_are_faster():
    cut, codes, tables = make("in", 1024, 1024, 2, 0, 1)
    assert cost.tile_time(True, cut, 512, torch.float32) < cost.lookup_time(True, cut, 512)
    x = torch.randn(512, 1024)
    assert torch.equal(linear.linear(x, codes, tables, None, None, cut), multiplied(x[None], codes, tables, cut)[0])
    images = torch.randn(2, 1024, 300)
    by_tiles = multiplied(images.transpose(1, 2), codes, tables, cut).transpose(1, 2)
    assert torch.equal(linear.pointwise(images, codes, tables, None, None, cut), by_tiles)
