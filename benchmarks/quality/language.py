"""A language model and an encoder of sentences, and what is measured on them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality.shuffle import shuffle_channels
from benchmarks.quality.sources import Sources

WINDOW, FITTED, MEASURED = 512, 32, 12  # tokens; windows to calibrate on, and windows of the test text
Metrics = dict[str, float]
_SHUFFLED = """Columns: perplexity over 12 windows of 512 tokens of WikiText-2's test text (dense: {base_perplexity:.3f}); its ratio to
the dense model's; KL divergence from the dense model's predictions in nats per token; how often the likeliest token is the same.
Calibrating tools see 32 windows of the validation text.

The package registry carries this model as a 4-bit GGUF: each 32 weights in a row lie on 16 levels. Tools with groups of 32 find
these levels again and look lossless. Its channels are therefore shuffled first (`benchmarks/quality/shuffle.py`). The function
and the numbers of each row stay the same, the grid is gone, and the model is like an ordinary checkpoint. Near the dense model
two perplexities differ by chance (0.1 either way). The divergence tells such rows apart."""
_SHIPPED = "The same model as it is shipped. It shows what a tool owes to the grid and is not a comparison."


def _data(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "data.safetensors")


class LanguageModel:
    """SmolLM2-135M-Instruct: perplexity, divergence and agreement on the first windows of the test text."""

    parameters = 134_515_008  # the tied head once
    columns = ("perplexity", "ratio", "kl", "top1_agreement")
    best = "perplexity"  # the smaller the better
    loss = "kl"  # what tuning makes small

    def __init__(self, shuffled: bool) -> None:
        self.title = "SmolLM2-135M-Instruct" + ("" if shuffled else ", on the grid of its GGUF")
        self.note = _SHUFFLED if shuffled else _SHIPPED
        self.shuffled = shuffled

    def prepare(self, folder: Path, sources: Sources) -> None:
        from real_models import smollm2

        if sources.fit is None or sources.test is None:
            raise SystemExit("SmolLM2 needs --fit-text and --test-text (WikiText-2: its validation and its test part)")
        model, tokenizer = smollm2()
        fit, test = (
            tokenizer(file.read_text("utf8"), return_tensors="pt", add_special_tokens=False).input_ids[0]
            for file in (sources.fit, sources.test)
        )
        test = test[: MEASURED * WINDOW].view(-1, WINDOW)  # [windows, window]
        with torch.inference_mode():
            if self.shuffled:
                before = model(input_ids=test[:1]).logits
                shuffle_channels(model)
                torch.testing.assert_close(model(input_ids=test[:1]).logits, before, rtol=1e-3, atol=1e-3)
            logits = torch.cat([model(input_ids=w[None], use_cache=False).logits for w in test])
        model.hf_quantizer = None  # the weights are plain tensors, though they came out of a GGUF
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file({"logits": logits}, folder / "base.safetensors")  # [windows, window, vocabulary]
        fit = fit[: len(fit) // WINDOW * WINDOW].view(-1, WINDOW)
        save_file({"fit": fit.contiguous(), "test": test.contiguous()}, folder / "data.safetensors")

    def load(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False).eval()

    def calibration(self, folder: Path) -> list[Any]:
        return [{"input_ids": part, "use_cache": False} for part in _data(folder)["fit"][:FITTED].split(4)]

    def tuning(self, folder: Path) -> list[Any]:
        """Batches of 1024 tokens of the whole text, as `benchmarks/calibration.py` takes them."""
        return [{"input_ids": part, "use_cache": False} for part in _data(folder)["fit"].view(-1, 256).split(4)]

    def measure(self, model: nn.Module, folder: Path) -> Metrics:
        from rpq_convert.evaluation.evaluate import evaluate

        test = _data(folder)["test"]
        base = _Recorded(test, load_file(folder / "base.safetensors")["logits"])
        return dict(evaluate(base, model, test.flatten(), window=WINDOW, batch=1).metrics)


class _Recorded(nn.Module):
    """The dense model's answers, computed once, for the windows that it is asked about."""

    def __init__(self, windows: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.answers = {tuple(w.tolist()): answer for w, answer in zip(windows, logits, strict=True)}

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=torch.stack([self.answers[tuple(w.tolist())] for w in input_ids]))


