"""Training from random codes: docs/training.md, from the lines of docs/training.jsonl.

    python -m benchmarks.training rows --pictures DIR --text FILE          # every row of every task, where it stopped
    python -m benchmarks.training entanglement --pictures DIR --text FILE  # codebooks, lengths, kinds of layers
    python -m benchmarks.training cost                                     # seconds a step and peak memory of the rows; quiet machine
    python -m benchmarks.training memory                                   # ViT-B/16, ViT giant, OPT-6.7B: peak memory
    python -m benchmarks.training page                                     # writes the page

`--pictures`: Fashion-MNIST's four .gz files (apt-get download dataset-fashion-mnist; dpkg -x *.deb .); `--text`: tiny shakespeare.
One thread a run; `--jobs` runs go on side by side, which changes no figure but the seconds. A line is written after each run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.training import cost, memory, page, study
from benchmarks.training.tasks import TASKS


def main() -> None:
    asked = _arguments()
    if asked.what == "page":
        page.write(study.lines())
    elif asked.what == "cost":
        for line in cost.lines():
            study.add(line)
    elif asked.what == "memory":
        for line in memory.lines():
            study.add(line)
    else:
        tasks = [TASKS[name] for name in asked.task or TASKS]
        study.run(asked.what, tasks, asked.pictures, asked.text, asked.jobs, asked.wide)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "entanglement", "cost", "memory", "page"))
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--task", choices=TASKS, action="append", help="all by default")
    parser.add_argument("--wide", action="store_true", help="the second width of each task as well")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    return parser.parse_args()


if __name__ == "__main__":
    main()
