"""Several commands write one output folder at once: one result each time, and it is one of those that were asked for.

Each race starts processes of the installed command at the same moment. Counted is how many ended well, how many were told who holds the folder
or that it exists, and what the folder then holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

import rpq_convert as rpq
from benchmarks.reliability.inject import content, net, whole

SEEDS = {"equal seeds": (0, 0), "other seeds": (0, 1), "other seeds, --overwrite": (0, 1)}
RUN = """
import sys
from benchmarks.reliability.inject import net
import rpq_convert as rpq
from rpq_convert.errors import FolderError
for line in sys.stdin:
    source, out, seed, overwrite = line.split()
    try:
        rpq.convert_checkpoint(source, out, factory=net, bits=4, grow=True, seed=int(seed), overwrite=overwrite == "1", progress=False)
        print("wrote it", flush=True)
    except FolderError as e:
        known = {"being written by": "was told who holds it", "exists": "was told that it exists"}
        print(next((said for part, said in known.items() if part in str(e)), f"FAULT {e}"), flush=True)
"""


def races(count: int) -> int:
    """Print what came of so many races of each kind; return how many went wrong."""
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "dense.safetensors")
        torch.manual_seed(0)
        save_file(net().state_dict(), source)
        wanted = {}
        for seed in (0, 1):
            rpq.convert_checkpoint(
                source, Path(scratch, f"seed{seed}"), factory=net, bits=4, grow=True, seed=seed, progress=False
            )
            wanted[seed] = content(Path(scratch, f"seed{seed}"))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
        }
        runners = [
            subprocess.Popen(
                [sys.executable, "-c", RUN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=os.getcwd(),
            )
            for _ in range(2)
        ]
        for kind, seeds in SEEDS.items():
            found: Counter[str] = Counter()
            for number in range(count):
                out = Path(scratch, f"{kind} {number}".replace(" ", "-").replace(",", ""))
                for runner, seed in zip(runners, seeds):
                    assert runner.stdin is not None
                    print(source, out, seed, int("overwrite" in kind), file=runner.stdin, flush=True)
                said = [runner.stdout.readline().strip() for runner in runners if runner.stdout is not None]
                found.update(said)
                held = whole(out) and any(content(out) == wanted[s] for s in seeds)
                result = "one result" if held else "no result" if not out.exists() else "a mixture"
                if "wrote it" not in said or list(Path(scratch).glob("*.partial*")):
                    result += " (FAULT)"
                found[result] += 1
                faults += result != "one result" or any("FAULT" in s for s in said)
            print(f"{kind}: {count} races; " + ", ".join(f"{n} {what}" for what, n in found.items()), flush=True)
        for runner in runners:
            assert runner.stdin is not None
            runner.stdin.close()
            runner.wait()
    return faults
