"""Speed figures on record: one JSON line per figure, and a comparison with the last one of the same processor.

A line holds `date`, `commit`, `processor`, `threads`, `case` (table, row and column), `value` and `unit`: milliseconds for the
first column of a table, multiples of the first column for the others.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
FILE = Path(__file__).resolve().parent.parent / "docs" / "speed.jsonl"


def stamped(figures: Iterable[Figure], processor: str, threads: str) -> list[Figure]:
    """Return figures (`case`, `value`, `unit`) with what they depend on."""
    command = ["git", "-C", str(FILE.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    common = {"date": date.today().isoformat(), "commit": commit, "processor": processor, "threads": threads}
    return [{**common, **figure} for figure in figures]


def read(file: Path = FILE) -> list[Figure]:
    return [json.loads(line) for line in file.read_text("utf8").splitlines()] if file.exists() else []


def append(figures: Sequence[Figure], file: Path = FILE) -> None:
    with file.open("a", encoding="utf8") as out:
        out.writelines(json.dumps(figure, ensure_ascii=False) + "\n" for figure in figures)


def compared(now: Sequence[Figure], before: Sequence[Figure], tolerance: float = 0.1) -> list[str]:
    """Return a line per figure that moved by more than `tolerance`, slower ones first, and a summary."""
    keys = ("processor", "threads", "case", "unit")
    last = {tuple(f[k] for k in keys): f for f in before}
    pairs = [(f, last[key]) for f in now if (key := tuple(f[k] for k in keys)) in last]
    moved = [(new["value"] / old["value"] - 1, new, old) for new, old in pairs if old["value"]]
    lines = [
        f"{change:+.0%}  {new['case']}: {old['value']:.3g} {old['unit']} ({old['date']}, {old['commit']}), now {new['value']:.3g}"
        for change, new, old in sorted(moved, key=lambda m: -m[0])
        if abs(change) > tolerance
    ]
    return [
        *lines,
        f"{len(lines)} of {len(moved)} figures moved by more than {tolerance:.0%}; {len(now) - len(pairs)} have no figure before",
    ]
