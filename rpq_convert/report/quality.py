"""What was measured of a model, in words."""

from __future__ import annotations

from collections.abc import Mapping

from rpq_convert.report.schema import Report

UNITS = {
    "language model": "tokens",
    "outputs": "outputs",
    "sentence pairs": "pairs",
}  # kind of an evaluation -> of its samples
WORDS = {  # metric -> what it says; `base` is the base's value, where there is one
    "perplexity": "perplexity {value:.4g}, the base's {base:.4g}",
    "ratio": "{value:.4g} times the base's",
    "kl": "divergence {value:.3g} nats per token",
    "top1_agreement": "the same first choice as the base in {percent:.1f} %",
    "cosine": "cosine to the base's outputs {value:.4f}",
    "relative_error": "relative squared error of the outputs {value:.3g}",
    "accuracy": "accuracy {value:.4f}, the base's {base:.4f}",
    "agreement": "the same as the base in {percent:.1f} %",
    "mean_difference": "mean difference from the base {value:.3g}",
    "correlation": "correlation with the base {value:.4f}",
    "spearman": "rank correlation with the scores {value:.4f}, the base's {base:.4f}",
}


def quality(report: Report) -> list[str]:
    """Return what was measured of the model, a line per evaluation."""
    return [
        f"{e['on']} ({e['samples']:,} {UNITS.get(e['kind'], e['kind'])}): {words(e['metrics'])}"
        for e in report.evaluations
    ]


def words(metrics: Mapping[str, float]) -> str:
    """Return the metrics of one evaluation as a sentence; names that are not known stay as they are."""
    said = []
    for name, value in metrics.items():
        base = metrics.get(f"base_{name}")
        known = WORDS.get(name, "") if base is not None or "{base" not in WORDS.get(name, "") else ""
        if known:
            said.append(known.format(value=value, base=base, percent=100 * value))
        elif name.removeprefix("base_") not in metrics or not name.startswith("base_"):
            said.append(f"{name.replace('_', ' ')} {value:.4f}")
    return "; ".join(said)
