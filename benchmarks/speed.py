"""Layers and whole models against dense ones and other quantized kernels, side by side in one run.

    pip install -e .[bench]
    python benchmarks/speed.py > docs/benchmarks.md           # all tables
    python benchmarks/speed.py [--one-thread] [linear|rotation|stack|shapes|small|embedding|conv|training|models|kmeans|cost …]
    python benchmarks/speed.py --model smollm2 --where        # where a token's time goes; also minilm, vit
    python benchmarks/speed.py --record [TABLE …]             # adds the figures to docs/speed.jsonl
    python benchmarks/speed.py --compare [TABLE …]            # says which figures moved since the last ones of this processor

Every table gives times as multiples of the first column's. Below 1 is faster. Times are medians over rounds in which the
contenders take turns. Each runs some times in a row, the first not counted: "same layer" means warm caches, `stack` runs 16
different layers in a row. `±` is half the distance between the quartiles: milliseconds of the dense layer, else of the ratio.
`--one-thread` measures the CPU time of one thread instead, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rpq_convert as rpq
from rpq_convert.hf import torchvision
from rpq_convert.kernels.jit.vectors import PROCESSOR
from rpq_convert.nn import RPQLinear

torchvision.fix()
from figures import Figure, append, compared, read, stamped  # noqa: E402

TOKENS = (1, 8, 64, 512)
clock = time.perf_counter
LONG = 0.02  # seconds from which on a call is timed once a round
Contenders = dict[str, Callable[[], object]]
measured: list[tuple[str, str, float, str]] = []  # rows, columns, values and units of the table that is being made
figures: list[Figure] = []  # of all tables


def measure(contenders: Contenders, *, rounds: int = 7, burst: int = 3) -> dict[str, tuple[float, float]]:
    """Return name -> (median, half the quartile distance) in seconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            long = clock() - start > LONG
            for _ in range(1 if long else burst):
                start = clock()
                call()
                times[name].append(clock() - start)
    found = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = (middle, (high - low) / 2)
    return found


def line(label: str, contenders: Contenders, **options: int) -> list[str]:
    """Return the cells of one row: the first contender in milliseconds, the rest as multiples of it."""
    found = measure(contenders, **options)
    first, *rest = found.values()
    measured.extend(
        (label, name, m / first[0] if i else 1e3 * m, f"of {next(iter(found))}" if i else "ms")
        for i, (name, (m, _)) in enumerate(found.items())
    )
    return [
        label,
        f"{first[0] * 1e3:.3g} ± {first[1] * 1e3:.2g} ms",
        *(f"{m / first[0]:.3f} ± {s / first[0]:.2g}" for m, s in rest),
    ]


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    figures.extend({"case": f"{title} | {row} | {name}", "value": v, "unit": unit} for row, name, v, unit in measured)
    measured.clear()
    print(f"\n## {title}\n\n| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


# ---- peers -------------------------------------------------------------------------------------------------------------


def peers(weight: Tensor, x: Tensor) -> Contenders:
    """torch's own quantized products of the same weight: int8 and int4 weight-only, dynamic int8."""
    outputs, inputs = weight.shape
    half = x.bfloat16()
    whole = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round().to(torch.int8)
    scales = (weight.abs().amax(1) / 127).bfloat16()
    aten = torch.ops.aten
    packed = aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1)
    groups = torch.randn(inputs // 32, outputs, 2).bfloat16()
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear_of(weight)), {nn.Linear}, torch.qint8)
    narrow = weight.bfloat16()
    return {
        "dense bf16": lambda: F.linear(half, narrow),
        "int8 weight-only": lambda: aten._weight_int8pack_mm(half, whole, scales),
        "int4 weight-only": lambda: aten._weight_int4pack_mm_for_cpu(half, packed, 32, groups),
        "int8 dynamic": lambda: dynamic(x),
    }


def linear_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def coded(outputs: int, inputs: int, dim: int, axis: str) -> nn.Module:
    """An RPQ layer: from dim 8 on a codebook for every block (float32), below one for all (float16, row scales)."""
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=False)
    if dim >= 8:
        count = (outputs if axis == "out" else inputs) // dim
        rpq.convert(layer, codebooks=count, axis=axis, fit="random", grow=True)
    else:
        rpq.convert(layer, dim=dim, axis=axis, fit="random")
    return layer.requires_grad_(False)


