"""How much of real models is covered, what their files weigh, and whether they reload exactly, as one Markdown page.

    python benchmarks/coverage.py > docs/models.md

Pretrained weights where a package has them, fitted by k-means; else a real architecture with random weights, whose codes are
random as well: coverage, sizes and reload do not depend on the values. Every file size is asserted to be the plan's.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from efficientnet import EfficientNetLite0, efficientnet_lite0
from real_models import minilm_folder, smollm2
from safetensors.torch import save_model
from torch import Tensor, nn

import rpq_convert as rpq
from rpq_convert.report.schema import Row
from rpq_convert.report.text import group

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the architectures that the tests convert
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
    yield Entry("all-MiniLM-L6-v2", lambda: transformers.AutoModel.from_pretrained(minilm_folder()), text)
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
        exact = same(model, loaded) and torch.equal(entry.outputs(model), entry.outputs(loaded))
    parameters = tuple(r for r in report.rows if r.decision != "buffer")
    cells = (
        entry.name, kind, "pretrained" if entry.pretrained else "random", f"{report.params:,}",
        f"{100 * report.covered:.2f} %", f"{before:,}", f"{after:,}", f"{before / after:.2f}x",
        "exact" if exact else "NOT EXACT", f"{seconds:.1f}",
    )  # fmt: skip
    return Result(cells, report.covered, parameters)


def reasons(result: Result) -> list[str]:
    """Return a table of what stayed dense: repeated names share a line, with all their shapes and sizes."""
    whole = sum(r.params for r in result.rows)
    left = [r for r in result.rows if r.decision == "dense"]
    merged: dict[tuple[str, str], list[Row]] = {}
    for r in left:
        key = re.sub(r"(?<![^.])\d+(?![^.])", "#", r.name), re.sub(r"[\d,]+", "#", r.reason)
        merged.setdefault(key, []).append(r)
    lines = [
        f"\n### {result.cells[0]}: {100 - 100 * result.covered:.2f} % stay dense in {len(left)} tensors\n",
        "| parameter | tensors | shape | share of all | why |", "|---|---:|---|---:|---|",
    ]  # fmt: skip
    for rows in sorted(merged.values(), key=lambda rows: -sum(r.params for r in rows)):
        name = ", ".join(f"`{g.name}`" for g in group(copy_without_shape(rows)))
        shapes = ", ".join(dict.fromkeys("x".join(map(str, r.shape)) for r in rows))
        why = "; ".join(dict.fromkeys(r.reason for r in rows))
        share = 100 * sum(r.params for r in rows) / whole
        lines.append(f"| {name} | {len(rows)} | {shapes} | {share:.3f} % | {why} |")
    return lines
