"""Perplexity of SmolLM2-135M at equal bytes: sizes of layers chosen by measured sensitivity, by shape, or one for all.

    python benchmarks/budget.py TEXT [--bits 4 3] [--calibrated FIT_TEXT]

For every rate the file's bytes with that rate everywhere are what the other two may spend. Perplexity over the first 12
windows of 512 tokens of TEXT.
"""

import argparse
import copy
import time
from pathlib import Path

from real_models import perplexity, smollm2

import rpq_convert as rpq

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text")
parser.add_argument("--bits", type=float, nargs="*", default=[4, 3])
parser.add_argument("--calibrated", help="text to calibrate on as well, 32 windows of 512 tokens")
asked = parser.parse_args()

base, tokenizer = smollm2()
text = Path(asked.text).read_text("utf8")
plain, data = perplexity(base, tokenizer, text), None
if asked.calibrated:
    fit = Path(asked.calibrated).read_text("utf8")
    ids = tokenizer(fit, return_tensors="pt", add_special_tokens=False).input_ids[0][: 32 * 512].view(-1, 512)
    data = [{"input_ids": part, "use_cache": False} for part in ids.split(4)]

print(f"`python benchmarks/budget.py TEXT --bits {' '.join(f'{b:g}' for b in asked.bits)}", end="")
print(f"{' --calibrated FIT_TEXT' if data else ''}`, perplexity of the dense model {plain:.3f}\n")
print("| sizes | bytes | perplexity | / base | seconds |\n|---|---|---|---|---|", flush=True)
for bits in asked.bits:
    target = rpq.plan(base, bits=bits).file_bytes
    for how, options in (
        (f"{bits:g} bits everywhere", {"bits": bits}),
        ("by shape", {"target_size": target, "sensitivity": "shape"}),
        ("measured", {"target_size": target}),
    ):
        start = time.perf_counter()
        model = copy.deepcopy(base)
        rpq.convert(model, calibration=data, **options)
        spent = time.perf_counter() - start
        size = round(2**20 * rpq.model_size(model))
        with rpq.decoded(model):
            found = perplexity(model, tokenizer, text)
        print(f"| {how} | {size:,} | {found:.3f} | {found / plain:.3f} | {spent:.0f} |", flush=True)
