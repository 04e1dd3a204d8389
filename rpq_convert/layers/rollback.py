"""Rollback: whatever fails, every module of a model is the one that it was.

A conversion changes the classes, the attributes and the tables of modules, and with an option the dtype of what stays dense. All
of these are noted before the first change. The tensors themselves are kept, not copied, so that a dense weight lives until the
last one is converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from rpq_convert.layers.surgery import set_class

TABLES = ("_parameters", "_buffers", "_modules")


class _Before:
    """One module as it was: its class, its attributes, what its tables held and what its config said."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, own = module, type(module), module.__dict__
        tables = [own, *(own.get(name) for name in TABLES), getattr(own.get("config"), "__dict__", None)]
        self.tables = [(table, dict(table)) for table in tables if isinstance(table, dict)]

    def put_back(self) -> None:
        set_class(self.module, self.kind)
        for table, held in self.tables:
            table.clear()
            table.update(held)


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Make a model what it was before the block if the block fails, an interrupt by the user included."""
    before = [_Before(module) for module in model.modules()]
    values = [(p, p.detach(), p.requires_grad) for p in model.parameters() if not is_lazy(p)]
    try:
        yield
    except BaseException:
        for module in before:
            module.put_back()
        for parameter, value, wanted in values:
            if parameter.dtype != value.dtype or parameter.device != value.device:
                parameter.data = value
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
        raise
