"""Verdicts: what was measured, in words, at levels that do not depend on who shows them."""

import math
from dataclasses import replace

import pytest

import rpq_convert as rpq
from rpq_convert.report.schema import Report, Row
from rpq_convert.report.verdict import SYNTHETIC, verdict

ROW = Row("a", "Linear", (1000, 1000), "float32", "rpq", "", 4_000_000, code_bytes=500_000, error=0.01)


def judged(metrics, on="test.txt", options=None, kind="language model", bytes=500_000):
    entry = {"on": on, "kind": kind, "samples": 100, "metrics": metrics}
    return verdict(Report("m", (replace(ROW, code_bytes=bytes),), evaluations=(entry,), options=options or {}))


@pytest.mark.parametrize(
    ("metrics", "level", "words"),
    [
        ({"perplexity": 30.2, "base_perplexity": 30.1, "ratio": 1.003}, "good", "perplexity is about 1.00x the base's on test.txt"),
        ({"ratio": 1.238}, "fair", "about 1.24x"),
        ({"ratio": 1.57}, "poor", "about 1.57x"),
        ({"ratio": 6337.2}, "ruined", "about 6,337x"),
        ({"ratio": math.inf}, "ruined", "not finite"),
        ({"ratio": math.nan}, "ruined", "not finite"),
        ({"cosine": 0.998, "relative_error": 0.004}, "good", "mean cosine of 0.998 with the base's"),
        ({"cosine": 0.7, "relative_error": 0.6}, "ruined", "0.7"),
        ({"cosine": 0.9, "relative_error": 0.1, "top1_agreement": 0.883}, "fair", "in 88.3 % of outputs"),
        ({"cosine": 0.9, "top1_agreement": 0.99, "accuracy": 0.5, "base_accuracy": 0.9}, "ruined", "accuracy is 0.5, the base's 0.9"),
        ({"cosine": 0.8, "spearman": 0.814, "base_spearman": 0.82}, "good", "rank correlation is 0.814, the base's 0.82"),
        ({"agreement": 0.5}, "poor", "in 50 %"),
        ({"mean_difference": 0.1, "relative_error": 0.3, "correlation": 0.95}, "fair", "correlation of 0.95"),
        ({"mean_difference": 0.1, "relative_error": 0.3}, "poor", "error of 0.3"),
    ],
)  # fmt: skip
def test_levels_and_sentences(metrics, level, words):
    found = judged(metrics)
    assert found.level == level and words in found.sentence, found
    assert bool(found.advice) == (level != "good")


def test_advice_names_what_was_not_done_and_what_it_gave():
    plain = judged({"ratio": 1.8}).advice
    assert "--calibrate self helps (at 4 bits it took SmolLM2-135M from 1.81x to 1.14x, here in about 1 min)" in plain
    assert "more bits (--bits 6: 1.06x)" in plain or "more bits (--bits 5.34: " in plain
    calibrated = judged({"ratio": 1.2}, options={"calibration": {"items": 8}}).advice
    assert "calibrate" not in calibrated and "rpq tune" in calibrated
    tuned = judged({"ratio": 1.2}, options={"calibration": {}, "tuning": {}}).advice
    assert "rpq tune" not in tuned and "more bits" in tuned
    assert "MiniLM" in judged({"cosine": 0.5}).advice
    assert judged({"ratio": 1.3}, bytes=1_000_000).advice  # at 8 bits there is nothing of this left to do


def test_data_counts_before_synthetic_inputs_and_the_last_first():
    def entry(on, ratio):
        return {"on": on, "kind": "language model", "samples": 9, "metrics": {"ratio": ratio}}

    entries = (entry("a.txt", 1.2), entry("b.txt", 1.3), entry(SYNTHETIC, 9.0))
    assert "1.30x the base's on b.txt" in verdict(Report("m", (ROW,), evaluations=entries)).sentence
    assert verdict(Report("m", (ROW,), evaluations=entries[2:])).level == "ruined"
    assert verdict(Report("m", (ROW,))) is None
    odd = {"on": "x", "kind": "else", "samples": 1, "metrics": {"unknown": 1.0}}
    assert verdict(Report("m", (ROW,), evaluations=(odd,))) is None


def test_a_ruined_model_is_a_warning_in_every_view():
    entry = {"on": SYNTHETIC, "kind": "language model", "samples": 9, "metrics": {"ratio": 6337.0}}
    report = rpq.Report("m", (ROW,), evaluations=(entry,))
    for view in (report.to_terminal(), report.to_markdown()):
        assert "has lost what it knew" in " ".join(view.split()) and "6,337x" in view
    assert "ruined" in report.to_html() and "6,337x" in report.to_html()  # as a box of its own
    good = rpq.Report("m", (ROW,), evaluations=({**entry, "metrics": {"ratio": 1.01}},))
    assert "warning" not in str(good) and "quality: good" in str(good)
