"""Pooling: how a folder's own files make one vector of a text encoder's hidden states.

sentence-transformers writes it down: modules.json lists the modules in order, `1_Pooling/config.json` the mode, a Dense module its
weights. A folder without them is pooled by the mean over tokens. Vectors are compared by cosines, so normalizing changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rpq_convert.errors import EvaluateError
from rpq_convert.storage.files import refuse_links


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


def _weighted(hidden: Tensor, mask: Tensor) -> Tensor:
    """Later tokens count more, as SGPT does."""
    return _mean(hidden * (place := torch.arange(1, hidden.shape[1] + 1).view(1, -1, 1)), mask) * (
        mask.sum(1) / (mask * place).sum(1)
    )


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), places]


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask[..., 0].int().argmax(1))  # padding may stand on the left


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, (mask[..., 0] * torch.arange(1, mask.shape[1] + 1)).argmax(1))


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first, "cls_token": _first,
    "mean": _mean, "mean_tokens": _mean,
    "max": lambda h, m: h.masked_fill(m == 0, -torch.inf).amax(1), "max_tokens": lambda h, m: h.masked_fill(m == 0, -torch.inf).amax(1),
    "mean_sqrt_len_tokens": lambda h, m: (h * m).sum(1) / m.sum(1).sqrt(),
    "weightedmean": _weighted, "weightedmean_tokens": _weighted,
    "lasttoken": _last,
}  # fmt: skip


class Pooled(nn.Module):
    """A text encoder's vector of each text: [texts, width].

    Args:
        folder: what says how tokens are pooled; None for their mean.
    """

    def __init__(self, model: nn.Module, folder: str | Path | None = None) -> None:
        super().__init__()
        self.model, self.modes = model, ["mean"]
        self.after: list[Callable[[Tensor], Tensor]] = []
        if folder is not None and Path(folder).is_dir():
            self._read(Path(folder))

    def _read(self, folder: Path) -> None:
        listed = folder / "modules.json"
        places: list[str] = []
        if listed.is_file():
            refuse_links(folder)
            places = [str(m.get("path", "")) for m in _read_json(listed, list) if isinstance(m, dict)]
        for place in (folder / p for p in places if p and ".." not in Path(p).parts and not Path(p).is_absolute()):
            if not (place / "config.json").is_file():
                continue
            facts = _read_json(place / "config.json", dict)
            if "in_features" in facts:
                self.after.append(_dense(place, facts))
            elif any(name.startswith("pooling_mode") for name in facts):
                self.modes = _modes(facts, place)

    def forward(self, **inputs: Tensor) -> Tensor:
        hidden = self.model(**inputs).last_hidden_state.float()
        mask = inputs.get("attention_mask")
        mask = torch.ones(hidden.shape[:2]) if mask is None else mask
        found = torch.cat([MODES[mode](hidden, mask.unsqueeze(-1).to(hidden.dtype)) for mode in self.modes], -1)
        for step in self.after:
            found = step(found)
        return found


@torch.inference_mode()
def gives_vectors(model: nn.Module, batch: Any) -> bool:
    """Return whether a text model gives hidden states that can be pooled, rather than logits."""
    output = model(**batch)
    return getattr(output, "logits", None) is None and getattr(output, "last_hidden_state", None) is not None


def _read_json(file: Path, kind: type) -> Any:
    try:
        found = json.loads(file.read_text("utf8"))
    except (ValueError, OSError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise EvaluateError(f"{file} is no JSON {'list' if kind is list else 'object'}")
    return found


def _modes(facts: dict[str, Any], place: Path) -> list[str]:
    named = facts.get("pooling_mode")
    if named is not None:
        found = [named] if isinstance(named, str) else list(named)
    else:
        found = [
            n.removeprefix("pooling_mode_") for n, on in facts.items() if n.startswith("pooling_mode_") and on is True
        ]
    if strange := [mode for mode in found if mode not in MODES]:
        raise EvaluateError(f"{place}/config.json: unknown pooling {strange[0]!r}; known are {', '.join(MODES)}")
    return found or ["mean"]


def _dense(place: Path, facts: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return a Dense module of sentence-transformers."""
    try:
        tensors = load_file(place / "model.safetensors")
        weight = tensors["linear.weight"].float()
    except (SafetensorError, OSError, KeyError) as e:
        raise EvaluateError(f"{place}: its Dense module has no readable model.safetensors: {e}") from None
    bias, name = tensors.get("linear.bias"), str(facts.get("activation_function", "Identity")).rpartition(".")[2]
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "Identity": lambda x: x, "Tanh": torch.tanh, "ReLU": torch.relu, "GELU": nn.functional.gelu, "Sigmoid": torch.sigmoid,
    }  # fmt: skip
    if name not in acts:
        raise EvaluateError(f"{place}/config.json: unknown activation {name!r}; known are {', '.join(acts)}")
    return lambda x: acts[name](nn.functional.linear(x, weight, None if bias is None else bias.float()))
