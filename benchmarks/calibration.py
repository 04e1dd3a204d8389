"""Perplexity of SmolLM2-135M by how it was fitted: to its weights, to its inputs, and tuned. Prints a Markdown table.

    python benchmarks/calibration.py FIT_TEXT TEST_TEXT [--bits 4 3 2] [--windows 32] [--steps 0] > docs/calibration.md

All weights with the tied head; perplexity over the first 12 windows of 512 tokens of TEST_TEXT. FIT_TEXT is what layers are
calibrated and tuned on; the two must not overlap (WikiText-2: its validation and test parts).
"""

import argparse
import copy
import time
from pathlib import Path

from real_models import perplexity, smollm2

import rpq_convert as rpq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("fit_text")
parser.add_argument("test_text")
parser.add_argument("--bits", type=float, nargs="*", default=[4, 3, 2])
parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, to calibrate on")
parser.add_argument("--steps", type=int, default=0, help="of tuning, 1024 tokens each")
asked = parser.parse_args()

base, tokenizer = smollm2()
fit, test = (Path(f).read_text("utf8") for f in (asked.fit_text, asked.test_text))
ids = tokenizer(fit, return_tensors="pt", add_special_tokens=False).input_ids[0]


def batches(window: int, rows: int, limit: int | None = None) -> list[dict]:
    cut = ids[: len(ids) // window * window].view(-1, window)[:limit]
    return [{"input_ids": part, "use_cache": False} for part in cut.split(rows)]


plain = perplexity(base, tokenizer, test)
command = f"--bits {' '.join(f'{b:g}' for b in asked.bits)} --windows {asked.windows} --steps {asked.steps}"
print(f"`python benchmarks/calibration.py FIT TEST {command}`, calibrated on {asked.windows * 512:,} tokens\n")
print("| bits | fitted to | MB | perplexity | / base | seconds |\n|---|---|---|---|---|---|", flush=True)
print(f"| 32 | | {rpq.model_size(base):.1f} | {plain:.3f} | 1 | |", flush=True)


def row(bits: float, how: str, model, seconds: float) -> None:
    size = rpq.model_size(model)
    with rpq.decoded(model):
        found = perplexity(model, tokenizer, test)
    print(f"| {bits:g} | {how} | {size:.1f} | {found:.3f} | {found / plain:.3f} | {seconds:.0f} |", flush=True)


for bits in asked.bits:
    for how, options in (("weights", {}), ("inputs", {"calibration": batches(512, 4, asked.windows)})):
        model = copy.deepcopy(base)
        start = time.perf_counter()
        rpq.convert(model, bits=bits, **options)
        spent = time.perf_counter() - start
        row(bits, how, model, spent)
    if asked.steps:
        data = batches(256, 4)
        start = time.perf_counter()
        done = rpq.tune(model, base, data[:-4], held_out=data[-4:], steps=asked.steps)
        row(bits, f"inputs, {done.best} steps of tuning", model, spent + time.perf_counter() - start)
