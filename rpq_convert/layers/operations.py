"""Operations on computed weights that need not decode them, or not all of them: products, lookups, convolutions.

Each handler has the signature of the torch function that it stands for, and returns NotImplemented where it does not
apply; the weight is decoded then. Imported for its effect: it fills `HANDLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from rpq_convert.core.rotation import rotate
from rpq_convert.kernels import reference
from rpq_convert.layers.lazy_weight import HANDLERS, ComputedWeight, rpq_of
from rpq_convert.layers.weight import RPQWeight, transformed

CAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts
INDICES = (torch.int64, torch.int32)  # what torch looks up by; it refuses others


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    return _product(input, weight, bias, ("out", "in"))


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`bias + x W`: how transformers' Conv1D calls its weight, stored [in, out]."""
    if beta != 1 or alpha != 1 or input.ndim != 1:
        return NotImplemented
    return _product(mat1, mat2, input, ("in", "out"))


def _product(x: Tensor, weight: Any, bias: Tensor | None, axes: tuple[str, ...]) -> Any:
    """Multiply by a computed weight without expanding it, where that is the faster way."""
    if not isinstance(weight, ComputedWeight) or isinstance(x, ComputedWeight) or isinstance(bias, ComputedWeight):
        return NotImplemented
    rpq = rpq_of(weight)
    backend = rpq.backend
    if rpq.view.axes != axes or backend is reference:
        return NotImplemented
    codes, codebooks, scales = rpq.parts()
    if x.device != codes.device:
        return NotImplemented
    layout, dtype = rpq.layout, rpq._probe.dtype
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        if x.dtype not in CAST or dtype not in CAST:
            return NotImplemented
        dtype = torch.get_autocast_dtype(x.device.type)
    elif x.dtype != dtype:
        return NotImplemented  # torch says what is wrong
    if (
        x.ndim == 0
        or x.layout is not torch.strided
        or x.shape[-1] != layout.inputs
        or x.numel() == 0
        or not _fits(bias, layout.outputs, x)
    ):
        return NotImplemented
    if rpq.zero_row is not None and torch.is_grad_enabled() and (x.requires_grad or rpq.trainable):
        return NotImplemented
    flat = x if x.ndim == 2 else x.reshape(-1, layout.inputs)
    flat = flat if flat.dtype == dtype else flat.to(dtype)
    apart = rpq.outlier_product(flat)
    flat = rpq.to_codes(flat, getattr(backend, "rotate", rotate))
    bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)  # as autocast does, and compiled code
    out = backend.linear(flat, codes, codebooks, scales, bias, layout)
    out = out if apart is None else out + apart
    if rpq.zero_row is not None:
        out[:, rpq.zero_row] = 0 if bias is None else bias[rpq.zero_row].to(dtype)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], layout.outputs)


def _fits(bias: Tensor | None, outputs: int, x: Tensor) -> bool:
    """Whether kernels may add a bias as it is; torch says of any other what is wrong."""
    return bias is None or (bias.shape == (outputs,) and bias.is_cpu == x.is_cpu and bias.is_floating_point())


def _getitem(weight: Any, index: Any) -> Any:
    """`experts[i]`: the weight of one expert, still computed, so that the others are not decoded for it."""
    if not isinstance(weight, ComputedWeight) or isinstance(index, (bool, ComputedWeight)):
        return NotImplemented
    rpq = rpq_of(weight)
    if rpq.view.axes[0] != "expert" or rpq.backend is reference:
        return NotImplemented
    if isinstance(index, Tensor) and (index.ndim or index.dtype == torch.bool):
        return NotImplemented
    if not isinstance(index, (int, Tensor)) or not 0 <= int(index) < rpq.shape[0]:
        return NotImplemented
    return ComputedWeight(rpq.part(int(index)), weight._name)


def _all(values: Any, wanted: int) -> bool:
    return all(v == wanted for v in (values if isinstance(values, (tuple, list)) else (values,)))


