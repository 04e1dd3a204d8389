"""Which kind of processor this is, by the instructions that fits choose from: kinds that differ give other codebooks for one seed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_tile")


@cache
def family() -> str:
    """Return the features of this processor by which fits choose their instructions, in one text; "other" where none is known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
    return " ".join(f for f in FEATURES if f in flags) or "other"
