"""RPQ-pytorch's models, built by conversion: each is the library's own class with random codes, ready to be trained.

Loaded on first use, because vit-pytorch and transformers are optional and slow to import.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "RPQViT": "vit", "SeedViT": "vit", "RPQOPTModel": "opt", "RPQOPTForCausalLM": "opt",
    "RPQOPTForSequenceClassification": "opt", "RPQOPTForQuestionAnswering": "opt",
    "fresh": "fresh", "materialise": "fresh",
}  # fmt: skip
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rpq_convert.models' has no attribute {name!r}")
    return getattr(import_module(f"rpq_convert.models.{_HOMES[name]}"), name)