# ---- tables ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def linear() -> None:
    from rpq.nn import RPQLinear as SeedLinear  # the package RPQ-pytorch

    dims = [(d, a) for d in (2, 4, 8, 16, 64, 128) for a in ("in", "out")]
    for outputs, inputs in ((1024, 1024), (4096, 4096), (16384, 4096)):
        weight, rows = torch.randn(outputs, inputs), []
        layers = {f"dim {d} {a}": coded(outputs, inputs, d, a) for d, a in dims}
        old = {d: SeedLinear(inputs, outputs, inputs // d) for d in (8, 64)} if inputs == outputs else {}
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs)
            contenders: Contenders = {"dense fp32": lambda x=x, w=weight: F.linear(x, w), **peers(weight, x)}
            contenders |= {f"seed, dim {d}": lambda f=f, x=x: f(x) for d, f in old.items()}
            contenders |= {name: lambda m=m, x=x: m(x) for name, m in layers.items()}
            rows.append(line(str(tokens), contenders, rounds=5 if tokens == 512 else 9))
        table(f"Linear {outputs} x {inputs}, same layer", ["tokens", *contenders], rows)
    outputs = inputs = 4096
    narrow, rows = torch.randn(outputs, inputs).bfloat16(), []
    halves = {f"dim {d} {a}": coded(outputs, inputs, d, a).bfloat16() for d, a in dims}
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs).bfloat16()
        contenders = {"dense bf16": lambda x=x: F.linear(x, narrow)}
        contenders |= {name: lambda m=m, x=x: m(x) for name, m in halves.items()}
        rows.append(line(str(tokens), contenders, rounds=5))
    table("Linear 4096 x 4096, bfloat16 model", ["tokens", *contenders], rows)


@torch.no_grad()
def rotation() -> None:
    plain, turned, rows = nn.Linear(4096, 4096), nn.Linear(4096, 4096), []
    rpq.convert(plain, dim=8, axis="in", fit="random", grow=True)
    rpq.convert(turned, dim=8, axis="in", fit="random", grow=True, rotation=64)
    for tokens in TOKENS:
        x = torch.randn(tokens, 4096)
        contenders: Contenders = {"not rotated": lambda x=x: plain(x), "blocks of 64": lambda x=x: turned(x)}
        rows.append(line(str(tokens), contenders))
    table("Rotation of the inputs of Linear 4096 x 4096, dim 8 in", ["tokens", *contenders], rows)


@torch.no_grad()
def stack() -> None:
    side, rows = 4096, []
    weights = [torch.randn(side, side) for _ in range(16)]
    for tokens in (1, 8):
        x = torch.randn(tokens, side)
        others: dict[str, list[Callable[[], object]]] = {}
        for weight in weights:
            for name, call in peers(weight, x).items():
                others.setdefault(name, []).append(call)

        def all_of(calls: list[Callable[[], object]]) -> Callable[[], object]:
            return lambda: [call() for call in calls]

        contenders: Contenders = {"dense fp32": all_of([lambda w=w, x=x: F.linear(x, w) for w in weights])}
        contenders |= {name: all_of(calls) for name, calls in others.items() if name != "dense bf16"}
        for dim, axis in ((4, "in"), (8, "in"), (8, "out"), (16, "in"), (64, "in")):
            layers = [coded(side, side, dim, axis) for _ in weights]
            contenders[f"dim {dim} {axis}"] = all_of([lambda m=m, x=x: m(x) for m in layers])
        rows.append(line(str(tokens), contenders, rounds=5))
    table("16 different Linear 4096 x 4096 in a row", ["tokens", *contenders], rows)


@torch.no_grad()
def small() -> None:
    rows = []
    cuts = [(4, "in"), (8, "in"), (8, "out"), (16, "in"), (16, "out"), (64, "in")]
    for outputs, inputs in ((768, 768), (3072, 768), (768, 3072)):
        dense = linear_of(torch.randn(outputs, inputs))
        layers = {f"dim {d} {a}": coded(outputs, inputs, d, a) for d, a in cuts}
        for tokens in (1, 8, 64, 512):
            x = torch.randn(tokens, inputs)
            contenders: Contenders = {"dense fp32": lambda x=x, m=dense: m(x)}
            contenders |= {name: lambda m=m, x=x: m(x) for name, m in layers.items()}
            rows.append(line(f"{outputs} x {inputs}, {tokens} tokens", contenders, rounds=15, burst=5))
    table("Small layers", ["layer", *contenders], rows)


@torch.no_grad()
def shapes() -> None:
    """SmolLM2's layers as they are converted by default, one after another, so that no weight stays in the cache."""
    import whole_models as whole

    rows = []
    for outputs, inputs, count in ((576, 576, 48), (192, 576, 144), (1536, 576, 20), (576, 1536, 20), (49152, 576, 1)):
        dense = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for _ in range(count)).requires_grad_(False)
        found = whole.versions(dense, {k: w for k, w in whole.WAYS.items() if k != "4 bits"})
        for tokens in (1, 8):
            x = torch.randn(tokens, inputs)
            contenders: Contenders = {k: lambda m=m, x=x: [layer(x) for layer in m] for k, m in found.items()}
            rows.append(line(f"{outputs} x {inputs}, {tokens} tokens", contenders, rounds=5, burst=2))
    table("Layers of SmolLM2 in a row, as they are converted by default", ["layer", *contenders], rows)


