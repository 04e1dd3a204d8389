"""Weights of one output that differ by orders of magnitude, and outputs far below float16's numbers."""

import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import EncodeError


def uneven():
    """A layer whose small weights meet loud inputs, and their inputs: what a speaker encoder's first layer is like."""
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 1, 40)[torch.argsort(torch.rand(512, 40), 1)]
    loud = torch.logspace(0, -4, 40)
    layer = nn.Linear(40, 512, bias=False)
    layer.weight.data = torch.randn(512, 40) * sizes
    return layer, torch.randn(64, 40) * loud


def test_small_weights_keep_their_precision_beside_large_ones():
    layer, _ = uneven()
    dense = layer.weight.detach().clone()
    report = rpq.convert(layer, bits=8)
    scale = dense.square().mean(1, keepdim=True).sqrt()
    size = dense.abs() / scale
    small = (size > 0.05) & (size < 0.2)  # less than a fifth of the row's scale
    error = (layer.weight - dense)[small].square().sum() / dense[small].square().sum()
    assert float(error) < 1e-3 and report.rows[0].error < 1e-3


def test_even_weights_are_fitted_as_before():
    torch.manual_seed(0)
    layer = nn.Linear(64, 256)
    assert rpq.convert(layer, bits=8).rows[0].error < 1e-4


@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 4}, {"bits": 8, "outliers": 0.05}, {"bits": 5.34}, {"bits": 8, "rotation": 64}]
)
@pytest.mark.parametrize("rows", [slice(None), slice(128, None), slice(0, 1)])
def test_tiny_rows_are_kept(rows, options):
    torch.manual_seed(0)
    layer, same = nn.Linear(64, 256), nn.Linear(64, 256)
    same.load_state_dict(layer.state_dict())
    wanted = rpq.convert(same, **options).rows[0].worst
    with torch.no_grad():
        layer.weight[rows].mul_(1e-9)
    dense = layer.weight.detach().clone()
    report = rpq.convert(layer, **options)
    found = (layer.weight - dense).double().square().sum(1) / dense.double().square().sum(1)
    assert float(found.max()) < 2 * wanted + 1e-3 and report.rows[0].worst == pytest.approx(
        float(found.max()), rel=0.05
    )


def test_what_float16_cannot_hold_is_refused_or_said():
    torch.manual_seed(0)
    layer = nn.Linear(64, 256)
    with torch.no_grad():
        layer.weight.mul_(1e-15)
    dense = layer.weight.detach().clone()
    with pytest.raises(EncodeError, match="weight: row scales underflow float16; use scales='float32'"):
        rpq.convert(layer, bits=8)
    assert type(layer) is nn.Linear
    rpq.convert(layer, bits=8, rules=[{"match": "*", "scales": "float32"}])
    assert float((layer.weight - dense).double().square().sum() / dense.double().square().sum()) < 1e-3
    layer = nn.Linear(64, 256)
    with torch.no_grad():
        layer.weight[3].mul_(1e-20)
    report = rpq.convert(layer, bits=8)
    assert report.rows[0].worst == 1 and "outputs of 1 weights are lost" in report.all_warnings[0]
    assert report.rows[0].error < 1e-3


@pytest.mark.parametrize("size", [1e-41, 1e-30, 1e-19, 1e18, 1e30])
def test_every_number_of_float32_is_kept_by_scales_of_float32(size):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight[8:16] *= size
        layer.weight[3] = 0
    dense = layer.weight.detach().clone().double()
    narrow = nn.Linear(64, 64)
    narrow.load_state_dict(layer.state_dict())
    report = rpq.convert(layer, bits=8, grow=True, rules=[{"match": "*", "scales": "float32"}])
    found = (layer.weight - dense).square().sum(1) / dense.square().sum(1).clamp_min(1e-300)
    assert float(found.max()) < 1e-3 and report.rows[0].worst < 1e-3 and not layer.weight[3].any()
    if size > 1:
        with pytest.raises(EncodeError, match="weight: a row scale overflows float16; use scales='float32'"):
            rpq.convert(narrow, bits=8, grow=True)
    else:
        assert "use scales='float32'" in rpq.convert(narrow, bits=8, grow=True).all_warnings[0]


def test_zero_rows_stay_zero():
    layer = nn.Linear(64, 256)
    with torch.no_grad():
        layer.weight[7] = 0
    report = rpq.convert(layer, bits=8)
    assert not layer.weight[7].any() and report.rows[0].worst < 1e-2 and not report.all_warnings


@pytest.mark.parametrize("axis", ["in", "out"])
def test_the_report_shows_the_worst_output(axis):
    torch.manual_seed(0)
    layer = nn.Linear(64, 256)
    dense = layer.weight.detach().clone()
    report = rpq.convert(layer, dim=4, axis=axis)
    found = (layer.weight - dense).square().sum(1) / dense.square().sum(1)
    assert report.rows[0].worst == pytest.approx(float(found.max()), rel=1e-3) and report.worst is report.rows[0]
    for text in (report.to_terminal(), report.to_markdown(), report.to_html()):
        assert "worst" in text
    assert rpq.Report.from_json(report.to_json()) == report
