"""Whole models of `speed.py`: SmolLM2 that reads and writes, MiniLM, a ViT; and where the time of a token goes.

Models come as ordinary modules and are converted to the defaults of each number of bits, not to the fastest layout. Most codes are
random: their values do not change the speed.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import rpq_convert as rpq
from rpq_convert.kernels.jit import threads

WAYS: dict[str, dict[str, Any]] = {
    "8 bits": {"preset": "8bit", "fit": "random"},
    "4 bits": {"bits": 4},  # entropy-coded: in memory a code of one byte for each number
    "4 bits in memory": {"bits": 4, "storage": "bytes", "fit": "random"},
    "2 bits": {"preset": "2bit", "fit": "random"},
    "1 bit": {"preset": "1bit", "fit": "random"},
}


def versions(model: nn.Module, ways: dict[str, dict[str, Any]] = WAYS) -> dict[str, nn.Module]:
    """Return the dense model and its conversions, by name."""
    found = {"dense": model}
    for name, options in ways.items():
        found[name] = copy.deepcopy(model)
        rpq.convert(found[name], check=False, progress=False, **options)
    return found


def writer(model: Any, tokens: int) -> Callable[[], object]:
    """Return what lets a language model write so many tokens after a prompt of ten."""
    prompt = torch.arange(100, 110)[None]
    return lambda: model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def smollm2(dtype: torch.dtype = torch.float32) -> nn.Module:
    from real_models import smollm2 as load

    return load(dtype)[0]  # type: ignore[no-any-return]


def minilm() -> tuple[nn.Module, Callable[[nn.Module], Callable[[], object]]]:
    from real_models import embed, minilm_folder
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm_folder(), trust_remote_code=False).eval()
    words = AutoTokenizer.from_pretrained(minilm_folder(), trust_remote_code=False)
    sentences = ["The committee postponed its decision until spring, as nobody had read the report."] * 32
    return model, lambda m: lambda: embed(m, words, sentences)


def vit() -> tuple[nn.Module, Callable[[nn.Module], Callable[[], object]]]:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    pictures = torch.randn(8, 3, 224, 224)
    return ViTModel(ViTConfig()).eval(), lambda m: lambda: m(pictures)


@contextmanager
def timed(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the seconds of a model's parts within the block: its linear layers, embeddings, and the kernels of both."""
    spent: Counter[str] = Counter()
    run, kinds = threads.Work.run, {nn.Linear: "layers", nn.Embedding: "embedding"}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def timing(self: Any, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        run(self, *args, **kwargs)
        spent["kernels"] += time.perf_counter() - begin

    def wrap(module: nn.Module, part: str) -> None:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            begin = time.perf_counter()
            found = plain(*args, **kwargs)
            spent[part] += time.perf_counter() - begin
            spent[f"calls of {part}"] += 1
            return found  # type: ignore[no-any-return]

        module.forward = forward  # type: ignore[method-assign]

    wrapped = {
        m: "head" if m is head else kind for m in model.modules() for k, kind in kinds.items() if isinstance(m, k)
    }
    threads.Work.run = timing  # type: ignore[method-assign]
    for module, part in wrapped.items():
        wrap(module, part)
    try:
        yield spent
    finally:
        threads.Work.run = run  # type: ignore[method-assign]
        for module in wrapped:
            del module.forward


def where(model: nn.Module, call: Callable[[], object], units: int) -> list[str]:
    """Return cells: milliseconds a unit (a token, a batch) in all, and of its parts; the best of three calls."""
    call()
    best: tuple[float, Counter[str]] = (float("inf"), Counter())
    for _ in range(3):
        with timed(model) as spent:
            begin = time.perf_counter()
            call()
            best = min(best, (time.perf_counter() - begin, spent), key=lambda found: found[0])
    total, spent = best
    parts = {name: 1e3 * spent[name] / units for name in ("kernels", "layers", "head", "embedding")}
    outside = 1e3 * total / units - parts["layers"] - parts["head"] - parts["embedding"]
    calls = (spent["calls of layers"] + spent["calls of head"]) / units
    inside = parts["kernels"] or parts["layers"] + parts["head"] + parts["embedding"]
    around = parts["layers"] + parts["head"] + parts["embedding"] - inside
    return [
        f"{v:.2f}" for v in (1e3 * total / units, inside, around, outside, parts["head"], parts["embedding"], calls)
    ]


PARTS = [
    "",
    "ms in all",
    "in kernels",
    "around kernels",
    "outside layers",
    "the head",
    "the embedding",
    "calls of layers",
]
MODELS = ("smollm2", "minilm", "vit")


def where_rows(name: str, tokens: int = 32) -> tuple[str, list[list[str]]]:
    """Return the title and rows of one model's table."""
    if name == "smollm2":
        title = f"Where a token of SmolLM2-135M goes: {tokens} greedy tokens, transformers' own loop"
        return title, [[k, *where(m, writer(m, tokens), tokens)] for k, m in versions(smollm2()).items()]
    model, use = minilm() if name == "minilm" else vit()
    title = {"minilm": "Where 32 sentences of MiniLM go", "vit": "Where 8 pictures of ViT-B/16 go"}[name]
    return title, [[k, *where(m, use(m), 1)] for k, m in versions(model).items()]
