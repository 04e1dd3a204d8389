"""Quality against bytes, tool by tool, on real models; writes docs/quality.md and its pictures.

    python -m benchmarks.quality --fit-text VALID --test-text TEST --pairs STSB_CSV --wordnet DATA [--tasks …] [--only PEER …]

VALID and TEST: WikiText-2's validation and test part as plain text; STSB_CSV: STS-B's English test pairs; DATA: WordNet's folder.
What tools fit on comes from VALID, and for the encoder from WordNet's sentences as well. A finished cell (task, tool, settings)
is a line of docs/quality.jsonl and is not run again, so a killed run goes on where it stopped; `--again` measures the chosen
cells anew, `--retry` those that failed, and `--tasks` with no name writes the page alone. Each tool runs in its own process and
environment (made under --work on first use). Run from the root of a checkout with `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.quality import peers
from benchmarks.quality.environments import CannotInstall, python_of
from benchmarks.quality.sources import Sources
from benchmarks.quality.table import document, pictures
from benchmarks.quality.tasks import TASKS
from rpq_convert.conversion.effort import rate

PEERS = sorted(p.stem for p in Path(peers.__path__[0]).glob("*.py") if p.stem != "__init__")
Row = dict[str, Any]


def main() -> None:
    asked = _arguments()
    rows = {_key(r): r for line in _lines(asked.results) for r in [json.loads(line)]}
    sources = Sources(asked.fit_text, asked.test_text, asked.pairs, asked.wordnet, asked.pictures)
    for task in asked.tasks:
        cells = [
            {"task": task, "peer": p, "settings": s}
            for p in asked.only
            for s in import_module(f"benchmarks.quality.peers.{p}").SETTINGS.get(task, [])
        ]
        for cell in cells:
            known = rows.get(_key(cell))
            if known and not asked.again and not (asked.retry and "error" in known):
                continue
            folder = _prepared(task, asked.work, sources)
            rows[_key(cell)] = row = {**cell, **_run(cell, folder, asked)}
            print(json.dumps(row), file=sys.stderr, flush=True)
            with asked.results.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
    asked.results.write_text("".join(json.dumps(rows[k]) + "\n" for k in sorted(rows)), "utf8")
    asked.output.write_text(document(list(rows.values())), "utf8")
    for name, picture in pictures(list(rows.values())).items():
        (asked.output.parent / name).write_text(picture, "utf8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit-text", type=Path)
    parser.add_argument("--test-text", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--wordnet", type=Path, help="folder of WordNet's data files")
    parser.add_argument("--pictures", type=Path, help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument(
        "--tasks", nargs="*", default=list(TASKS), metavar="TASK", help=f"{', '.join(TASKS)}; none: the page alone"
    )
    parser.add_argument("--only", nargs="+", choices=PEERS, default=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--again", action="store_true", help="measure cells that are there anew")
    parser.add_argument("--retry", action="store_true", help="run cells that failed once more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60, help="minutes that a tool may take")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="models, environments")
    parser.add_argument("--results", type=Path, default=Path("docs/quality.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/quality.md"))
    asked = parser.parse_args()
    if unknown := [t for t in asked.tasks if t not in TASKS]:
        parser.error(f"no task {', '.join(unknown)}; tasks: {', '.join(TASKS)}")
    asked.work = asked.work.absolute()
    return asked


def _lines(file: Path) -> list[str]:
    return file.read_text("utf8").splitlines() if file.exists() else []


def _key(cell: Row) -> str:
    return f"{cell['task']} {cell['peer']} {json.dumps(cell['settings'], sort_keys=True)}"


def _prepared(task: str, work: Path, sources: Sources) -> Path:
    """Return the task's folder, made whole or not at all."""
    folder = work / "tasks" / task
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            TASKS[task].prepare(Path(partial), sources)
            Path(partial).rename(folder)
            Path(partial).mkdir()  # for the context manager to remove
    return folder


def _run(cell: Row, folder: Path, asked: argparse.Namespace) -> Row:
    """Return what a cell costs and keeps, or why it could not be run."""
    tool = import_module(f"benchmarks.quality.peers.{cell['peer']}")
    try:
        python = python_of(tool.ENVIRONMENT, asked.work)
    except CannotInstall as e:
        return {"error": f"cannot be installed: {e}"}
    with tempfile.TemporaryDirectory(dir=asked.work) as out:
        command = [
            python, "-m", "benchmarks.quality.compress",
            str(folder), cell["task"], cell["peer"], json.dumps(cell["settings"]), out,
        ]  # fmt: skip
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(asked.threads), "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 * asked.limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {asked.limit:g} minutes"}
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
        facts = json.loads((Path(out) / "facts.json").read_text()) | {"rate": rate()}
        model = TASKS[cell["task"]].load(folder)
        model.load_state_dict(load_file(Path(out) / "weights.safetensors"))
    metrics = TASKS[cell["task"]].measure(model, folder)
    del model
    gc.collect()
    return {**facts, "threads": asked.threads, "metrics": metrics}


if __name__ == "__main__":
    main()
