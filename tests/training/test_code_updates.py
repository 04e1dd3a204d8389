"""Codes that follow their gradients in a loop of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rpq_convert as rpq
from rpq_convert.layers.surgery import layers_of

RULE = {"match": "*", "dim": 4, "books": 1, "scales": "none", "grow": True}


def pair():
    """Return a teacher, and a model of random codes that is to learn it."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    student = copy.deepcopy(teacher)
    rpq.convert(student, rules=[RULE], fit="random")
    return teacher, student


def learned(share, steps=300):
    teacher = nn.Linear(32, 128)
    student = copy.deepcopy(teacher)
    rpq.convert(student, rules=[RULE], fit="random")
    optimizer = torch.optim.AdamW(rpq.parameter_groups(student, 1e-3))
    updates = rpq.CodeUpdates(student, share, every=2) if share else None
    draw, changed = torch.Generator().manual_seed(1), 0
    for _ in range(steps):
        x = torch.randn(64, 32, generator=draw)
        optimizer.zero_grad()
        if updates:
            with updates.expanded():
                F.mse_loss(student(x), teacher(x).detach()).backward()
        else:
            F.mse_loss(student(x), teacher(x).detach()).backward()
        optimizer.step()
        changed += updates.step() if updates else 0
    x = torch.randn(500, 32, generator=draw)
    with torch.no_grad():
        return float(F.mse_loss(student(x), teacher(x))), changed


def test_codes_that_follow_their_gradients_learn_more():
    (still, none), (moved, some) = learned(0), learned(0.02)
    assert none == 0 < some
    assert moved < 0.7 * still


def test_codebooks_get_the_gradients_that_they_get_without_updates():
    teacher, student = pair()
    x = torch.randn(8, 32)
    F.mse_loss(student(x), teacher(x).detach()).backward()
    wanted = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    with rpq.CodeUpdates(student, 0.01).expanded():
        F.mse_loss(student(x), teacher(x).detach()).backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_from_its_state():
    def run(stop):
        teacher, student = pair()
        updates = rpq.CodeUpdates(student, 0.05, every=3)
        for step in range(8):
            if step == stop:
                state = copy.deepcopy(updates.state_dict())
                updates = rpq.CodeUpdates(student, 0.05, every=3)
                updates.load_state_dict(state)
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
            with updates.expanded():
                F.mse_loss(student(x), teacher(x).detach()).backward()
            updates.step(0.5)
        return [w.codes.clone() for w in layers_of(student).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(4), strict=True))


def test_wrong_settings_are_refused():
    _, student = pair()
    for share, every in ((0, 4), (1.5, 4), (0.1, 0)):
        with pytest.raises(rpq.TuneError, match="share must be above 0"):
            rpq.CodeUpdates(student, share, every)
    with pytest.raises(rpq.TuneError, match="rate above 0"):
        rpq.CodeUpdates(student, 0.1, rate=0)
    with pytest.raises(rpq.TuneError, match="run the model and its backward pass inside"):
        rpq.CodeUpdates(student, 0.1).step()
    with pytest.raises(rpq.TuneError, match="Linear has no RPQ layer"):
        rpq.CodeUpdates(nn.Linear(4, 4), 0.1)
    other = rpq.CodeUpdates(student[:1], 0.1)
    with pytest.raises(rpq.TuneError, match="of another model"):
        rpq.CodeUpdates(student, 0.1).load_state_dict(other.state_dict())
