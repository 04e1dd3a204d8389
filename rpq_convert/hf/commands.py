"""The shell commands that make a converted folder again, from what its report says was asked.

A report's options hold the plan's record, and beside it `source` (where the checkpoint comes from, and what else was asked) and `later`
(what was done to the folder since: recalibration, tuning). No path of the machine that ran them is named.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpq_convert.showing import printable

BESIDE = ("source", "calibration", "tuning", "later")  # no options of a plan
MEASURED = "given"  # sensitivities were measured, as they are without being asked for


def commands(options: Mapping[str, Any], place: str) -> list[str]:
    """Return the commands in the order in which they were run; empty where they are not known, as of a model in memory.

    Args:
        options: of a report. place: the folder that the last one makes.
    """
    source, later = options.get("source"), options.get("later", ())
    steps = [
        s["options"] for s in later if s["command"] == "recalibrate"
    ]  # which put another calibration into the record
    calibrated = steps[0].get("calibration") if steps else options.get("calibration")
    given = (source or {}).get("asked", {})
    if not source or (calibrated and not given):  # a model in memory, or inputs from Python
        return []
    first = ["rpq", "convert", source["name"], *_of_plan(options), *_flags(given, ASKED)]
    made = [first + _flags(source, SOURCE)]
    outputs = [step["folder"] for step in later] + [place]
    for step, folder in zip(later, outputs):
        words = ["rpq", step["command"], step["base"], folder]
        made.append(
            words
            + _flags(step["options"], {k: f"--{k.replace('_', '-')}" for k in step["options"] if k != "calibration"})
        )
    return [printable(shlex.join([*words, "--out", out])) for words, out in zip(made, outputs)]


ASKED = {"calibrate": "--calibrate", "samples": "--samples", "text_field": "--text-field", "effort": "--effort"}
SOURCE = {k: f"--{k.replace('_', '-')}" for k in ("factory", "state_dict", "allow_pickle", "revision")}


def _of_plan(options: Mapping[str, Any]) -> list[str]:
    """Return the flags of a plan's record."""
    given = {k: v for k, v in options.items() if k not in BESIDE and (k, v) != ("seed", 0)}
    if (stages := given.pop("stages", None)) and (
        dim := given.pop("dim", None)
    ):  # together they are no flag of the command
        given["rules"] = [*(given.get("rules") or ()), {"match": "*", "dim": dim, "stages": stages}]
    if (sensitivity := given.pop("sensitivity", MEASURED)) != MEASURED:
        given["sensitivity"] = "shape" if sensitivity == "by shape" else sensitivity
    rules = given.pop("rules", None) or ()
    flags = _flags(given, {k: f"--{k.replace('_', '-')}" for k in given})
    return flags + [word for rule in rules for word in ("--rule", _rule(rule))]


def _flags(values: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    words: list[str] = []
    for key, flag in names.items():
        value = values.get(key)
        if value in (None, False, [], ()):
            continue
        many: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
        words += [flag] if value is True else [word for v in many for word in (flag, _text(v))]
    return words


def _text(value: Any) -> str:
    return (
        Path(value).name if str(value).endswith(".toml") else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _rule(rule: Mapping[str, Any]) -> str:
    settings = (f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in rule.items() if k != "match")
    return f"{rule['match']}:{','.join(settings)}"
