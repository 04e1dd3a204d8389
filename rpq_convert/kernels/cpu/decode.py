"""Decoding with gradients: the whole weight, or the rows of an embedding, with the loops of `expand`.

Saved for backward are codes and codebooks, never the weight.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference
from rpq_convert.kernels.cpu import expand as e
from rpq_convert.kernels.cpu.launch import share
from rpq_convert.kernels.cpu.prepared import cached_float32, contiguous_float32, pointer, prepared
from rpq_convert.kernels.jit.threads import FIRST, Work, run

STEP = 64  # positions of one part
KEEP = 1 << 23  # weights of a buffer that is kept
_local = threading.local()


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs], contiguous, in `dtype`, with the bits of `reference.decode`.

    Args:
        codes: uint8 [stages, blocks, n], any strides.
        codebooks: [stages, books, 256, dim], of any float dtype.
        scales: [outputs].
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (codebooks, scales)):
        return _Decode.apply(codes, codebooks, scales, None, layout, dtype)
    return _decode(codes, codebooks, scales, None, layout, dtype)


def decode_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Return rows `index` [k] of a weight whose sub-vectors run along its inputs: [k, inputs]; IndexError for an index out of range."""
    index = index.long().contiguous()
    check_rows(index, layout.n)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (codebooks, scales)):
        return _Decode.apply(codes, codebooks, scales, index, layout, dtype)
    if dtype != torch.float32:
        return _decode(codes, codebooks, scales, index, layout, dtype)
    factors = cached_float32(scales)
    kind = ("rows", layout, codes.data_ptr(), codes.stride(), pointer(factors))
    work, _kept = prepared(codebooks, kind, lambda: _row_work(codes, codebooks, factors, layout))
    count = index.shape[0]
    out = torch.empty(count, layout.inputs, dtype=torch.float32, device=codes.device)
    changes = ((e.ROWS, count), (e.OUT, out.data_ptr()), (e.INDEX, index.data_ptr()))
    work.run(-(-count // STEP), 0, changes)
    return out


def _row_work(codes: Tensor, codebooks: Tensor, factors: Tensor | None, layout: Layout) -> tuple[Work, Any]:
    """Return the work that decodes rows, but for the rows themselves, and what must stay alive for it."""
    tables = prepared(codebooks, "float32")
    fields = list(_fields(codes, tables, factors, None, layout, codes, STEP))
    fields[e.OUT_STRIDE - FIRST] = layout.inputs
    return Work(e.rows, fields), (tables, factors)


def check_rows(index: Tensor, entries: int) -> None:
    """Raise IndexError where an index [k] int64 is not the number of an entry."""
    bad = e.outside(index.data_ptr(), index.numel(), entries)
    if bad != -1:
        what = int(index.min()) if bad == -2 else bad
        raise IndexError(f"index {what} is out of range for an embedding of {entries} entries")


def _fields(
    codes: Tensor, tables: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout, out: Tensor, step: int,
    grad: int = 0, grad_bytes: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    rows = layout.n if index is None else index.numel()
    return (
        codes.data_ptr(), *codes.stride(), tables.data_ptr(), layout.stages, layout.books, layout.blocks, layout.dim, rows,
        layout.length, out.data_ptr(), out.stride(0), pointer(scales), pointer(index), step, grad, grad_bytes,
    )  # fmt: skip


def decode_into_buffer(codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout) -> Tensor:
    """Return the weight in float32 in a buffer of this thread that the next call overwrites; not differentiable.

    Fresh memory costs more than decoding: every page of it must be cleared by the system first.
    """
    held = _buffer(layout.outputs * layout.inputs).view(layout.outputs, layout.inputs)
    return _decode(codes, codebooks, scales, None, layout, torch.float32, held)


def _buffer(size: int) -> Tensor:
    """Return `size` floats of this thread's buffer."""
    held = getattr(_local, "weight", None)
    if size > KEEP or held is None or held.numel() < size or held.is_inference() != torch.is_inference_mode_enabled():
        held = torch.empty(size, dtype=torch.float32)
        if size <= KEEP:
            _local.weight = held
    return held[:size]


def _decode(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout, dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if layout.stages > 1 and dtype != torch.float32:
        wide = _decode(codes, codebooks, None, index, layout, torch.float32).to(dtype)
        return _scale(wide, scales, index)
    count = layout.outputs if index is None else index.numel()
    out = torch.empty(count, layout.inputs, dtype=dtype, device=codes.device) if out is None else out
    task, unit, fields, kept = _task(codes, codebooks, scales, index, layout, out)
    run(task, fields, -(-count // unit))
    del kept
    return out if dtype == torch.float32 else _scale(out, scales, index)


def _task(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout, out: Tensor
) -> tuple[Any, int, tuple[int, ...], Any]:
    """Return the task that decodes, the output rows of one of its numbers, its fields, and what must stay alive."""
    wide = out.dtype == torch.float32
    tables = prepared(
        codebooks, str(out.dtype).removeprefix("torch.") + (" transposed" if layout.axis == "out" else "")
    )
    factors = cached_float32(scales) if wide else None
    fields = _fields(codes, tables, factors, index, layout, out, STEP)
    if layout.axis == "in":
        return e.rows if wide else e.rows_short, STEP, fields, (tables, factors)
    return e.columns if wide else e.columns_short, layout.dim, fields, (tables, factors)


# Weights decoded at a time. Smaller tiles stay in the second-level cache, but BLAS loses more (Sapphire Rapids, 4096 x 4096,
# 512 tokens, over dense: 2^19 1.27, 2^20 1.17, 2^21 1.08, 2^22 1.07; the whole weight 1.20)
TILE = 1 << 21


def tiled_linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """Return `x W^T + bias` by decoding and multiplying some rows of W at a time; not differentiable."""
    if x.dtype != torch.float32:
        return torch.nn.functional.linear(x, _decode(codes, codebooks, scales, None, layout, x.dtype), bias)
    unit = STEP if layout.axis == "in" else layout.dim
    rows = -(-max(1, TILE // layout.inputs) // unit) * unit
    if rows >= layout.outputs:
        return torch.nn.functional.linear(x, decode_into_buffer(codes, codebooks, scales, layout), bias)
    out = x.new_empty(x.shape[0], layout.outputs)
    buffer = _buffer(rows * layout.inputs).view(rows, layout.inputs)
    task, unit, fields, kept = _task(codes, codebooks, scales, None, layout, buffer)
    place = e.OUT - FIRST
    for low in range(0, layout.outputs, rows):
        high = min(low + rows, layout.outputs)
        shifted = (*fields[:place], buffer.data_ptr() - 4 * low * layout.inputs, *fields[place + 1 :])
        run(task, shifted, -(-high // unit), first=low // unit)
        out[:, low:high] = torch.nn.functional.linear(x, buffer[: high - low], None if bias is None else bias[low:high])
    del kept
    return out


def _scale(weight: Tensor, scales: Tensor | None, index: Tensor | None) -> Tensor:
    if scales is None:
        return weight
    scales = scales.detach() if index is None else scales.detach()[index]
    return weight.mul_(scales.to(weight.dtype)[:, None])


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, codebooks: Tensor, scales: Any, index: Any, layout: Layout, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(codes, codebooks, scales, index)
        ctx.layout = layout
        return _decode(codes, codebooks, scales, index, layout, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        codes, codebooks, scales, index = ctx.saved_tensors
        layout, needs = ctx.layout, ctx.needs_input_grad
        if reference.needs_graph(gradient):  # a gradient of this gradient is wanted: ordinary operations have one
            return None, *reference.decode_graph(gradient, ctx.saved_tensors, layout, needs[1:3]), None, None, None
        dbooks, dscales = decode_gradients(gradient, codes, codebooks, scales, index, layout, needs[1:3])
        return None, dbooks, dscales, None, None, None


def decode_gradients(
    gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of (codebooks, scales) from that of the weight, or of its rows `index`; None where not needed."""
    dscales = None
    if needs[1]:
        assert scales is not None
        bare = _decode(codes, codebooks, None, index, layout, torch.float32)
        dscales = (bare * gradient).sum(1)
        if index is not None:
            dscales = torch.zeros(layout.n, dtype=dscales.dtype).index_add_(0, index, dscales)
        dscales = dscales.to(scales.dtype)
    return _gradient(gradient, codes, codebooks, scales, index, layout) if needs[0] else None, dscales


def _gradient(
    gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout
) -> Tensor:
    flat, factors = contiguous_float32(gradient), cached_float32(scales)
    assert flat is not None
    columns = layout.axis == "out"
    count = layout.blocks if columns else flat.shape[0]
    step = share(count, layout.stages * flat.numel(), 1)
    pieces = max(1, -(-count // step))
    own = 1 if columns and layout.books == layout.blocks else pieces  # parts that share a codebook sum apart
    grads = flat.new_zeros(own, layout.stages * layout.books * 256 * layout.dim)
    fields = _fields(
        codes, codebooks, factors, index, layout, flat, step, grads.data_ptr(), 4 * grads.shape[1] * (own > 1)
    )
    run(e.gradient_columns if columns else e.gradient_rows, fields, pieces)
    total = grads[0] if own == 1 else grads.sum(0)
    return total.reshape(codebooks.shape).to(codebooks.dtype)
