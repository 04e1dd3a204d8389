"""One token's product, by each road: codes side by side, row by row, anywhere; whole codewords; turned around."""

import pytest
import torch

from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference
from rpq_convert.kernels.cpu import linear as kernels
from rpq_convert.kernels.cpu.backend import Product


def close(found, x, weight, scales=1.0, bias=0.0, limit=5e-7):
    """Whether a product is one of float32: within rounding of the sum of its terms' sizes."""
    wanted, size = x.double() @ weight.double().T, (x.abs() @ weight.abs().T)
    error = (found.double() - (wanted * scales + bias)).abs()
    return bool((error <= limit * (size * scales + abs(bias)) * max(8, x.shape[-1] ** 0.5)).all())


def coded(axis, n, length, dim, stages, way):
    torch.manual_seed(0)
    layout = Layout(axis, n, length, dim, 1, stages)
    codes = torch.randint(0, 256, (stages, layout.blocks, n), dtype=torch.uint8)
    if way == "rows":
        codes = codes.transpose(1, 2).contiguous().transpose(1, 2)
    if way == "anywhere":
        codes = torch.stack([codes, codes], -1)[..., 0]
    return layout, codes, torch.randn(stages, 1, 256, dim)


@pytest.mark.parametrize("way", ["side by side", "rows", "anywhere"])
@pytest.mark.parametrize("n", [1, 40, 1600, 1601])  # whole eights and not; more rows than are taken at once
@pytest.mark.parametrize("axis", ["in", "out"])
def test_of_any_strides(axis, n, way):
    for dim, length, stages in ((1, 1, 1), (1, 12, 2), (1, 37, 1), (2, 24, 1), (3, 40, 1), (4, 48, 2), (8, 64, 1)):
        layout, codes, books = coded(axis, n, length, dim, stages, way)
        x, scales, bias = torch.randn(1, layout.inputs), torch.rand(layout.outputs) + 0.5, torch.randn(layout.outputs)
        weight, found = (
            reference.decode(codes, books, None, layout, torch.float32),
            kernels.linear(x, codes, books, scales, bias, layout),
        )
        assert close(found, x, weight, scales, bias), (dim, length, stages)


def test_single_weights_row_by_row_are_turned_around(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "turned", lambda layout, plain=kernels.turned: asked.append(layout) or plain(layout))
    for way in ("rows", "side by side"):
        layout, codes, books = coded("in", 72, 56, 1, 1, way)
        x = torch.randn(1, layout.inputs)
        weight = reference.decode(codes, books, None, layout, torch.float32)
        assert close(kernels.linear(x, codes, books, None, None, layout), x, weight)
    assert len(asked) == 1


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_inputs_are_scaled_on_the_way_to_the_same_bits(axis, dim):
    layout, codes, books = coded(axis, 66, 43, dim, 1, "side by side")  # the last sub-vector may be padded
    x, scales, inputs = torch.randn(1, layout.inputs), torch.rand(layout.outputs), torch.rand(layout.inputs).half()
    product = Product(codes, codes, books, scales, inputs, layout)
    plain = kernels.linear(x * inputs.float(), codes, books, scales, None, layout)
    assert torch.equal(product(x, None), plain)
    few = torch.randn(5, layout.inputs)
    scaled = few * inputs.float()
    assert torch.equal(product(few, None), kernels.linear(scaled, codes, books, scales, None, layout))
    assert torch.equal(product(x[0], None), plain[0]) and torch.equal(product(x[None], None), plain[None])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e30])
def test_numbers_that_no_table_of_integers_holds(value):
    for axis in ("in", "out"):
        layout, codes, books = coded(axis, 64, 64, 2, 1, "side by side")
        x = torch.full((1, 64), value)
        expected = x @ reference.decode(codes, books, None, layout, torch.float32).T
        found = kernels.linear(x, codes, books, None, None, layout)
        assert torch.equal(found.isfinite(), expected.isfinite())
        if expected.isfinite().all():
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
