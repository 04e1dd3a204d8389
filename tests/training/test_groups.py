"""What optimizers get for a converted model, and what files hold of what was trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.layers.surgery import layers_of


def dense():
    return nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 10, bias=False))


def model_of(**options):
    torch.manual_seed(0)
    model = dense()
    rules = [
        {"match": "0", "dim": 4, "books": 2, "grow": True, "scales": "none", "codebook_dtype": "float32"},
        {"match": "1", "dim": 4, "books": 2, "grow": True, "scales": "float16", "codebook_dtype": "float16"},
    ]
    rpq.convert(model, rules=[*rules, {"match": "*", "skip": True}], **options)
    return model


def test_every_parameter_is_in_one_group_with_the_rate_of_its_kind():
    model = model_of(fit="random")
    with torch.no_grad():
        layers_of(model)["1.weight"].scales.fill_(0.125)
    groups = rpq.parameter_groups(model, 1e-3, weight_decay=0.1, codebook_rate=5)
    names = {id(p): n for n, p in model.named_parameters()}
    found = [(g["name"], g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups]
    assert found == [
        ("codebooks", 5e-3, 0.02, ["0.weight_rpq.codebooks"]),
        ("codebooks", 0.04, 0.0025, ["1.weight_rpq.codebooks"]),  # scales of 1/8: steps eight times as long
        ("dense", 1e-3, 0.1, ["3.weight"]),
        ("vectors", 1e-3, 0.0, ["1.bias", "1.weight_rpq.scales", "2.weight", "2.bias"]),
    ]


@pytest.mark.parametrize("scales", ["none", "float16"])
def test_a_first_step_moves_expanded_weights_by_the_rate_with_scales_or_without(scales):
    model = nn.Sequential(nn.Linear(64, 64))
    rule = {"match": "*", "dim": 4, "books": 1, "grow": True, "scales": scales, "codebook_dtype": "float32"}
    rpq.convert(model, rules=[rule], fit="random")
    weight = layers_of(model)["0.weight"]
    before = weight().detach().clone()
    optimizer = torch.optim.Adam(rpq.parameter_groups(model, 1e-4, codebook_rate=3))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight.codebooks.grad = torch.ones_like(weight.codebooks)
    optimizer.step()
    torch.testing.assert_close(
        (before - weight().detach()).square().mean().sqrt(), torch.tensor(3e-4), rtol=1e-3, atol=0
    )


def test_groups_that_are_made_anew_after_training_take_the_state_of_an_optimizer():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        rpq.convert(model, bits=1, fit="random", grow=True)
        return model, layers_of(model)

    model, weights = build()
    with torch.no_grad():
        for scale, weight in zip((1.0, 0.5, 0.25), weights.values(), strict=True):
            weight.scales.fill_(scale)
    before = [[id(p) for p in g["params"]] for g in rpq.parameter_groups(model, 1e-3)]
    with torch.no_grad():
        for scale, weight in zip(
            (0.25, 0.25, 1.0), weights.values(), strict=True
        ):  # sizes change places, two are equal now
            weight.scales.fill_(scale)
    assert [[id(p) for p in g["params"]] for g in rpq.parameter_groups(model, 1e-3)] == before


def test_expanded_weights_decay_as_dense_ones():
    model = model_of(fit="random")
    weight = layers_of(model)["0.weight"]
    before = weight().detach().clone()
    optimizer = torch.optim.AdamW(rpq.parameter_groups(model, 1e-2, weight_decay=0.5, codebook_rate=7))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(weight().detach(), before * (1 - 1e-2 * 0.5))


def test_frozen_and_tied_parameters():
    model = model_of(fit="random")
    head = nn.Linear(64, 40, bias=False)
    tied = nn.ModuleList([nn.Embedding(40, 64), head])
    head.weight = tied[0].weight
    model[2].requires_grad_(False)
    groups = rpq.parameter_groups(nn.ModuleList([model, tied]), 1e-3)
    all_of = [id(p) for g in groups for p in g["params"]]
    assert len(all_of) == len(set(all_of))
    assert id(head.weight) in all_of and id(model[2].weight) not in all_of
    assert [g["name"] for g in rpq.parameter_groups(nn.Linear(3, 3), 1e-3)] == ["dense", "vectors"]


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"rate": 1e-3, "weight_decay": -1}, {"rate": 1e-3, "codebook_rate": 0}])
def test_wrong_rates_are_refused(wrong):
    with pytest.raises(rpq.TuneError, match="must be above 0"):
        rpq.parameter_groups(nn.Linear(3, 3), **wrong)


def test_what_was_trained_is_saved_in_the_planned_bytes(tmp_path):
    model = model_of(fit="random")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 100)
    assert rpq.round_to_stored(model) is model
    x = torch.randint(40, (5,))
    wanted = model(x)
    rpq.save(model, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held["1.weight_rpq.codebooks"].dtype == held["1.weight_rpq.scales"].dtype == torch.float16
    assert held["0.weight_rpq.codebooks"].dtype == torch.float32
    again = rpq.load(tmp_path / "out", factory=dense)
    assert torch.equal(again(x), wanted)
