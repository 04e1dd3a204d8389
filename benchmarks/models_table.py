"""Real models, converted: how much is covered, what the files weigh, whether they reload exactly.

    python benchmarks/models_table.py > docs/models.md

Pretrained weights where a package has them, else the real architecture with random ones. Every file size is asserted to be
the plan's; "reload" compares every tensor of the reloaded model, bit for bit.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
from efficientnet import EfficientNetLite0, efficientnet_lite0
from real_models import minilm_folder, smollm2
from torch import nn

import rpq_convert as rpq
from rpq_convert.report.schema import Row
from rpq_convert.report.text import group

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import transformers
import vit_pytorch
from architectures import ARCHITECTURES
from torchvision.models import resnet50

PRESET, WIDTH = "4bit", 512


def vit() -> nn.Module:
    return vit_pytorch.ViT(
        image_size=224, patch_size=16, num_classes=1000, dim=768, depth=12, heads=12, mlp_dim=3072
    ).eval()


def models() -> Iterator[tuple[str, str, nn.Module, Callable[[], nn.Module] | None]]:
    """Yield (name, weights, model, factory to reload it where transformers has none)."""
    yield "all-MiniLM-L6-v2", "pretrained", transformers.AutoModel.from_pretrained(minilm_folder()).eval(), None
    yield "SmolLM2-135M-Instruct", "pretrained", smollm2()[0], None
    yield "EfficientNet-Lite0", "pretrained", efficientnet_lite0(), EfficientNetLite0
    yield "ResNet-50 (torchvision)", "random", resnet50().eval(), resnet50
    yield "ViT-B/16 (vit-pytorch)", "random", vit(), vit
    for name, build in ARCHITECTURES.items():
        yield f"{name} (width {WIDTH}, 2 layers)", "random", build(WIDTH).eval(), None


def row(name: str, weights: str, model: nn.Module, factory: Callable[[], nn.Module] | None) -> tuple[str, list[str]]:
    """Convert, save and reload one model; return its line of the table and the reasons for what stayed dense."""
    kind = type(model).__name__
    dense = rpq.plan(model, exclude=["*"]).file_bytes
    start = time.perf_counter()
    report = rpq.convert(model, preset=PRESET)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        saved = rpq.save(model, out)
        after = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        assert after == saved.predicted_bytes == report.predicted_bytes, name
        rpq.verify(out)
        loaded = rpq.load(out, factory=factory)
        kept, again = model.state_dict(), loaded.state_dict()
        exact = kept.keys() == again.keys() and all(torch.equal(kept[k], again[k]) for k in kept)
    parameters = [r for r in report.rows if r.decision != "buffer"]
    whole = sum(prod(r.shape) for r in parameters)
    left = [r for r in parameters if r.decision == "dense"]
    covered = 1 - sum(prod(r.shape) for r in left) / whole
    line = (
        f"| {name} | {kind} | {weights} | {whole:,} | {100 * covered:.2f} % | {dense:,} | {after:,} | "
        f"{dense / after:.2f}x | {'exact' if exact else 'NOT EXACT'} | {seconds:.0f} |"
    )
    return line, reasons(name, left, whole) if covered < 0.99 else []


def reasons(name: str, left: list[Row], whole: int) -> list[str]:
    lines = [f"\n### {name}\n", "| parameter | shape | share of all | why it stays dense |", "|---|---|---:|---|"]
    for g in group(left):
        share = sum(prod(r.shape) for r in g.rows) / whole
        shape = " x ".join(map(str, g.first.shape))
        lines.append(f"| `{g.name}` | {shape} | {100 * share:.3f} % | {g.first.reason} |")
    return lines


def main() -> None:
    torch.manual_seed(0)
    print("# Real models, converted\n")
    print("Printed by `python benchmarks/models_table.py > docs/models.md`.", end=" ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} cores.")
    print(
        f"Preset `{PRESET}`. Covered: share of the parameters that are stored as codes. Bytes: weight files on disk, dense as"
    )
    print("stored and converted; the plan predicted every one of them. Reload: every tensor, bit for bit.\n")
    print(
        "| model | class | weights | parameters | covered | bytes before | bytes after | smaller | reload | seconds |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---|---:|")
    below: list[str] = []
    for entry in models():
        line, why = row(*entry)
        print(line, flush=True)
        below += why
    if below:
        print("\n## Below 99 %: what stays dense, and why")
        print("\n".join(below))


if __name__ == "__main__":
    main()
