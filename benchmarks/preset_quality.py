"""What presets keep, for `rpq presets` and the advice after a conversion: writes configs/quality.json.

    python benchmarks/preset_quality.py [TEXT PAIRS]

Figures come from docs/quality.jsonl (`python -m benchmarks.quality`). The default preset's are measured here where TEXT, WikiText-2's
test part as plain text, and PAIRS, a csv of STS-B's English test pairs, are given; otherwise those of the file are kept.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rpq_convert.conversion.effort import REFERENCE, rate

DOCS, FILE = Path("docs/quality.jsonl"), Path("configs/quality.json")
MODELS = {
    "smollm2": {"name": "SmolLM2-135M", "metric": "ratio", "parameters": 134_515_008},
    "minilm": {"name": "MiniLM-L6", "metric": "cosine", "parameters": 22_713_216},
    "vit": {"name": "ViT", "metric": "agreement", "parameters": 803_114},
}
BITS = (8, 6, 4, 3, 2, 1)
DEFAULT = 5.34
CODED = {4: 3.98, 3: 3.03}  # nominal bits -> those of the cells, which leave room for scales
HOW = {"fast": {}, "self": {"own": True}, "data": {"calibrated": True}}
TUNED = {
    4: {"steps": 100},
    3: {"steps": 200},
    2: {"steps": 400, "recode": 0.0005},
    1: {"steps": 100, "recode": 0.002},
}  # SmolLM2
PICTURES_TUNED = {2: {"steps": 200}, 1: {"steps": 200}}


def row(
    model: str, bits: float, effort: str, value: float, minutes: float, size: int, coded: bool = False
) -> dict[str, Any]:
    return {
        "model": model, "bits": bits, "effort": effort, "value": round(value, 4), "minutes": round(minutes, 2),
        "smaller": round(4 * MODELS[model]["parameters"] / size, 1), **({"coded": True} if coded else {}),
    }  # fmt: skip


def known() -> list[dict[str, Any]]:
    """Return the rows that docs/quality.jsonl holds."""
    cells = {
        (r["task"], json.dumps(r["settings"], sort_keys=True)): r
        for r in map(json.loads, DOCS.read_text("utf8").splitlines())
        if r["peer"] == "rpq" and "metrics" in r
    }
    found = []
    for model in MODELS:
        tuned = TUNED if model == "smollm2" else PICTURES_TUNED if model == "vit" else {}
        for bits in BITS:
            tries = [(effort, {"bits": bits, **settings}, False) for effort, settings in HOW.items()]
            if bits in tuned:
                tries.append(("tuned", {"bits": bits, "calibrated": True, **tuned[bits]}, False))
            if bits in CODED:
                size = {"bits": CODED[bits], "storage": "rans"}
                tries += [(effort, size | settings, True) for effort, settings in HOW.items()]
            for effort, settings, coded in tries:
                cell = cells.get((model, json.dumps(settings, sort_keys=True)))
                if cell is not None:
                    value = cell["metrics"][MODELS[model]["metric"]]
                    minutes = cell["minutes"] * cell.get("rate", REFERENCE) / REFERENCE  # earlier cells did not say it
                    found.append(row(model, bits, effort, value, minutes, cell["bytes"], coded))
    return found


def measured(text: Path, pairs: Path) -> list[dict[str, Any]]:
    """Return the default preset's rows, as measured now on one thread."""
    from real_models import minilm_folder, smollm2
    from transformers import AutoModel

    import rpq_convert as rpq
    from rpq_convert.evaluation.pairs import evaluate_pairs

    torch.set_num_threads(1)
    encoder = AutoModel.from_pretrained(minilm_folder(), trust_remote_code=False).eval()
    language, words = smollm2()
    ids = words(text.read_text("utf8"), return_tensors="pt", add_special_tokens=False).input_ids[0][: 12 * 512]
    judges: dict[str, tuple[Any, Callable[[Any], float]]] = {
        "minilm": (encoder, lambda m: evaluate_pairs(encoder, m, minilm_folder(), pairs, 256, None, None)[0].metrics["cosine"]),
        "smollm2": (language, lambda m: rpq.evaluate(language, m, ids).metrics["ratio"]),
    }  # fmt: skip
    found = []
    for name, (base, judge) in judges.items():
        for effort, calibration in (("fast", None), ("self", rpq.own_inputs)):
            model = copy.deepcopy(base)
            began = time.perf_counter()
            report = rpq.convert(model, preset="5bit", calibration=calibration)
            minutes = (time.perf_counter() - began) / 60 * rate() / REFERENCE
            found.append(row(name, DEFAULT, effort, judge(model), minutes, report.bytes))
            print(found[-1], flush=True)
    return found


def main(arguments: list[str]) -> None:
    kept = json.loads(FILE.read_text("utf8"))["rows"] if FILE.exists() else []
    new = measured(*map(Path, arguments)) if arguments else [r for r in kept if r["bits"] == DEFAULT]
    rows = sorted([*known(), *new], key=lambda r: (list(MODELS).index(r["model"]), -r["bits"]))
    lines = ",\n  ".join(json.dumps(r) for r in rows)
    FILE.write_text(f'{{"models": {json.dumps(MODELS)},\n "rows": [\n  {lines}\n ]}}\n', "utf8")


if __name__ == "__main__":
    main(sys.argv[1:])
