"""Seeded conversions whose bytes must not change: print their sha256, or compare them with those on record.

    python benchmarks/seeded_bytes.py            # compare with benchmarks/seeded_bytes.json
    python benchmarks/seeded_bytes.py --record   # write them there, for this kind of processor

The bytes of fits depend on the kind of processor (docs/architecture.md), so records are kept by its features. Models are small and
random, so that the whole takes a minute or two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import rpq_convert as rpq
from rpq_convert.hf import torchvision
from rpq_convert.running.processor import family

torchvision.fix()  # or transformers and vit-pytorch do not import beside a CPU build of torch
RECORD = Path(__file__).with_suffix(".json")


class Mixed(nn.Module):
    """One layer of each kind, run one after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(300, 48, padding_idx=0)
        self.first = nn.Linear(48, 128)
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.ConvTranspose1d(16, 8, 3)
        self.pair = nn.Bilinear(32, 32, 16)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.memory = nn.LSTM(64, 64)
        self.last = nn.Linear(128, 300)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.first(self.words(ids)))  # [batch, tokens, 128]
        half = x[..., :64]
        x = x + torch.cat([self.attention(half, half, half)[0], self.memory(half)[0]], -1)
        image = self.conv(x[:, :3, :64].reshape(len(ids), 3, 8, 8))
        x = x + self.up(image.flatten(2)).mean() + self.pair(x[..., :32], x[..., 32:64]).mean(-1, keepdim=True)
        return self.last(x)


def stack(width: int = 96) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4)), nn.Linear(width, 40))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=64, max_position_embeddings=64)).eval()


def vit() -> nn.Module:
    from vit_pytorch import ViT

    torch.manual_seed(4)
    return ViT(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=128, dim_head=16).eval()


def batches(count: int = 6, width: int = 96) -> list[torch.Tensor]:
    return list(torch.randn(count, 32, width, generator=torch.Generator().manual_seed(5)))


def ids(count: int = 6) -> list[torch.Tensor]:
    return list(torch.randint(300, (count, 4, 24), generator=torch.Generator().manual_seed(6)))


def cases() -> dict[str, Callable[[], nn.Module]]:
    def converted(model: nn.Module, **options: Any) -> nn.Module:
        rpq.convert(model, **options)
        return model

    def tuned(**options: Any) -> nn.Module:
        model = converted(stack(), bits=2)
        rpq.tune(model, stack(), batches(12), steps=40, every=8, **options)
        return model

    found: dict[str, Callable[[], nn.Module]] = {
        f"preset {name}": lambda name=name: converted(Mixed(), preset=name)
        for name in ("1bit", "2bit", "3bit", "4bit", "5bit", "6bit", "8bit")
    }
    return found | {
        "random": lambda: converted(Mixed(), bits=4, fit="random"),
        "rotation": lambda: converted(stack(), bits=4, rotation=32),
        "outliers": lambda: converted(stack(), bits=4, outliers=0.02),
        "axis in, dim 8": lambda: converted(stack(), dim=8, axis="in"),
        "rules": lambda: converted(Mixed(), bits=3, storage="bytes", rules=[{"match": "type:Embedding", "bits": 8}, {"match": "last", "skip": True}]),
        "calibrated 4 bits": lambda: converted(stack(), bits=4, calibration=batches()),
        "calibrated 2.67 bits, mixed layers": lambda: converted(Mixed(), bits=2.67, storage="bytes", calibration=ids()),
        "calibrated 2 bits with outliers": lambda: converted(stack(), bits=2, outliers=0.02, calibration=batches()),
        "own inputs": lambda: converted(llama(), bits=4, storage="bytes", calibration=rpq.own_inputs),
        "budget by shape": lambda: converted(Mixed(), target_size="60KB", sensitivity="shape"),
        "budget measured": lambda: converted(llama(), bits=5.3, storage="bytes"),
        "entropy-coded": lambda: converted(Mixed(), bits=3.5),
        "entropy-coded, calibrated": lambda: converted(Mixed(), bits=3.5, calibration=ids()),
        "OPT heads": lambda: converted(opt(), codebooks="heads"),
        "OPT heads, random": lambda: converted(opt(), codebooks="heads", fit="random"),
        "ViT heads": lambda: converted(vit(), codebooks="heads", grow=True),
        "tuned": tuned,
        "tuned with codes": lambda: tuned(recode=0.02),
    }  # fmt: skip


def digest(model: nn.Module) -> str:
    """Return the sha256 of a saved model's weight file and of the description beside it."""
    with tempfile.TemporaryDirectory() as folder:
        rpq.save(model, Path(folder) / "out")
        found = hashlib.sha256((Path(folder) / "out" / "model.safetensors").read_bytes())
        described = json.loads((Path(folder) / "out" / "config.json").read_text())["quantization_config"]
        found.update(
            json.dumps({k: described[k] for k in ("modules", "tied", "guard", "plan_sha256")}, sort_keys=True).encode()
        )
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the digests down instead of comparing")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    kind, wrong = f"{family()}, torch {torch.__version__.partition('+')[0]}", []
    known = records.get(kind, {})
    if not known and not args.record:
        sys.exit(
            f"no record for this processor ({kind}): check out a commit that is known to be right and run --record"
        )
    for name, make in cases().items():
        if args.only not in name:
            continue
        found = digest(make())
        same = args.record or known.get(name) == found
        known[name] = found if args.record else known.get(name)
        print(f"{'' if args.record else 'same ' if same else 'OTHER'} {name}: {found[:16]}", flush=True)
        wrong += [] if same else [name]
    if args.record:
        records[kind] = known
        RECORD.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    if wrong:
        sys.exit(f"{len(wrong)} conversions changed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
