"""How long the first product and the first fit take after an import, with compiled kernels cached and without.

    python benchmarks/startup.py
    python benchmarks/startup.py --kernels     # and which kernels were compiled

Each figure is of a new process that does nothing else. A cold one has an empty cache, as a fresh container has; wall seconds beside CPU
seconds, since a busy machine stretches the former.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

FIRST = {  # what a process does first
    "import": "",
    "first product": "RPQLinear(256, 256, num_codebooks=4)(torch.randn(1, 256))",
    **{
        f"first fit, {name}": f"rpq.convert(torch.nn.Sequential(torch.nn.Linear(512, 512)), progress=False, {options})"
        for name, options in (
            ("8 bits", "bits=8"),
            ("bits=4", "bits=4"),
            ("preset 4bit", "preset='4bit'"),
            ("preset 5bit", "preset='5bit'"),
        )
    },
}
SCRIPT = """
import gc, json, sys, time
began = time.perf_counter(), time.process_time()
import torch
torch.set_num_threads(1)
import rpq_convert as rpq
from rpq_convert.nn import RPQLinear
exec(sys.argv[1])
taken = time.perf_counter() - began[0], time.process_time() - began[1]
from numba.core.registry import CPUDispatcher
kernels = [k for k in gc.get_objects() if isinstance(k, CPUDispatcher)]
print(json.dumps([taken, {f"{k.py_func.__module__}.{k.py_func.__name__}": len(k.signatures) for k in kernels if k.signatures}]))
"""


def measured(what: str, cache: str) -> tuple[tuple[float, float], dict[str, int]]:
    """Return wall and CPU seconds since the start, and kernel -> specialisations, of a new process."""
    alone = {**os.environ, "NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, FIRST[what]], env=alone, capture_output=True, text=True, check=True
    )
    found: tuple[tuple[float, float], dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernels", action="store_true", help="name the kernels that were compiled, with their specialisations"
    )
    args = parser.parse_args()
    print(f"{'since the start':24} {'cold':>8} {'CPU':>8} {'cached':>8} {'CPU':>8}   seconds")
    for what in FIRST:
        with tempfile.TemporaryDirectory() as cache:
            (cold, kernels), (warm, _) = measured(what, cache), measured(what, cache)
        print(f"{what:24} {cold[0]:8.1f} {cold[1]:8.1f} {warm[0]:8.1f} {warm[1]:8.1f}", flush=True)
        if args.kernels:
            for name, count in sorted(kernels.items(), key=lambda item: -item[1]):
                print(f"  {count}  {name}")


if __name__ == "__main__":
    main()
