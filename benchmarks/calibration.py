"""Perplexity of SmolLM2-135M by how it was fitted: to its weights, to its inputs, and tuned. Prints a Markdown table.

    python benchmarks/calibration.py FIT_TEXT TEST_TEXT [--bits 4 3 2] [--how weights own inputs] [--windows 32] [--steps 0]

All weights with the tied head; perplexity over the first 12 windows of 512 tokens of TEST_TEXT. FIT_TEXT is what layers are
calibrated and tuned on; the two must not overlap (WikiText-2: its validation and test parts). "own" is calibrated on text
that the model writes itself. docs/calibration.md holds what it printed.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from real_models import megabytes, perplexity, smollm2

import rpq_convert as rpq

HOW = ("weights", "own", "inputs")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("fit_text")
parser.add_argument("test_text")
parser.add_argument("--bits", type=float, nargs="*", default=[4, 3, 2])
parser.add_argument("--how", nargs="*", choices=HOW, default=["weights", "inputs"], help="what to fit to")
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
command = f"--bits {' '.join(f'{b:g}' for b in asked.bits)} --how {' '.join(asked.how)} --windows {asked.windows} --steps {asked.steps}"
print(f"`python benchmarks/calibration.py FIT TEST {command}`, calibrated on {asked.windows * 512:,} tokens\n")
print("| bits | fitted to | MB | perplexity | / base | seconds |\n|---|---|---|---|---|---|", flush=True)
print(f"| 32 | | {megabytes(base):.1f} | {plain:.3f} | 1 | |", flush=True)


def row(bits: float, how: str, model, seconds: float) -> None:
    size = megabytes(model)
    with rpq.decoded(model):
        found = perplexity(model, tokenizer, test)
    print(f"| {bits:g} | {how} | {size:.1f} | {found:.3f} | {found / plain:.3f} | {seconds:.0f} |", flush=True)


for bits in asked.bits:
    for how in asked.how:
        model = copy.deepcopy(base)
        start = time.perf_counter()
        texts = {"weights": None, "own": rpq.own_inputs, "inputs": batches(512, 4, asked.windows)}
        rpq.convert(model, bits=bits, calibration=texts[how])
        spent = time.perf_counter() - start
        row(bits, how, model, spent)
    if asked.steps:
        data = batches(256, 4)
        start = time.perf_counter()
        done = rpq.tune(model, base, data[:-4], held_out=data[-4:], steps=asked.steps, autocast=torch.bfloat16)
        row(bits, f"{how}, {done.best} steps of tuning", model, spent + time.perf_counter() - start)
