"""Effort: whether a conversion fits layers to their weights alone or to their inputs too, and about what that costs.

Below 6 bits calibration keeps far more than weights alone do (`configs/quality.json`), so it is what happens unless it takes long, or
cannot be done. What was chosen, and why, is said before anything slow begins.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rpq_convert.checkpoint.opening import Opened
from rpq_convert.conversion.options import BEST, FAST, GOOD
from rpq_convert.errors import FolderError, PlanError
from rpq_convert.inputs.synthetic import own_kind, writes_text
from rpq_convert.planning.plan import Plan
from rpq_convert.report import measured
from rpq_convert.running.memory import available
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.showing import duration
from rpq_convert.storage.records import PLAN
from rpq_convert.storage.swap import work_of
from rpq_convert.tuning.options import TuneOptions

ENOUGH = 6  # code bits from which weights alone are enough
PATIENCE = 600  # seconds that a default may take
COPIES = 1.2  # of the dense weights: they are mapped, so that less does, but then they are read from the disk again and again
REFERENCE = 50e9  # operations per second of the products where `configs/quality.json` was measured
SLOWER = 2  # a reproducible fit, about: docs/reliability.md
SIDE, TIMES = 512, 5  # of the product that this machine's rate is measured by


@dataclass(frozen=True)
class Chosen:
    """The effort that a conversion takes.

    Args:
        effort: `fast`, `good` or `best`.
        said: what it is, what it costs, and why no other, in a line; empty where nothing was to be chosen.
        tuning: how `best` is tuned.
    """

    effort: str
    said: str = ""
    tuning: TuneOptions = TuneOptions()


def begun(folder: Path) -> str | None:
    """Return the effort of an unfinished run into this folder, which goes on with it; None where there is none."""
    plan = work_of(folder) / PLAN
    if not plan.is_file():
        return None
    try:
        options = read_json(plan, kinds.PLAN, FolderError)["options"]
    except FolderError:  # what is damaged is said where the run goes on
        return None
    return GOOD if "calibration" in options else FAST


def steps_for(bits: float) -> TuneOptions:
    """Return how a model of these code bits is tuned: what `configs/quality.json` was measured with."""
    if bits < 2.5:
        return TuneOptions(steps=400, recode=0.0005)
    return TuneOptions(steps=200 if bits < 3.5 else 100)


def choose(asked: str | None, opened: Opened, plan: Plan, *, given: str = "") -> Chosen:
    """Return the effort for a plan.

    Args:
        asked: by the user, or None. given: the data to calibrate on, in words.

    Raises:
        PlanError: calibration was asked for and cannot be done.
    """
    fitted = [job for job in plan.jobs if not job.is_random]
    weights = sum(math.prod(job.shape) for job in fitted)
    bits = sum(job.spec.bits * math.prod(job.shape) for job in fitted) / weights if weights else ENOUGH
    if not fitted:
        return Chosen(FAST)
    if any(job.reproducible for job in fitted):
        about = _about(SLOWER * _seconds(opened, weights, bits, FAST))
        return Chosen(FAST, f"effort fast: weights alone, reproducible, about {about}")
    why = "" if given else _cannot(opened, search=asked is not None)
    if asked in (GOOD, BEST) and why:
        raise PlanError(f"effort {asked} needs inputs, and {why}; give some to calibrate on, or take effort fast")
    costs = {effort: _seconds(opened, weights, bits, effort) for effort in (FAST, GOOD, BEST)}
    if asked == FAST or (asked is None and not given and bits >= ENOUGH):
        return Chosen(FAST, f"effort fast: weights alone, about {_about(costs[FAST])}")
    if asked is None and not given:
        why = why or _too_large(opened)
        if not why and costs[GOOD] > PATIENCE:
            why = f"--effort good would take about {_about(costs[GOOD])}"
        if why:
            return Chosen(FAST, f"effort fast: weights alone, about {_about(costs[FAST])}, as {why}")
    effort = asked or GOOD
    on = f"calibrated on {given or 'synthetic inputs'}" + (" and tuned" if effort == BEST else "")
    other = "" if given else f"; --effort fast takes about {_about(costs[FAST])}"
    return Chosen(effort, f"effort {effort}: {on}, about {_about(costs[effort])}{other}", steps_for(bits))


def _cannot(opened: Opened, *, search: bool) -> str:
    """Say why synthetic inputs cannot be made; by default none are made that the model must be tried on."""
    model = opened.model
    if model is None or own_kind(model, search=search):
        return ""
    return f"synthetic inputs of {type(model).__name__} cannot be made"


def _too_large(opened: Opened) -> str:
    dense = sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in opened.slots())
    left = available()
    if left is None or COPIES * dense <= left:
        return ""
    return f"calibration needs about {COPIES * dense / 1e9:.1f} GB of memory, and {left / 1e9:.1f} GB are free"


def _seconds(opened: Opened, weights: int, bits: float, effort: str) -> float:
    """Return about how long fits take: what a known model took, by the number of weights and the rate of this machine."""
    model = "smollm2" if opened.model is not None and writes_text(opened.model) else "minilm"
    how = {FAST: measured.FAST, GOOD: measured.SELF, BEST: measured.TUNED}[effort]
    known = [r for r in measured.rows() if r.effort == how and not r.coded]  # these were measured on a quiet machine
    rows = [r for r in known if r.model == model] or [r for r in known if r.model == "smollm2"]
    row = min(rows, key=lambda r: abs(r.bits - bits))
    share = weights / measured.models()[row.model]["parameters"]
    return 60 * row.minutes * share * REFERENCE / rate()


def rate() -> float:
    """Return the operations per second of a product on this machine, as busy as it is."""
    a = torch.ones(SIDE, SIDE)
    took = []
    for _ in range(TIMES):
        began = time.perf_counter()
        a @ a
        took.append(time.perf_counter() - began)
    return 2 * SIDE**3 / max(min(took), 1e-6)


def _about(seconds: float) -> str:
    """Return an estimate: tens of seconds, or minutes."""
    return duration(max(1.0, round(seconds, -1) if 15 < seconds < 100 else seconds))
