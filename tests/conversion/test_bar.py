"""The progress bar of conversions in Python."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import rpq_convert as rpq


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def converted(tmp_path, **how) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    rpq.convert(model, bits=4, **how)
    return model


def test_a_terminal_has_a_bar_and_a_log_has_none(tmp_path, monkeypatch):
    screen, log = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    converted(tmp_path)
    assert "converting" in screen.getvalue() and "8.19k" in screen.getvalue()  # both weights
    monkeypatch.setattr(sys, "stderr", log)
    converted(tmp_path)
    assert not log.getvalue()
    converted(tmp_path, progress=True)
    assert "converting" in log.getvalue()


@pytest.mark.parametrize("progress", [False, "a function"])
def test_no_bar_where_something_else_was_asked(tmp_path, monkeypatch, progress):
    screen, seen = Terminal(), []
    monkeypatch.setattr(sys, "stderr", screen)
    model = converted(tmp_path, progress=(lambda job, encoded: seen.append(job.name)) if progress else False)
    assert not screen.getvalue() and sorted(seen) == (["0.weight", "1.weight"] if progress else [])
    dense = rpq.restore(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    rpq.recalibrate(model, dense, [torch.randn(4, 64)], progress=False)
    assert not screen.getvalue()
