"""One flipped bit in a finished folder: who notices. And what it costs to look: loading with and without comparison."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import rpq_convert as rpq
from benchmarks.reliability.inject import net

WIDTH, LAYERS = 2048, 24  # of the model whose loading is timed


def flips(count: int) -> int:
    """Print how many flipped bits were noticed; return how many `verify` did not notice."""
    torch.manual_seed(0)
    picks, found = random.Random(0), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "out")
        model = net().eval()
        rpq.convert(model, bits=4, grow=True)
        rpq.save(model, folder)
        files = sorted(p for p in folder.iterdir() if p.name != "rpq_manifest.json")
        for number in range(count):
            file = folder / "model.safetensors" if number % 2 else picks.choice(files)
            data = file.read_bytes()
            at = picks.randrange(len(data))
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << picks.randrange(8)]) + data[at + 1 :])
            kind = "weight files" if file.suffix == ".safetensors" else "other files"
            found[f"{kind}: flipped"] += 1
            found[f"{kind}: verify notices"] += _refuses(lambda: rpq.verify(folder))
            found[f"{kind}: load notices"] += _refuses(lambda: rpq.load(folder, factory=net))
            file.write_bytes(data)
    for what, n in sorted(found.items()):
        print(f"{what}: {n}")
    return sum(n for w, n in found.items() if w.endswith("flipped")) - sum(
        n for w, n in found.items() if w.endswith("verify notices")
    )


def _refuses(action: object) -> bool:
    try:
        action()  # type: ignore[operator]
    except (ValueError, OSError):
        return True
    return False


def stack() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def loading() -> None:
    """Print how long a folder takes to load, from the cache of the operating system, with and without comparison."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch, "out"), stack().eval()
        rpq.convert(model, bits=8, fit="random")
        rpq.save(model, folder)
        size = (folder / "model.safetensors").stat().st_size
        for verify in (False, True, False, True):
            began, cpu = time.perf_counter(), time.process_time()
            rpq.load(folder, factory=stack, verify=verify)
            print(
                f"{size / 1e6:.0f} MB loaded with verify={verify}: {time.perf_counter() - began:.2f} s, "
                f"{time.process_time() - cpu:.2f} CPU seconds"
            )