class Encoder:
    """all-MiniLM-L6-v2: cosine of its sentence embeddings to the dense model's, and rank correlation on STS-B's pairs."""

    title = "all-MiniLM-L6-v2"
    note = """Columns: mean cosine of the embeddings of STS-B's test sentences to the dense model's; Spearman's rank correlation
with the human scores (dense: {base_spearman:.4f}). Calibrating tools see 1,920 sentences of WikiText-2's validation text and
WordNet's examples and glosses, tuning up to 79,000. None of these texts is of STS-B's kind."""
    parameters = 22_713_216
    columns = ("cosine", "spearman")
    best = "cosine"
    loss = "mse"

    def prepare(self, folder: Path, sources: Sources) -> None:
        from real_models import minilm_folder
        from transformers import AutoModel, AutoTokenizer

        if sources.pairs is None:
            raise SystemExit("MiniLM needs --pairs (STS-B's test part: sentence, sentence, score)")
        tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()), trust_remote_code=False)
        with sources.pairs.open(newline="", encoding="utf8") as file:
            rows = [(a, b, float(score)) for a, b, score in csv.reader(file)]
        test = tokenizer([s for a, b, _ in rows for s in (a, b)], padding=True, return_tensors="pt")
        fit = tokenizer(sources.sentences(), truncation=True, max_length=64, padding=True, return_tensors="pt")
        model = AutoModel.from_pretrained(str(minilm_folder()), dtype=torch.float32, trust_remote_code=False).eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        data = {
            "fit": fit["input_ids"], "fit_mask": fit["attention_mask"],
            "test": test["input_ids"], "test_mask": test["attention_mask"],
            "gold": torch.tensor([score for *_, score in rows]),
        }  # fmt: skip
        save_file({k: v.contiguous() for k, v in data.items()}, folder / "data.safetensors")
        save_file({"embeddings": _embed(model, data["test"], data["test_mask"])}, folder / "base.safetensors")

    def load(self, folder: Path) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False).eval()

    def calibration(self, folder: Path) -> list[Any]:
        return self.tuning(folder)[:30]

    def tuning(self, folder: Path) -> list[Any]:
        """Batches of 64 sentences of like length, each cut to the shortest: nothing is learnt from padding."""
        data = _data(folder)
        lengths = data["fit_mask"].sum(1)
        batches = []
        for part in torch.argsort(lengths, stable=True).split(64):
            shortest = int(lengths[part].min())
            batches.append(
                {"input_ids": data["fit"][part, :shortest], "attention_mask": data["fit_mask"][part, :shortest]}
            )
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))  # the last ones are held out
        return [batches[i] for i in order.tolist()]

    def measure(self, model: nn.Module, folder: Path) -> Metrics:
        from scipy.stats import spearmanr

        data = _data(folder)
        found = _embed(model, data["test"], data["test_mask"])  # [2 * pairs, width], unit length
        base = load_file(folder / "base.safetensors")["embeddings"]
        likeness, before = ((e[::2] * e[1::2]).sum(-1).numpy() for e in (found, base))
        return {
            "cosine": float((found * base).sum(-1).mean()),
            "spearman": float(spearmanr(likeness, data["gold"].numpy()).statistic),
            "base_spearman": float(spearmanr(before, data["gold"].numpy()).statistic),
        }


@torch.inference_mode()
def _embed(model: Any, ids: Tensor, masks: Tensor, batch: int = 64) -> Tensor:
    def parts() -> Iterator[Tensor]:
        for i, mask in zip(ids.split(batch), masks.split(batch), strict=True):
            longest = int(mask.sum(1).max())
            hidden = model(input_ids=i[:, :longest], attention_mask=mask[:, :longest]).last_hidden_state
            weights = mask[:, :longest, None]
            yield nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    return torch.cat(list(parts()))
