"""The verdict: what a conversion has lost, in words, and what helps. It is derived from a report's evaluations, never stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rpq_convert.report import measured
from rpq_convert.report.measured import DATA, FAST, SELF, TUNED
from rpq_convert.report.schema import Report

GOOD, FAIR, POOR, RUINED = LEVELS = ("good", "fair", "poor", "ruined")
SYNTHETIC = "synthetic inputs"  # what an evaluation was measured on, where nothing was given


@dataclass(frozen=True)
class Judged:
    """How a metric is judged.

    Args:
        limits: the values up to which a model is good, fair and poor; falling where more is better.
        words: of the metric, with `value` and the base's value in it.
        base: the metric of the base that the value is compared with: judged is then what is lost.
        model: the known model whose figures advice is taken from.
    """

    limits: tuple[float, float, float]
    words: str
    base: str = ""
    model: str = ""


# The first that an evaluation has decides. docs/decisions.md says what the limits come from.
METRICS = {
    "ratio": Judged((1.1, 1.5, 4.0), "perplexity is about {times}x the base's", model="smollm2"),
    "accuracy": Judged((0.01, 0.05, 0.25), "accuracy is {value:.3g}, the base's {base:.3g}", "base_accuracy", "vit"),
    "spearman": Judged(
        (0.01, 0.05, 0.25), "rank correlation is {value:.3g}, the base's {base:.3g}", "base_spearman", "minilm"
    ),
    "top1_agreement": Judged(
        (0.95, 0.8, 0.4), "the first choice is the base's in {percent:.3g} % of outputs", model="vit"
    ),
    "agreement": Judged((0.95, 0.8, 0.4), "outputs are the base's in {percent:.3g} %"),
    "cosine": Judged((0.98, 0.9, 0.75), "outputs have a mean cosine of {value:.3g} with the base's", model="minilm"),
    "correlation": Judged((0.98, 0.9, 0.75), "outputs have a correlation of {value:.3g} with the base's"),
    "relative_error": Judged((0.04, 0.2, 0.5), "outputs have a relative squared error of {value:.2g}"),
}


@dataclass(frozen=True)
class Verdict:
    """What a conversion has lost.

    Args:
        level: `good`, `fair`, `poor` or `ruined`.
        sentence: what was measured, e.g. "perplexity is about 1.57x the base's on synthetic inputs".
        advice: what helps, and about how much; empty for a good model.
    """

    level: str
    sentence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.level}: {self.sentence}" + (f"; {self.advice}" if self.advice else "")


def verdict(report: Report) -> Verdict | None:
    """Return the verdict on a converted model; None where nothing was measured that says it.

    What was measured on data counts before what was measured on synthetic inputs, and what was measured last first.
    """
    entries = sorted(report.evaluations, key=lambda e: e["on"] != SYNTHETIC)
    for entry in reversed(entries):
        name = next((name for name in METRICS if name in entry["metrics"]), None)
        if name is not None:
            level = _level(METRICS[name], entry["metrics"], name)
            return Verdict(level, _sentence(name, entry), "" if level == GOOD else _advice(report, name))
    return None


def _level(judged: Judged, metrics: Mapping[str, float], name: str) -> str:
    value = metrics[name]
    if judged.base:
        value = metrics.get(judged.base, math.nan) - value
    if not all(map(math.isfinite, metrics.values())):
        return RUINED
    falling = judged.limits[0] > judged.limits[-1]
    passed = sum(value < limit if falling else value > limit for limit in judged.limits)
    return LEVELS[passed]


def _sentence(name: str, entry: Mapping[str, Any]) -> str:
    metrics = entry["metrics"]
    value = metrics[name]
    if not all(map(math.isfinite, metrics.values())):
        return f"outputs are not finite on {entry['on']}"
    shown = {
        "value": value,
        "percent": 100 * value,
        "base": metrics.get(METRICS[name].base, 0.0),
        "times": times(value),
    }
    return f"{METRICS[name].words.format(**shown)} on {entry['on']}"


def times(ratio: float) -> str:
    """Return a multiple in as many digits as mean something: 1.07, 4.3, 6,337."""
    return f"{ratio:.2f}" if ratio < 4 else f"{ratio:.1f}" if ratio < 20 else f"{ratio:,.0f}"


def _advice(report: Report, name: str) -> str:
    """Return what helps a model that has lost something, with the figures of the known model that is most like it."""
    bits, calibrated, tuned = code_bits(report), "calibration" in report.options, "tuning" in report.options
    model, coded = METRICS[name].model, report.held_bytes > report.bytes
    said = []
    if not calibrated and bits < 6:
        said.append(f"--calibrate self helps{_measured(model, bits, FAST, SELF, coded, report.params)}")
    if not tuned and bits < 5 and (calibrated or bits < 3):
        said.append(f"text or pictures like yours and rpq tune help more{_measured(model, bits, SELF, TUNED, coded)}")
    if bits < 8:
        said.append(f"so do more bits{_more(model, bits)}")
    return ", ".join(said) or "give --check-data to measure on your own data"


def code_bits(report: Report) -> float:
    """Return the mean code bits of the converted weights."""
    rows = [r for r in report.rows if r.decision == "rpq"]
    weights = sum(r.params for r in rows)
    return 8 * sum(r.code_bytes for r in rows) / weights if weights else 8.0


def _measured(model: str, bits: float, before: str, after: str, coded: bool, parameters: int = 0) -> str:
    """Return figures of a known model before and after, in brackets; empty where there are none."""
    if not model:
        return ""
    known = measured.nearest(model, bits)
    a, b = (measured.row(model, known, effort, coded=coded) for effort in (before, after))
    if a is None or b is None:
        return ""
    title = measured.models()[model]
    minutes = b.minutes * parameters / title["parameters"]
    last = f", here in about {max(1, round(minutes)):,} min" if parameters else ""
    return (
        f" (at {known:g} bits it took {title['name']} from {_value(model, a.value)} to {_value(model, b.value)}{last})"
    )


def _more(model: str, bits: float) -> str:
    known = measured.rows() if model else ()
    for effort in (FAST, DATA):
        better = [r for r in known if r.model == model and r.effort == effort and r.bits > bits + 0.5]
        if better:
            best = min(better, key=lambda r: (r.bits, not r.coded))
            return f" (--bits {best.bits:g}: {_value(model, best.value)})"
    return ""


def _value(model: str, value: float) -> str:
    metric = measured.models()[model]["metric"]
    return f"{times(value)}x" if metric == "ratio" else f"{value:.2f}" if metric == "cosine" else f"{100 * value:.0f} %"
