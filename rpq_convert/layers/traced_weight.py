"""TracedWeight: what `layer.weight` is while torch.compile or torch.export looks on.

The compiler follows ordinary Python, so this is an ordinary object with torch's function protocol, where eager code has a
tensor subclass. Products and lookups become RPQ's operators, on the codes; everything else sees the decoded tensor, which the
operator `rpq::decode` makes. When exporting to ONNX, all of it becomes plain torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rpq_convert.layers.lazy_weight import refuse
from rpq_convert.layers.operations import rows_of
from rpq_convert.layers.weight import RPQWeight


class TracedWeight:
    """The shape and dtype of the dense parameter, its values decoded in the graph when they are used."""

    def __init__(self, rpq: RPQWeight, name: str) -> None:
        self.rpq, self.name = rpq, name

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = TRACED.get(func)
        if handler is not None:
            done = handler(*args, **kwargs)
            if done is not NotImplemented:
                return done
        return func(*_decode_in(args), **_decode_in(kwargs))

    def dense(self) -> Tensor:
        return self.rpq()

    @property
    def data(self) -> TracedWeight:
        return DetachedWeight(self.rpq, self.name)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.rpq.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.rpq.dtype

    @property
    def device(self) -> torch.device:
        return self.rpq.codes.device

    @property
    def requires_grad(self) -> bool:
        return self.rpq.trainable

    @property
    def ndim(self) -> int:
        return len(self.rpq.shape)

    def dim(self) -> int:
        return len(self.rpq.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.rpq.shape[dim]

    def __len__(self) -> int:
        return self.rpq.shape[0]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise refuse("__setitem__ on it", self.name)

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_") and not name.endswith("__"):
            raise refuse(f"{name} on it", self.name)
        return getattr(self.dense(), name)


class DetachedWeight(TracedWeight):
    """`weight.data`: no gradient goes through it, and it is as read-only."""

    def dense(self) -> Tensor:
        return self.rpq().detach()


def _forward(name: str) -> Callable[..., Any]:
    def operate(self: TracedWeight, *args: Any) -> Any:
        return getattr(self.dense(), name)(*_decode_in(args))

    return operate


# operators of the language are looked up on the class, not through __getattr__
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _side in ("", "r"):
        setattr(TracedWeight, f"__{_side}{_name}__", _forward(f"__{_side}{_name}__"))
for _name in ("neg", "abs", "getitem", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TracedWeight, f"__{_name}__", _forward(f"__{_name}__"))


def _decode_in(value: Any) -> Any:
    """Return the argument tree with every traced weight decoded."""
    if isinstance(value, TracedWeight):
        return value.dense()
    if type(value) in (tuple, list):
        return type(value)([_decode_in(v) for v in value])
    if type(value) is dict:
        return {k: _decode_in(v) for k, v in value.items()}
    return value


def _linear(input: Tensor, weight: Any, bias: Any = None) -> Any:
    return _product(input, weight, bias, ("out", "in"))


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or input.ndim != 1:
        return NotImplemented
    return _product(mat1, mat2, input, ("in", "out"))


def _product(x: Any, weight: Any, bias: Any, axes: tuple[str, ...]) -> Any:
    if type(weight) is not TracedWeight or isinstance(x, TracedWeight) or isinstance(bias, TracedWeight):
        return NotImplemented
    rpq = weight.rpq
    layout, dtype, device = rpq.layout, rpq.dtype, x.device.type
    if rpq.spec.outliers or rpq.view.axes != axes or x.ndim == 0 or x.shape[-1] != layout.inputs:
        return NotImplemented
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif x.dtype != dtype:
        return NotImplemented  # torch says what is wrong
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    parts, inside = (rpq.stages_codes(), rpq.codebooks, rpq.scales), bias if rpq.zero_row is None else None
    out = rpq.backend.linear(rpq.to_codes(x.reshape(-1, layout.inputs)), *parts, inside, layout)
    if rpq.zero_row is not None:
        out = out.masked_fill(torch.arange(layout.outputs, device=out.device) == rpq.zero_row, 0)
        out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], layout.outputs)


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if type(weight) is not TracedWeight:
        return NotImplemented
    rpq = weight.rpq
    if rpq.rows_are_entries and max_norm is None and not scale_grad_by_freq:
        return rows_of(rpq, input, padding_idx)
    # sparse gradients would be those of the decoded rows, which are no parameter: the codebooks' are dense and small
    return F.embedding(input, rpq(), padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


def _embedding_bag(
    input: Tensor,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Handle `F.embedding_bag`, whose signature it has."""
    if type(weight) is not TracedWeight:
        return NotImplemented
    rpq = weight.rpq
    if rpq.rows_are_entries and max_norm is None and not scale_grad_by_freq and padding_idx is None:
        rows, index = rpq.rows(input.reshape(-1)), torch.arange(input.numel(), device=input.device).view(input.shape)
    else:
        rows, index = rpq(), input
    return F.embedding_bag(
        index, rows, offsets, max_norm, norm_type, scale_grad_by_freq, mode, False, per_sample_weights,
        include_last_offset, padding_idx,
    )  # fmt: skip


TRACED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
