"""The seed's promise: peak memory of large models, dense and of random codes, as the operating system counts it.

python -m benchmarks.training.memory MODEL HOW WHAT    # one case, as JSON: vit-b train-32 dense, opt-6.7b forward rpq
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import measuring

BASE = {"image_size": 224, "patch_size": 16, "num_classes": 1000, "dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}
GIANT = {
    "image_size": 336,
    "patch_size": 14,
    "num_classes": 1000,
    "dim": 1280,
    "depth": 32,
    "heads": 16,
    "mlp_dim": 5120,
}
VITS = {"vit-b": BASE, "vit-giant": GIANT}
TOKENS = 64  # of an OPT's forward pass
CASES = [
    *(
        ("vit-b", how, what)
        for how in ("train-32", "train-32-checkpointing", "forward-32")
        for what in ("dense", "rpq")
    ),
    *(
        ("vit-giant", how, what)
        for how in ("train-1", "train-1-checkpointing", "forward-1")
        for what in ("dense", "rpq")
    ),
    ("opt-6.7b", "forward-1", "rpq"),
]


def lines() -> Iterator[dict[str, Any]]:
    for model, how, what in CASES:
        yield {
            "kind": "memory",
            "task": model,
            "row": what,
            "setting": how,
            **measuring.apart(__name__, model, how, what),
        }


def built(name: str, what: str) -> nn.Module:
    """Return a model with random weights: dense, or with codes by the seed's rule, a codebook for each head."""
    if name in VITS:
        from rpq_convert.models import RPQViT
        from rpq_convert.models.vit import SeedViT

        return RPQViT(**VITS[name], channels=3, seed=0) if what == "rpq" else SeedViT(**VITS[name], channels=3)
    from transformers import OPTConfig

    from rpq_convert.models import RPQOPTForCausalLM

    config = OPTConfig(
        vocab_size=50272, hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32,
        num_attention_heads=32, dropout=0.0,
    )  # fmt: skip
    return RPQOPTForCausalLM(config, seed=0)


def one(name: str, how: str, what: str) -> dict[str, Any]:
    """Measure one case; the peak is of the whole process, `before` what it held before it built the model."""
    from rpq_convert.running.blocks import recomputed

    kind, batch = how.split("-")[0], int(how.split("-")[1])
    torch.manual_seed(0)
    before = measuring.resident()
    model = built(name, what)
    answer: Callable[[], Tensor]
    if name in VITS:
        size = VITS[name]["image_size"]
        x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
        answer = lambda: model(x)  # noqa: E731
    else:
        ids = torch.randint(50272, (batch, TOKENS))
        answer = lambda: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    size_of = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    facts = {"before": before, "held": size_of, "parameters": sum(p.numel() for p in model.parameters())}
    if kind == "train":
        step = measuring.trained(model, lambda: F.cross_entropy(answer(), y))
        with recomputed(model) if how.endswith("checkpointing") else nullcontext():
            return {**facts, **measuring.measured(step, 2)}
    model.eval()
    with torch.inference_mode():
        return {**facts, **measuring.measured(answer, 2)}


if __name__ == "__main__":
    print(json.dumps(one(*sys.argv[1:])))
