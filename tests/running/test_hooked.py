"""Old-style weight_norm, spectral_norm and prune: the weight that a hook computes follows the codes, and the hook stays."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rpq_convert as rpq


def vocoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.utils.weight_norm(nn.Conv1d(32, 64, 3)), nn.utils.weight_norm(nn.ConvTranspose1d(64, 32, 4, 2))
    )


def critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv1d(32, 64, 3)))


def sparse() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Conv1d(32, 64, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer)


REMOVE = {
    vocoder: nn.utils.remove_weight_norm,
    critic: nn.utils.remove_spectral_norm,
    sparse: lambda m: prune.remove(m, "weight"),
}
kinds = pytest.mark.parametrize("build", REMOVE)


@kinds
def test_the_computed_weight_is_right_after_conversion_and_after_a_load(build, tmp_path):
    model, x = build().train(), torch.randn(2, 32, 9)
    model(x)
    expected = model.eval()(x).detach()
    dense = model[0].weight.detach().clone()
    report = rpq.convert(model, bits=8, grow=True)
    assert (
        len([r for r in report.rows if r.decision == "rpq"]) == len(model)
        and max(r.error or 0 for r in report.rows) < 1e-4
    )
    assert (model[0].weight - dense).norm() < 0.01 * dense.norm()  # before any call
    out = model(x)
    assert (out - expected).norm() < 0.02 * expected.norm()
    rpq.save(model, tmp_path / "out")
    loaded = rpq.load(tmp_path / "out", factory=build)
    assert torch.equal(loaded[0].weight, model[0].weight) and torch.equal(loaded(x), out)
    if build is sparse:
        assert torch.equal(model[0].weight == 0, dense == 0)


@kinds
def test_removing_the_hook_is_refused_before_anything_changes(build):
    model, x = build().eval(), torch.randn(2, 32, 9)
    rpq.convert(model, bits=8, grow=True)
    keys, expected = list(model.state_dict()), model(x)
    with pytest.raises(RuntimeError, match=r"removing its hook would be lost.*rpq_convert.restore"):
        REMOVE[build](model[0])
    assert list(model.state_dict()) == keys and torch.equal(model(x), expected)
    rpq.restore(model)
    REMOVE[build](model[0])
    torch.testing.assert_close(model(x), expected)


@kinds
def test_a_hooked_weight_trains(build):
    model, x = build().train(), torch.randn(2, 32, 9)
    rpq.convert(model, bits=8, grow=True)
    model(x).square().mean().backward()
    assert all(m.weight_rpq.codebooks.grad is not None for m in model if hasattr(m, "weight_rpq"))
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.endswith("codebooks"))
