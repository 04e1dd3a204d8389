"""Throughput of a Ray cluster on this machine beside threads, and what machines of a cluster need, by arithmetic.

    python benchmarks/cluster.py                      # 1, 2 and 4 workers, 8 bits
    python benchmarks/cluster.py --table 75           # machines x models, from CPU seconds a billion parameters (benchmarks/scale.py)

Both convert the same synthetic checkpoint, one after the other, several times; the fastest of each is shown, since other work on the machine
only slows them. Workers of the cluster have imported torch and compiled kernels before: that is paid once a machine.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch

import rpq_convert as rpq
from benchmarks.scale import llama, write
from rpq_convert.showing import duration

MODELS = {
    "66B": (66e9, 9216 * 36864),
    "405B": (405e9, 16384 * 53248),
    "1T": (1e12, 1e9),
}  # parameters: of all, of the largest weight
MACHINES, CORES = (1, 4, 16, 64), 32
SOURCE_BYTES, RESULT_BYTES = 2, 1  # of a parameter: float16, 8 bits


def timed(source: Path, out: Path, executor: str, workers: int) -> float:
    """Return the seconds that a conversion takes."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    rpq.convert_checkpoint(source, out, bits=8, executor=executor, workers=workers, progress=False)
    return time.perf_counter() - began


def compare(repeats: int) -> None:
    """Print seconds of threads and of a cluster, side by side."""
    import ray

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        source, out = Path(place, "model"), Path(place, "out")
        source.mkdir()
        write(source, *llama(768, 1024, 1024, 4))
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        timed(source, out, "threads", 2)
        before = time.process_time()
        timed(source, out, "threads", 1)
        numbers = sum(f.stat().st_size for f in source.glob("*.safetensors")) / SOURCE_BYTES
        print(f"{(time.process_time() - before) / numbers * 1e9:.0f} CPU seconds a billion parameters")
        for _ in range(2):
            timed(source, out, "ray", 4)  # starts and warms the workers
        bytes_of = (out / "model.safetensors").read_bytes()
        print("workers  threads  cluster  throughput")
        for workers in (1, 2, 4):
            pairs = [[timed(source, out, how, workers) for how in ("threads", "ray")] for _ in range(repeats)]
            threads, cluster = (min(column) for column in zip(*pairs))
            print(f"{workers:>7} {threads:>6.1f} s {cluster:>6.1f} s  {threads / cluster:>9.2f}", flush=True)
            assert (out / "model.safetensors").read_bytes() == bytes_of
        ray.shutdown()


def table(seconds: float) -> None:
    """Print how long machines take where all weights are as large as the largest, and what their network and store must carry meanwhile.

    Args:
        seconds: CPU seconds for a billion parameters.
    """
    print(f"| machines of {CORES} cores | " + " | ".join(MODELS) + " | all read | all write |")
    print("|---:|" + "---|" * (len(MODELS) + 2))
    each = 1e9 / seconds  # parameters a second and core
    for machines in MACHINES:
        cores = machines * CORES
        took = [math.ceil(size / largest / cores) * largest / each for size, largest in MODELS.values()]
        rates = [f"{cores * each * b / 1e9:.1f} GB/s" for b in (SOURCE_BYTES, RESULT_BYTES)]
        print(f"| {machines} | " + " | ".join([*map(duration, took), *rates]) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", type=float, metavar="SECONDS", help="CPU seconds for a billion parameters")
    given = parser.parse_args()
    table(given.table) if given.table else compare(given.repeats)
