"""How long the first product and the first fit take after an import, with compiled kernels cached and without.

    python benchmarks/startup.py
    python benchmarks/startup.py --kernels     # and how long each kernel took to compile

Each figure is of a new process. A cold one has an empty cache, as a fresh container has; wall seconds beside CPU seconds, since a busy
machine stretches the former.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

SCRIPT = """
import json, time
began = time.perf_counter(), time.process_time()
found = {}

def note(what):
    found[what] = time.perf_counter() - began[0], time.process_time() - began[1]

import torch
torch.set_num_threads(1)
import rpq_convert as rpq
from rpq_convert.nn import RPQLinear
note("import")
layer = RPQLinear(256, 256, num_codebooks=4)
layer(torch.randn(1, 256))
note("first product")
for bits in (8, 4, 5.34):
    model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    rpq.convert(model, bits=bits, progress=False)
    note(f"first fit of {bits:g} bits")
from numba.core.registry import CPUDispatcher
import gc
kernels = [k for k in gc.get_objects() if isinstance(k, CPUDispatcher)]
times = {f"{k.py_func.__module__}.{k.py_func.__name__}": len(k.signatures) for k in kernels if k.signatures}
print(json.dumps([found, times]))
"""


def measured(cache: str) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Return what -> (wall seconds, CPU seconds) since the start, and kernel -> specialisations, of a new process."""
    alone = {**os.environ, "NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=alone, capture_output=True, text=True, check=True)
    found: tuple[dict[str, tuple[float, float]], dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernels", action="store_true", help="name the kernels that were compiled, with their specialisations"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        (cold, kernels), (warm, _) = measured(cache), measured(cache)
    print(f"{'since the start':24} {'cold':>8} {'CPU':>8} {'cached':>8} {'CPU':>8}   seconds")
    for what, (wall, cpu) in cold.items():
        print(f"{what:24} {wall:8.1f} {cpu:8.1f} {warm[what][0]:8.1f} {warm[what][1]:8.1f}")
    print(f"{len(kernels)} kernels, {sum(kernels.values())} specialisations")
    if args.kernels:
        for name, count in sorted(kernels.items(), key=lambda item: -item[1]):
            print(f"  {count}  {name}")


if __name__ == "__main__":
    main()
