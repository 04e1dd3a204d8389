"""Errors of weights and of outputs, as a fit measures them and as training leaves them."""

import copy

import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.report.schema import Report

LAYERS = {
    "linear": (lambda: nn.Linear(64, 96, bias=False), (64,)),
    "bilinear along in": (lambda: nn.Linear(64, 96, bias=False), (64,)),
    "conv": (lambda: nn.Conv2d(16, 64, 3, bias=False), (16, 7, 7)),
    "grouped": (lambda: nn.Conv2d(32, 128, 3, groups=4, bias=False), (32, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(32, 64, 2, stride=2, bias=False), (32, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(64, 64, 2, stride=2, groups=2, bias=False), (64, 5, 5)),
}


def loud(*shape):
    """Inputs whose channels differ much, so that errors of outputs are not those of weights."""
    torch.manual_seed(1)
    return torch.randn(24, *shape) * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 3, "rotation": 16}, {"bits": 3, "outliers": 0.02}])
@pytest.mark.parametrize("name", LAYERS)
def test_output_errors_are_those_of_the_outputs(name, options):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    dense = nn.Sequential(make())
    x = loud(*shape)
    options = options | ({"axis": "in"} if "along in" in name else {})
    report = rpq.convert(model := copy.deepcopy(dense), calibration=[x], **options)
    row = report.rows[0]
    with torch.no_grad():
        before, after = dense(x).double(), model(x).double()
    outputs = (0, *range(2, before.ndim))
    power, rest = before.square().sum(outputs), (before - after).square().sum(outputs)
    assert row.output_error == pytest.approx(float(rest.sum() / power.sum()), rel=1e-2)
    assert row.error != pytest.approx(row.output_error, rel=0.05)
    if name != "transposed, grouped":  # there the rows of the weight are outputs of several groups
        assert row.worst_output == pytest.approx(float((rest / power).max()), rel=1e-2)
    assert row.worst_output >= row.output_error


def test_calibration_improves_what_is_shown_where_weights_get_worse():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(128, 128, bias=False))
    x = loud(128) @ torch.randn(128, 128)
    plain = rpq.convert(copy.deepcopy(dense), bits=2)
    fed = rpq.convert(model := copy.deepcopy(dense), bits=2, calibration=[x])
    assert plain.output_error is None and "that of outputs is not known" in str(plain)
    assert fed.error > plain.error and fed.output_error < plain.error
    assert "output on its calibration inputs" in str(fed)
    again = rpq.recalibrate(model, dense, [x])
    assert again.output_error <= fed.output_error * 1.001


def test_training_takes_the_errors_away_and_nothing_else_does(tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = loud(64)
    before = rpq.convert(model := copy.deepcopy(dense), bits=4, calibration=[x])
    same = rpq.save(copy.deepcopy(model).train().requires_grad_().eval(), tmp_path / "same")
    assert [(r.error, r.output_error) for r in same.rows] == [(r.error, r.output_error) for r in before.rows]
    model(x).square().mean().backward()
    with torch.no_grad():
        for p in model[0].parameters():
            p -= 0.1 * p.grad
    saved = rpq.save(model, tmp_path / "trained")
    assert saved.rows[0].error is saved.rows[0].output_error is saved.rows[0].worst is None
    assert next(r for r in saved.rows if r.name == "1.weight").error is not None
    assert saved.rows[0].inputs == before.rows[0].inputs


def test_tuning_measures_weights_again(tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    data = list(loud(64).split(4))
    rpq.convert(model := copy.deepcopy(dense), bits=2, calibration=data)
    assert rpq.tune(model, dense, data, steps=8, recode=1e-3).best
    for row in rpq.save(model, tmp_path / "tuned").rows:
        if row.decision == "rpq":
            a, b = dense.get_parameter(row.name), model.get_submodule(row.name[:-7]).weight
            wanted = float((a - b).detach().square().sum() / a.detach().square().sum())
            assert row.error == pytest.approx(wanted, rel=1e-2) and row.output_error is row.worst_output is None


def test_folders_keep_errors_of_outputs(tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    report = rpq.convert(copy.deepcopy(dense), bits=4, calibration=[loud(64)])
    torch.save(dense.state_dict(), tmp_path / "x.bin")
    written = rpq.convert_checkpoint(
        tmp_path / "x.bin", tmp_path / "out", bits=4, factory=lambda: copy.deepcopy(dense), calibration=[loud(64)],
        allow_pickle=True,
    )  # fmt: skip
    errors = [(r.name, r.output_error, r.worst_output) for r in report.rows]
    assert errors == [(r.name, r.output_error, r.worst_output) for r in written.rows]
    assert Report.from_json((tmp_path / "out" / "rpq_report.json").read_text()) == written