@torch.no_grad()
def embedding() -> None:
    rows = []
    dense = nn.Embedding(50_000, 1024)
    layers = {}
    for dim in (1, 2, 4, 8, 64):
        with torch.device("meta"):
            layers[f"dim {dim}"] = nn.Embedding(50_000, 1024)
        rpq.convert(layers[f"dim {dim}"], dim=dim, fit="random")
    for tokens in (8, 512):
        index = torch.randint(0, 50_000, (tokens,))
        contenders: Contenders = {"nn.Embedding": lambda index=index: dense(index)}
        contenders |= {name: lambda m=m, index=index: m(index) for name, m in layers.items()}
        rows.append(line(str(tokens), contenders, rounds=25, burst=5))
    table("Embedding 50,000 x 1024", ["tokens", *contenders], rows)


@torch.no_grad()
def conv() -> None:
    rows = []
    for channels, outputs, kernel, side, images in (
        (64, 64, 3, 56, 8), (256, 256, 3, 14, 8), (512, 512, 3, 7, 8), (256, 256, 3, 14, 1), (256, 1024, 1, 14, 8),
        (1024, 256, 1, 14, 8),
    ):  # fmt: skip
        x = torch.randn(images, channels, side, side)
        dense = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
        contenders: Contenders = {"dense fp32": lambda x=x, m=dense: m(x)}
        for dim, axis in ((2, "out"), (8, "out"), (16, "out"), (4, "in"), (8, "in"), (16, "in")):
            layer = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
            rpq.convert(layer, dim=dim, axis=axis, fit="random", grow=True)
            contenders[f"dim {dim} {axis}"] = lambda x=x, m=layer: m(x)
        rows.append(
            line(f"{outputs} x {channels} x {kernel} x {kernel} at {side} x {side}, {images} images", contenders)
        )
    table("Conv2d", ["layer", *contenders], rows)


