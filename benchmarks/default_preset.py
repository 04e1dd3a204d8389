"""Which preset may be the default: SmolLM2-135M's perplexity after data-free conversion, per preset.

    python benchmarks/default_preset.py TEXT_FILE [preset …]

The default is the smallest preset within 10 % of the unconverted model.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

from real_models import megabytes, perplexity, smollm2

import rpq_convert as rpq


def main(text: str, presets: list[str]) -> None:
    model, tokenizer = smollm2()
    base = perplexity(model, tokenizer, text)
    dense = megabytes(model)
    print("| preset | MB | bits per weight | perplexity | / base | seconds |\n|---|---|---|---|---|---|")
    print(f"| unconverted (float32) | {dense:.1f} | 32 | {base:.3f} | 1 | |", flush=True)
    for preset in presets:
        converted = copy.deepcopy(model)
        start = time.perf_counter()
        rpq.convert(converted, preset=preset)
        seconds = time.perf_counter() - start
        size = megabytes(converted)
        rpq.restore(converted)
        after = perplexity(converted, tokenizer, text)
        print(
            f"| {preset} | {size:.1f} | {32 * size / dense:.2f} | {after:.3f} | {after / base:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_text("utf8"), sys.argv[2:] or ["8bit", "6bit", "5bit", "4bit"])