def _conv(convolve: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the handler of a convolution: 1 x 1 ones are linear layers, others decode into memory that is used again."""

    def handle(
        input: Tensor, weight: Any, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Any:  # fmt: skip
        if not isinstance(weight, ComputedWeight) or type(input) not in (Tensor, nn.Parameter):
            return NotImplemented
        rpq = rpq_of(weight)
        training = torch.is_grad_enabled() and (
            input.requires_grad or rpq.trainable or (bias is not None and bias.requires_grad)
        )
        if training or rpq.dtype != torch.float32 != input.dtype or torch.is_autocast_enabled("cpu"):
            return NotImplemented
        backend = rpq.backend
        if not hasattr(backend, "pointwise") or input.device.type != "cpu" or rpq.view.axes[0] != "out":
            return NotImplemented
        if rpq.spec.rotation or rpq.spec.outliers or rpq.spec.input_scales:
            return NotImplemented
        parts, layout = rpq.parts(), rpq.layout
        points = math.prod(rpq.shape[2:]) == 1 and groups == 1 and _all(padding, 0) and _all(stride, 1)
        whole = input.ndim == len(rpq.shape) and input.shape[1] == layout.inputs and _fits(bias, layout.outputs, input)
        if points and whole and input.numel():
            pixels = math.prod(input.shape[2:])
            if backend.pointwise_cost(layout, len(input), pixels) <= 1:
                flat = backend.pointwise(input.reshape(len(input), layout.inputs, pixels), *parts, bias, layout)
                return flat.view(len(input), layout.outputs, *input.shape[2:])
        return convolve(
            input, backend.decode_into_buffer(*parts, layout).view(rpq.shape), bias, stride, padding, dilation, groups
        )

    return handle


def _looked_up(index: Tensor, weight: Any, padding_idx: int | None) -> tuple[Tensor, Tensor, int | None] | None:
    """Return (rows, new index, new padding_idx) so that a lookup runs on the few decoded rows it needs."""
    if not isinstance(weight, ComputedWeight):
        return None
    rpq = rpq_of(weight)
    if not rpq.rows_are_entries or index.device.type == "meta" or torch.jit.is_tracing() or not index.numel():
        return None
    if index.dtype not in INDICES:
        return None
    if transformed() or forward_ad._current_level >= 0:
        return None  # vmap knows no `unique`
    entries = rpq.shape[0]
    used, inverse = torch.unique(index, return_inverse=True)
    if used[0] < 0 or used[-1] >= entries:
        bad = used[0] if used[0] < 0 else used[-1]
        raise IndexError(f"index {int(bad)} is out of range for an embedding of {entries} entries")
    if padding_idx is None:
        return rpq.rows(used), inverse, None
    if padding_idx < 0:
        padding_idx += entries
    at = int(torch.searchsorted(used, padding_idx))
    return rpq.rows(used), inverse, at if at < len(used) and int(used[at]) == padding_idx else None


def rows_of(rpq: RPQWeight, index: Tensor, padding_idx: int | None) -> Tensor:
    """Return the rows of an embedding at `index`, whose padding row gets no gradient."""
    flat = index if index.ndim == 1 else index.reshape(-1)
    rows = rpq.rows(flat)
    if padding_idx is not None and torch.is_grad_enabled() and rpq.trainable:
        padding = flat == padding_idx % rpq.shape[0]
        rows = torch.where(padding[:, None], rows.detach(), rows)
    return rows if index.ndim == 1 else rows.view(*index.shape, rpq.shape[1])


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if isinstance(weight, ComputedWeight) and max_norm is None and not scale_grad_by_freq:
        rpq = rpq_of(weight)
        served = (
            rpq.rows_are_entries and rpq.backend is not reference and input.device == rpq.stored_tensor("codes").device
        )
        if served and input.numel() and input.dtype in INDICES:
            return rows_of(rpq, input, padding_idx)
    found = _looked_up(input, weight, padding_idx)
    if found is None:
        return (
            F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)
            if sparse
            else NotImplemented
        )
    rows, index, padding = found
    if max_norm is not None:  # torch rescales the looked-up rows in place, outside autograd
        rows = rows * 1  # a fresh tensor, so that the rescaling touches nothing that is saved for backward
    # sparse gradients would be those of the decoded rows, which are no parameter: the codebooks' are dense and small
    return F.embedding(index, rows, padding, max_norm, norm_type, scale_grad_by_freq, False)


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
    found = _looked_up(input, weight, padding_idx)
    if found is None and sparse:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, False, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    if found is None:
        return NotImplemented
    rows, index, padding = found
    if padding_idx is not None and padding is None:  # the padding row is not among the bags: leave it out of the call
        padding_idx = None
    return F.embedding_bag(
        index, rows * 1 if max_norm is not None else rows, offsets, max_norm, norm_type, scale_grad_by_freq, mode,
        False, per_sample_weights, include_last_offset, padding,
    )  # fmt: skip


def _rescale(sign: int) -> Callable[..., Any]:
    """Return the handler of `weight *= number` (sign 1) or `/=` (-1): exact where the number is a power of two.

    RWKV halves its deeper layers that way in evaluation.
    """

    def handle(weight: Any, other: Any) -> Any:
        if not isinstance(weight, ComputedWeight) or not isinstance(other, (int, float)) or other <= 0:
            return NotImplemented
        rpq = rpq_of(weight)
        if (
            math.frexp(other)[0] != 0.5
            or rpq.caches.expanded is not None
            or (torch.is_grad_enabled() and rpq.trainable)
        ):
            return NotImplemented
        held = [rpq.codebooks if rpq.scales is None else rpq.scales, *([] if rpq.outliers is None else [rpq.outliers])]
        scaled = [values.detach() * float(other) ** sign for values in held]
        if not all(torch.equal(new * float(other) ** -sign, old) for new, old in zip(scaled, held, strict=True)):
            return NotImplemented  # out of the dtype's range
        with torch.no_grad():
            for old, new in zip(held, scaled, strict=True):
                old.copy_(new)
        return weight

    return handle


HANDLERS |= {
    Tensor.mul_: _rescale(1),
    Tensor.__imul__: _rescale(1),
    Tensor.div_: _rescale(-1),
    Tensor.__itruediv__: _rescale(-1),
    Tensor.__getitem__: _getitem,
    F.linear: _linear,
    torch.addmm: _addmm,
    F.conv1d: _conv(F.conv1d),
    F.conv2d: _conv(F.conv2d),
    F.conv3d: _conv(F.conv3d),
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
