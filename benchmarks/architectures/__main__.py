"""Every model type of transformers, tiny and with random weights, converted and loaded in every way; writes docs/architectures.md.

    nice -n 19 python -m benchmarks.architectures [MODEL_TYPE …] [--again] [--page]

Each model type runs in a process of its own, with a limit of memory and of time, and becomes a line of docs/architectures.jsonl. What
is there is not run again, so a killed run goes on where it stopped; `--again` runs the named ones anew, `--page` writes the page
alone. Of each model type the class with the most parameters is the source; all others load its folder, where the dense one serves them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.architectures import classes, tiny, trial
from benchmarks.architectures.page import page
from rpq_convert.fit import line

RESULTS, PAGE = Path("docs/architectures.jsonl"), Path("docs/architectures.md")
MEMORY, SECONDS, PATIENCE = 6 * 2**30, 400, 3600  # bytes, of the processor, of the clock
Row = dict[str, Any]


def main() -> None:
    asked, known = _arguments(), _rows()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    line.PIECES = 64  # a rough fit: what is tried is the way of the tensors
    todo = [t for t in asked.types or _all() if asked.again or t not in known]
    if asked.page:
        todo = []
    if todo:
        _warm()
    for model_type in todo:
        row = _apart(model_type)
        print(f"{model_type}: {_short(row)}", flush=True)
        with RESULTS.open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")
    rows = _rows()  # another run may have added to them
    RESULTS.write_text("".join(json.dumps(rows[k]) + "\n" for k in sorted(rows)), "utf8")
    PAGE.write_text(page(list(rows.values()), len(_all()), transformers.__version__), "utf8")


def _warm() -> None:
    """Try one model type here: kernels, charts and imports are then there for every process that follows."""
    with tempfile.TemporaryDirectory() as place:
        for _ in _try("bert", Path(place)):
            pass
    gc.collect()
    gc.freeze()


def _all() -> list[str]:
    """Return all model types, mixed: a run that is not finished has seen some of every kind."""
    return sorted(transformers.CONFIG_MAPPING.keys(), key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--again", action="store_true", help="run what was run before")
    parser.add_argument("--page", action="store_true", help="run nothing")
    return parser.parse_args()


def _lines(path: Path) -> list[str]:
    return path.read_text("utf8").splitlines() if path.is_file() else []


def _rows() -> dict[str, Row]:
    """Return model type -> the last line of it."""
    return {row["type"]: row for line in _lines(RESULTS) for row in [json.loads(line)]}


def _apart(model_type: str) -> Row:
    """Try a model type in a process of its own; what it had found is kept where it is stopped."""
    with tempfile.TemporaryDirectory() as place:
        told, start = Path(place) / "told.jsonl", time.monotonic()
        child = os.fork()
        if child == 0:
            _in_child(model_type, Path(place), told)
        why = _wait(child, start)
        row: Row = {"type": model_type, "seconds": round(time.monotonic() - start), "steps": {}}
        for line in _lines(told):
            found = json.loads(line)
            row["steps"] |= found.pop("steps", {})
            row |= found
    return row | ({"stopped": why} if why else {})


def _wait(child: int, start: float) -> str:
    """Return why a process ended before it was done; an empty text where it was done."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            number = status & 127
            return f"ended by {signal.Signals(number).name}" if number else "" if status == 0 else "ended early"
        if time.monotonic() - start > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"not done in {PATIENCE} s"
        time.sleep(0.1)


def _in_child(model_type: str, place: Path, told: Path) -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with told.open("a", encoding="utf8", buffering=1) as file:
        code = 0
        try:
            for row in _try(model_type, place):
                file.write(json.dumps(row) + "\n")
        except BaseException:
            traceback.print_exc()
            code = 1
    sys.stderr.flush()
    os._exit(code)


def _try(model_type: str, place: Path) -> Any:
    """Yield what is found out about a model type, bit by bit."""
    try:
        kinds = classes.classes_of(config := tiny.tiny_config(model_type))
    except Exception as e:
        yield {"not_built": trial.said(e)}
        return
    if not kinds:
        yield {"not_built": "no model class of its own"}
        return
    built = []
    for kind in kinds:
        try:
            built.append((trial.size_of(kind, config), kind))
        except Exception as e:
            yield {"not_built": trial.said(e)}  # of the last one; gone where another is built
    for _, kind in sorted(built, key=lambda b: -b[0]):
        loaders = classes.loaders_of(config, kind)
        try:
            for step, seen in trial.try_class(kind, config, loaders, place):
                yield {"source": kind.__name__, "not_built": "", "steps": {step: seen}}
        except trial.NotBuilt as e:
            yield {"not_built": str(e)}
            continue
        return


def _short(row: Row) -> str:
    steps = row["steps"]
    bad = {k: v for k, v in steps.items() if v != "right"}
    told = f"{row.get('source')}, {len(steps) - len(bad)} of {len(steps)} right {bad or ''}"
    return f"{row['seconds']} s, {told if steps else row.get('not_built')} {row.get('stopped', '')}"


if __name__ == "__main__":
    main()
