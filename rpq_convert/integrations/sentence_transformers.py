"""sentence-transformers: models of transformers inside its models are saved in codes, all other modules dense.

Its modules (Dense, StaticEmbedding, LSTM, ...) read their weight files by themselves, and know no codes.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rpq_convert.integrations.other_savers import replace_method

OWNERS = {
    "sentence_transformers.base.model": "BaseModel",
    "sentence_transformers.SentenceTransformer": "SentenceTransformer",
}

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # what is inside them is saved, not they


def install() -> None:
    """Let models of sentence-transformers save what it loads again; the second owner is that of older versions."""
    for module, name in OWNERS.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and "save" in vars(kind):
            replace_method(kind, "save", _saves)


def _saves(plain: Callable[..., Any]) -> Callable[..., Any]:
    def save(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _dense_modules(model):
            return plain(model, *args, **kwargs)

    return save


@contextmanager
def _dense_modules(model: nn.Module) -> Iterator[None]:
    """Put dense copies in the place of converted modules that hold no model of transformers, as long as the block lasts."""
    from rpq_convert.conversion.restore_model import restore
    from rpq_convert.hf.loading import is_pretrained
    from rpq_convert.layers.surgery import layers_of

    swapped: list[tuple[nn.Module, str, nn.Module]] = []

    def visit(parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is None or is_pretrained(child) or not layers_of(child):
                continue
            if isinstance(child, CONTAINERS) or any(map(is_pretrained, child.modules())):
                visit(child)
            else:
                swapped.append((parent, name, child))

    visit(model)
    if swapped:
        kinds = ", ".join(sorted({type(child).__name__ for *_, child in swapped}))
        warnings.warn(f"{kinds}: saved dense, since sentence-transformers does not load codes here", stacklevel=4)
    try:
        for parent, name, child in swapped:
            parent._modules[name] = dense = copy.deepcopy(child)
            restore(dense)
        yield
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child