def step(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    layer(x).sum().backward()


def training() -> None:
    rows, side = [], 4096
    names = [(8, "in"), (8, "out"), (16, "in"), (16, "out")]
    for tokens in (64, 512):
        x = torch.randn(tokens, side, requires_grad=True)
        dense = nn.Linear(side, side)
        contenders: Contenders = {"dense fp32": lambda x=x, m=dense: step(m, x)}
        for dim, axis in names:
            layer = trained(dim, axis)
            contenders[f"dim {dim} {axis}"] = lambda x=x, m=layer: step(m, x)
        rows.append(line(str(tokens), contenders, rounds=5))
    for kind in ("dense", *(f"{d}-{a}" for d, a in names)):
        out = subprocess.run(
            [sys.executable, __file__, "--peak", kind], capture_output=True, text=True, check=True
        ).stdout
        rows.append([f"peak memory of a step at 512 tokens, {kind}", out.strip()] + [""] * len(names))
    table("Training step of Linear 4096 x 4096 (forward, backward, all gradients)", ["tokens", *contenders], rows)


def trained(dim: int, axis: str) -> nn.Module:
    if axis == "out":
        return RPQLinear(4096, 4096, num_codebooks=4096 // dim)
    layer = nn.Linear(4096, 4096)
    rpq.convert(layer, codebooks=4096 // dim, axis="in", fit="random", grow=True)
    return layer


def peak(kind: str) -> None:
    """Print how much resident memory a layer and one training step of it add, in MiB."""
    import re

    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    step(trained(8, "in"), torch.randn(64, 4096))  # kernels are loaded
    step(trained(8, "out"), torch.randn(64, 4096))
    step(nn.Linear(64, 64), torch.randn(64, 64))
    x = torch.randn(512, 4096, requires_grad=True)
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    layer = nn.Linear(4096, 4096) if kind == "dense" else trained(int(kind.split("-")[0]), kind.split("-")[1])
    for _ in range(3):
        step(layer, x)
    done.set()
    watcher.join()
    print(f"{(highest - before) / 1024:.0f} MiB")


@torch.no_grad()  # not inference_mode: what is kept between calls is kept for tensors made outside of it
def models() -> None:
    """Whole models as they are converted by default, and what their dense ones take."""
    import whole_models as whole

    rows = []
    prompt = torch.arange(100, 612)[None]
    for dtype in (torch.float32, torch.bfloat16):
        found, kind = whole.versions(whole.smollm2(dtype)), "bf16" if dtype is torch.bfloat16 else "fp32"
        if dtype is torch.float32:
            contenders: Contenders = {name: whole.writer(m, 32) for name, m in found.items()}
            rows.append(line("SmolLM2-135M writes 32 tokens, fp32", contenders, rounds=3, burst=1))
        contenders = {k: lambda m=m: m(prompt, use_cache=False, logits_to_keep=1) for k, m in found.items()}
        rows.append(line(f"SmolLM2-135M reads 512 tokens, {kind}", contenders, rounds=3, burst=1))
    for label, (model, use) in (("MiniLM, 32 sentences", whole.minilm()), ("ViT-B/16, 8 pictures", whole.vit())):
        rows.append(line(label, {k: use(m) for k, m in whole.versions(model).items()}, rounds=5, burst=1))
    table("Whole models", ["model", *contenders], rows)


@torch.no_grad()
def where(names: list[str]) -> None:
    """Print where the time of whole models goes."""
    import whole_models as whole

    for name in names:
        title, rows = whole.where_rows(name)
        table(title, whole.PARTS, rows)


def kmeans() -> None:
    from fit import HEAD, peers_table

    table("k-means, one codebook per block, N(0, 1) matrix 4096 x 256, CPU time of one thread, 25 iterations and codes",
          HEAD, peers_table(4096, 256))  # fmt: skip
    print("\nThe GEMM-rate limit is the time of all products that distances need, at the rate of torch's own.")


def cost() -> None:
    """Measure whole conversions, from a dense model in memory to a converted one, and scale them."""
    from real_models import smollm2

    rows = []
    for label, make in (
        ("SmolLM2-135M", lambda: smollm2()[0]),
        ("one Linear 4096 x 4096", lambda: nn.Sequential(nn.Linear(4096, 4096, bias=False))),
    ):
        for bits in (8, 4, 2):
            model = make()
            weights = sum(p.numel() for p in model.parameters())
            start = time.perf_counter()
            rpq.convert(model, preset=f"{bits}bit")
            seconds = time.perf_counter() - start
            rows.append(
                [
                    label,
                    str(bits),
                    f"{weights / 1e6:.1f} M",
                    f"{seconds:.1f} s",
                    f"{seconds / weights * 1e9 / 60:.1f} min",
                ]
            )
    table(
        "Cost of a conversion, wall time", ["model", "bits", "parameters", "measured", "per billion parameters"], rows
    )


TABLES = {
    f.__name__: f for f in (linear, rotation, stack, shapes, small, embedding, conv, training, models, kmeans, cost)
}


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; all by default")
    parser.add_argument("--one-thread", action="store_true", help="CPU time of one thread instead of wall time of all")
    parser.add_argument("--record", action="store_true", help="add the figures to docs/speed.jsonl")
    parser.add_argument("--compare", action="store_true", help="say what moved since this processor's last figures")
    parser.add_argument(
        "--model", choices=("smollm2", "minilm", "vit"), help="which model --where is about; all by default"
    )
    parser.add_argument("--where", action="store_true", help="where the time of whole models goes")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # a process of its own for a table's memory
    asked = parser.parse_args()
    if unknown := [name for name in asked.tables if name not in TABLES]:
        parser.error(f"no table {', '.join(unknown)}; tables: {', '.join(TABLES)}")
    if asked.peak:
        return peak(asked.peak)
    if asked.one_thread:
        torch.set_num_threads(1)
        clock = time.thread_time
    info = Path("/proc/cpuinfo").read_text()
    cpu = next(
        (c.split(":")[1].strip() for c in info.splitlines() if c.startswith("model name")), "an unknown processor"
    )
    cpu += f" ({PROCESSOR})"  # some say no more than "AMD EPYC"
    has = [
        name
        for name in ("avx2", "avx512f", "avx512_vbmi", "avx512_bf16", "amx_bf16", "avx512_fp16")
        if f" {name}" in info
    ]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    print(
        f"# Speed\n\nPrinted by `python benchmarks/speed.py > docs/benchmarks.md`: {torch.get_num_threads()} threads of {cpu} "
        f"with {', '.join(has)}, {memory} GiB, Python {platform.python_version()}, torch {torch.__version__}. "
        + __doc__.split("processor\n\n", 1)[1].strip()
        + "\n\n[What limits speed](speed-limits.md) explains the figures."
    )
    if asked.where:
        return where([asked.model] if asked.model else ["smollm2", "minilm", "vit"])
    for name in asked.tables or TABLES:
        TABLES[name]()
    threads = "CPU time of one" if asked.one_thread else str(torch.get_num_threads())
    found = stamped(figures, cpu, threads)
    if asked.compare:
        print("\n## Since the last figures of this processor\n", *compared(found, read()), sep="\n")
    if asked.record:
        append(found)


if __name__ == "__main__":
    main()
