"""The check after a conversion to a folder: its base against what was written, saved in the folder's report and model card.

Whatever comes of it, the conversion is whole: weights are not touched, and what prevents a check is said in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rpq_convert.checkpoint.loading import load
from rpq_convert.checkpoint.metadata import add_evaluation
from rpq_convert.checkpoint.opening import Opened
from rpq_convert.core.results import Evaluation
from rpq_convert.errors import CalibrationError, EvaluateError
from rpq_convert.evaluation.check import quick_check
from rpq_convert.evaluation.pairs import evaluate_pairs
from rpq_convert.inputs.files import CALIBRATED, read_inputs
from rpq_convert.inputs.found import find_data
from rpq_convert.inputs.tables import is_pairs
from rpq_convert.report.schema import Report
from rpq_convert.report.verdict import SYNTHETIC
from rpq_convert.running.memory import available

Measure = Callable[..., Evaluation]
SPARE = 1.1  # of the weights' bytes, for what runs through them
MOST = 64  # samples of data to look at


def judged_on(
    opened: Opened,
    data: str | None = None,
    *,
    seen: str | None = None,
    samples: int | None = None,
    field: str | None = None,
) -> tuple[str, Measure]:
    """Return what a conversion is judged on, in words, and what measures it, for `check_folder`.

    Args:
        data: what was given to judge on: what `read_inputs` takes, or a table of scored pairs.
        seen: what was given to calibrate on, of which `samples` were taken; the others are judged on. Where there are none, pictures
            and tensors are those that the fit has seen; a model of tokens gets synthetic inputs.
        field: the column of texts in a table.
    """

    def read(file: str, skip: int = 0) -> list[Any]:
        some: dict[str, Any] = {"samples": MOST, "skip": skip, "labels": True, "field": field, **opened.options.hub}
        return read_inputs(file, opened.companions, model=opened.model, **some)

    if data is not None:
        name = Path(data).name
        if is_pairs(data):
            return name, lambda base, model, seconds: evaluate_pairs(
                base, model, opened.companions, Path(data), 512, None, None
            )[0]
        return name, partial(quick_check, data=read(data))
    if seen is not None:
        name, some = Path(seen).name, CALIBRATED if samples is None else samples
        with suppress(CalibrationError):
            if left := read(seen, skip=some):
                return f"{name} (held out)", partial(quick_check, data=left)
        if find_data(seen).kind not in ("texts", "hub"):
            return f"{name} (seen by the fit)", partial(quick_check, data=read(seen))
    return SYNTHETIC, quick_check


def check_folder(
    opened: Opened,
    folder: Path,
    report: Report,
    *,
    seconds: float,
    judge: Callable[[], tuple[str, Measure]] = lambda: (SYNTHETIC, quick_check),
    told: Callable[[str], None] | None = None,
) -> tuple[Report, str]:
    """Compare a folder that was just written with the checkpoint that it was made from.

    Args:
        seconds: what the check may take, loading both models included.
        judge: returns what is measured on, in words, and what measures it: a function of the base, the converted model and the seconds
            that are left. See `judged_on`.
        told: called with what is measured on.

    Returns:
        The report with what was found, which the folder's report and model card show from now on; and why nothing was found, in
        words, or an empty text.
    """
    if why := _needless(report) or _too_large(report):
        return report, why
    try:
        on, measure = judge()
        if told is not None:
            told(on)
        found = _measured(opened, folder, seconds, measure)
    except KeyboardInterrupt:
        return report, "interrupted"
    except Exception as e:  # models and their files raise what they like, and the conversion is done
        return report, (str(e).strip() or repr(e)).splitlines()[0]
    return add_evaluation(folder, on, found), ""


def _needless(report: Report) -> str:
    rows = [r for r in report.rows if r.decision == "rpq"]
    if not rows:
        return "nothing was converted"
    return "codes are random" if all(r.error is None for r in rows) else ""


def _too_large(report: Report) -> str:
    needed, left = SPARE * (report.dense_bytes + report.bytes), available()
    if left is None or needed <= left:
        return ""
    return f"the base and the result need {needed / 1e6:,.0f} MB of memory, and {left / 1e6:,.0f} MB are free"


def _measured(opened: Opened, folder: Path, seconds: float, measure: Measure) -> Evaluation:
    ends = time.monotonic() + seconds
    base = opened.give_filled().eval()
    _in_time(ends, seconds, "the base")
    model: nn.Module = load(folder, factory=opened.options.factory).eval()
    _in_time(ends, seconds, "both models")
    return measure(base, model, seconds=ends - time.monotonic())


def _in_time(ends: float, seconds: float, what: str) -> None:
    if (left := ends - time.monotonic()) <= 0:
        raise EvaluateError(f"loading {what} took {seconds - left:.0f} s; give more --check-seconds than {seconds:g}")
