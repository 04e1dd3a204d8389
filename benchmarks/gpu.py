"""RPQ on a GPU against dense layers, side by side in one run; to be run by hand where there is one.

    pip install -e .[bench] triton
    python benchmarks/gpu.py [linear|decode|embedding|training …]    # all of them by default

Linear layers: time as a multiple of `F.linear` in the same dtype, medians by CUDA events. Below 1 is faster. A launch costs
time on the CPU, which a small layer waits for; `graph` columns replay a CUDA graph, without it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rpq_convert as rpq

TOKENS = (1, 8, 64, 512, 4096)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CUTS = [(d, a) for d in (2, 4, 8, 16, 64) for a in ("in", "out")]


def seconds(call: Callable[[], object], rounds: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call as a CUDA graph's replay."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n## {title}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def coded(outputs: int, inputs: int, dim: int, axis: str, dtype: torch.dtype) -> nn.Module:
    """An RPQ layer: from dim 8 on a codebook for every block, below one for all (row scales)."""
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    if dim >= 8:
        count = (outputs if axis == "out" else inputs) // dim
        rpq.convert(layer, codebooks=count, axis=axis, fit="random", grow=True)
    else:
        rpq.convert(layer, dim=dim, axis=axis, fit="random")
    return layer.cuda().requires_grad_(False)


@torch.no_grad()
def linear() -> None:
    for outputs, inputs in ((4096, 4096), (16384, 4096)):
        for dtype in DTYPES:
            weight = torch.randn(outputs, inputs, device="cuda", dtype=dtype)
            layers = {f"dim {d} {a}": coded(outputs, inputs, d, a, dtype) for d, a in CUTS}
            for way, wrap in (("", lambda call: call), (", graph", graphed)):
                rows = []
                for tokens in TOKENS:
                    x = torch.randn(tokens, inputs, device="cuda", dtype=dtype)
                    dense = seconds(wrap(lambda x=x, weight=weight: F.linear(x, weight)))
                    times = [seconds(wrap(lambda m=m, x=x: m(x))) for m in layers.values()]
                    rows.append([str(tokens), f"{dense * 1e6:.1f} us", *(f"{t / dense:.2f}" for t in times)])
                table(f"Linear {outputs} x {inputs}, {dtype}{way}", ["tokens", "dense", *layers], rows)


@torch.no_grad()
def decode() -> None:
    rows = []
    for dim, axis in CUTS:
        times = [seconds(coded(4096, 4096, dim, axis, dtype).weight_rpq) for dtype in DTYPES]
        speeds = [f"{4096 * 4096 * dtype.itemsize / t / 1e9:.0f}" for t, dtype in zip(times, DTYPES)]
        rows.append([f"dim {dim} {axis}", *speeds])
    table("Decoding 4096 x 4096, GB/s written", ["cut", *map(str, DTYPES)], rows)


@torch.no_grad()
def embedding() -> None:
    rows, dense = [], nn.Embedding(50_000, 1024, device="cuda", dtype=torch.float16)
    layers = {}
    for dim in (2, 4, 8, 64):
        with torch.device("meta"):
            layers[f"dim {dim}"] = nn.Embedding(50_000, 1024, dtype=torch.float16)
        rpq.convert(layers[f"dim {dim}"], dim=dim, fit="random")
        layers[f"dim {dim}"].cuda()
    for tokens in (8, 512, 8192):
        index = torch.randint(0, 50_000, (tokens,), device="cuda")
        first = seconds(lambda index=index: dense(index))
        times = [seconds(lambda m=m, index=index: m(index)) for m in layers.values()]
        rows.append([str(tokens), f"{first * 1e6:.1f} us", *(f"{t / first:.2f}" for t in times)])
    table("Embedding 50,000 x 1024, float16", ["tokens", "nn.Embedding", *layers], rows)


def training() -> None:
    def measure(layer: nn.Module, x: Tensor) -> tuple[float, float]:
        def step() -> None:
            layer.zero_grad()
            layer(x).sum().backward()

        took = seconds(step, 10)
        layer.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return took, (torch.cuda.max_memory_allocated() - before) / 2**20

    rows = []
    for tokens in (64, 512, 4096):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dense, room = measure(nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16), x)
        row = [str(tokens), f"{dense * 1e6:.1f} us, {room:.0f} MiB"]
        for dim, axis in CUTS:
            took, room = measure(coded(4096, 4096, dim, axis, torch.bfloat16).train().requires_grad_(True), x)
            row.append(f"{took / dense:.2f}, {room:.0f} MiB")
        rows.append(row)
    head = ["tokens", "dense", *(f"dim {d} {a}" for d, a in CUTS)]
    table("Training step of Linear 4096 x 4096, bfloat16: time, memory that a step adds at its peak", head, rows)


TABLES = {f.__name__: f for f in (linear, decode, embedding, training)}


def main(names: list[str]) -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no CUDA device here, so there is nothing to measure")
    print(f"# GPU\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name in names or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
