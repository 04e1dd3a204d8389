"""Products with a coded matrix on a GPU, in Triton: tiles are decoded into registers and multiplied; the weight is never stored.

With `M [n, length]`, a product sums over M's columns or over its rows: forward or backward, by the axis of the sub-vectors. One
token multiplies and adds; more tokens go to the tensor cores (`tl.dot`), 16 or more at a time. The sum is divided into parts
where the results alone do not make enough programs; parts are written side by side and added in order, so bits do not depend on
scheduling. The gradient of codebooks is the one exception: programs add to it as they come (`tiles.add_tile`). Kernels have
long signatures: Triton takes every address, stride and size as an argument of its own, and compiles by the constants in
capitals.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpq_convert.core.layout import Layout
from rpq_convert.kernels.gpu.tiles import (
    add_tile,
    coded,
    constants,
    grid,
    launch,
    new_gradient,
    read_tile,
    rows_of_program,
    scaled,
    strides,
    tile,
)

PROGRAMS = 256  # that a GPU is kept busy with: about two for each multiprocessor of a large one; an assumption
STEPS = 4  # tiles that a part of a sum has at least


@triton.jit
def finish(value, scales, bias, at, ok):
    """Apply scales and bias, where given, to results `at`."""
    if scales is not None:
        value *= tl.load(scales + at, ok, other=0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + at, ok, other=0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["span"])
def inner_kernel(
    codes, by_stage, by_block, by_row, table, by_table, books, blocks, factors, index, rows, entries, length,
    x, x_by_row, x_by_column, scales, bias, out, span,
    DIM: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    OVER: tl.constexpr, WHOLE: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Sum M times x over its columns or rows (OVER): x a vector, or a matrix of M's shape (WHOLE).

    Part p of the sum, `span` rows or pieces, is row p of `out` [parts, results]. `factors` multiply a vector x.
    """
    inner = tl.arange(0, PIECE)[None, :]
    sums = tl.zeros((R, Q, PIECE), tl.float32)
    start = tl.program_id(1) * span
    if OVER == "columns":
        row, row_ok, source = rows_of_program(tl.program_id(0).to(tl.int64) * R, index, rows, entries, R)
        for step in range(0, span, Q):
            piece = start + step + tl.arange(0, Q)
            column = (piece * PIECE)[:, None] + inner
            ok = column < length
            value = read_tile(
                codes, by_stage, by_block, by_row, table, by_table, books, blocks, source, row_ok, piece,
                DIM, PIECE, STAGES, SHARE,
            )  # fmt: skip
            if WHOLE:
                place = x + (row * x_by_row)[:, None, None] + (column.to(tl.int64) * x_by_column)[None, :, :]
                with_ = tl.load(place, row_ok[:, None, None] & ok[None, :, :], other=0).to(tl.float32)
                sums += value.to(tl.float32) * with_
            else:
                with_ = tl.load(x + column.to(tl.int64) * x_by_column, ok, other=0).to(tl.float32)
                if factors is not None:
                    with_ *= tl.load(factors + column, ok, other=0).to(tl.float32)
                sums += value.to(tl.float32) * with_[None, :, :]
        total = tl.sum(tl.sum(sums, 2), 1)
        total = finish(total, scales, bias, row, row_ok)
        tl.store(out + tl.program_id(1).to(tl.int64) * rows + row, total.to(out.dtype.element_ty), row < rows)
    else:
        piece = tl.program_id(0) * Q + tl.arange(0, Q)
        column = (piece * PIECE)[:, None] + inner
        ok = column < length
        for step in range(0, span, R):
            row = (start + step + tl.arange(0, R)).to(tl.int64)
            row_ok = row < rows
            value = read_tile(
                codes, by_stage, by_block, by_row, table, by_table, books, blocks, row, row_ok, piece,
                DIM, PIECE, STAGES, SHARE,
            )  # fmt: skip
            if WHOLE:
                place = x + (row * x_by_row)[:, None, None] + (column.to(tl.int64) * x_by_column)[None, :, :]
                with_ = tl.load(place, row_ok[:, None, None] & ok[None, :, :], other=0).to(tl.float32)
                sums += value.to(tl.float32) * with_
            else:
                with_ = tl.load(x + row * x_by_row, row_ok, other=0).to(tl.float32)
                if factors is not None:
                    with_ *= tl.load(factors + row, row_ok, other=0).to(tl.float32)
                sums += value.to(tl.float32) * with_[:, None, None]
        total = finish(tl.sum(sums, 0), scales, bias, column, ok)
        tl.store(out + tl.program_id(1).to(tl.int64) * length + column, total.to(out.dtype.element_ty), ok)


@triton.jit(do_not_specialize=["span", "tokens"])
def dot_kernel(
    codes, by_stage, by_block, by_row, table, by_table, books, blocks, factors, rows, length,
    x, x_by_token, x_by_entry, tokens, scales, bias, out, span,
    DIM: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    OVER: tl.constexpr, T: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply x [tokens, entries] by M: the sum runs over M's columns or rows (OVER); out [parts, tokens, results].

    Operands are rounded to x's dtype, as a dense product's are, and multiplied as DOT; sums are float32.
    """
    kind: tl.constexpr = x.dtype.element_ty
    C: tl.constexpr = Q * PIECE
    token = (tl.program_id(2) * T + tl.arange(0, T)).to(tl.int64)
    token_ok = token < tokens
    start = tl.program_id(1) * span
    part = tl.program_id(1).to(tl.int64) * tokens
    if OVER == "columns":
        row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        row_ok = row < rows
        sums = tl.zeros((T, R), tl.float32)
        for step in range(0, span, Q):
            column = (start + step) * PIECE + tl.arange(0, C)
            ok = column < length
            value = read_tile(
                codes, by_stage, by_block, by_row, table, by_table, books, blocks, row, row_ok,
                start + step + tl.arange(0, Q), DIM, PIECE, STAGES, SHARE,
            )  # fmt: skip
            at = x + (token * x_by_token)[:, None] + (column.to(tl.int64) * x_by_entry)[None, :]
            left = tl.load(at, token_ok[:, None] & ok[None, :], other=0)
            if factors is not None:
                left = (left.to(tl.float32) * tl.load(factors + column, ok, other=0).to(tl.float32)[None, :]).to(kind)
            right = tl.trans(tl.reshape(value, (R, C)).to(kind).to(DOT))
            sums = tl.dot(left.to(DOT), right, sums, input_precision=PRECISION)
        total = finish(sums, scales, bias, row[None, :], row_ok[None, :])
        place = out + ((part + token) * rows)[:, None] + row[None, :]
        tl.store(place, total.to(out.dtype.element_ty), token_ok[:, None] & row_ok[None, :])
    else:
        piece = tl.program_id(0) * Q + tl.arange(0, Q)
        column = tl.program_id(0) * C + tl.arange(0, C)
        ok = column < length
        sums = tl.zeros((T, C), tl.float32)
        for step in range(0, span, R):
            row = (start + step + tl.arange(0, R)).to(tl.int64)
            row_ok = row < rows
            value = read_tile(
                codes, by_stage, by_block, by_row, table, by_table, books, blocks, row, row_ok, piece,
                DIM, PIECE, STAGES, SHARE,
            )  # fmt: skip
            at = x + (token * x_by_token)[:, None] + (row * x_by_entry)[None, :]
            left = tl.load(at, token_ok[:, None] & row_ok[None, :], other=0)
            if factors is not None:
                left = (left.to(tl.float32) * tl.load(factors + row, row_ok, other=0).to(tl.float32)[None, :]).to(kind)
            sums = tl.dot(left.to(DOT), tl.reshape(value, (R, C)).to(kind).to(DOT), sums, input_precision=PRECISION)
        total = finish(sums, scales, bias, column[None, :], ok[None, :])
        place = out + ((part + token) * length)[:, None] + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), token_ok[:, None] & ok[None, :])


@triton.jit(do_not_specialize=["parts", "count"])
def finish_kernel(partial, parts, count, results, scales, bias, out, SIZE: tl.constexpr):
    """Add parts [parts, count] in order, then scales and bias, of `results` each."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    ok = at < count
    total = tl.zeros((SIZE,), tl.float32)
    for _part in range(parts):
        total += tl.load(partial + at, ok, other=0)
        partial += count
    total = finish(total, scales, bias, at % results, ok)
    tl.store(out + at, total.to(out.dtype.element_ty), ok)


@triton.jit(do_not_specialize=["tokens"])
def book_gradient_kernel(
    codes, by_stage, by_block, by_row, grad, by_table, books, blocks, scales, rows, length,
    a, a_by_token, a_by_row, b, b_by_token, b_by_column, tokens, by_copy, copies,
    DIM: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    SCALED: tl.constexpr, T: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of M's gradient `a^T b`, a [tokens, rows], b [tokens, columns], to that of the codebooks."""
    C: tl.constexpr = Q * PIECE
    tiles = tl.cdiv(rows, R)
    which = tl.program_id(0)
    row = (which % tiles).to(tl.int64) * R + tl.arange(0, R)
    row_ok = row < rows
    piece = which // tiles * Q + tl.arange(0, Q)
    column = which // tiles * C + tl.arange(0, C)
    ok = column < length
    sums = tl.zeros((R, C), tl.float32)
    for step in range(0, tokens, T):
        token = (step + tl.arange(0, T)).to(tl.int64)
        token_ok = token < tokens
        at = a + (token * a_by_token)[None, :] + (row * a_by_row)[:, None]
        left = tl.load(at, token_ok[None, :] & row_ok[:, None], other=0)
        at = b + (token * b_by_token)[:, None] + (column.to(tl.int64) * b_by_column)[None, :]
        right = tl.load(at, token_ok[:, None] & ok[None, :], other=0)
        sums = tl.dot(left.to(DOT), right.to(DOT), sums, input_precision=PRECISION)
    if SCALED == "rows":
        sums *= tl.load(scales + row, row_ok, other=0).to(tl.float32)[:, None]
    if SCALED == "columns":
        sums *= tl.load(scales + column, ok, other=0).to(tl.float32)[None, :]
    grad += which % copies * by_copy
    add_tile(
        tl.reshape(sums, (R, Q, PIECE)), codes, by_stage, by_block, by_row, grad, by_table, books, blocks, row, row_ok,
        piece, DIM, PIECE, STAGES, SHARE,
    )  # fmt: skip


# ---- the same from torch -----------------------------------------------------------------------------------------------


def kinds(dtype: torch.dtype) -> dict[str, Any]:
    """Return how `tl.dot` multiplies: as torch's own products do, whose float32 is exact unless the user allows less."""
    interpreted = not isinstance(dot_kernel, triton.runtime.JITFunction)  # which has no bfloat16 products
    narrow = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if interpreted else tl.bfloat16}
    exact = torch.get_float32_matmul_precision() == "highest"
    return {"DOT": narrow.get(dtype, tl.float32), "PRECISION": "ieee" if exact else "tf32"}


def _spans(results: int, entries: int, step: int) -> tuple[int, int]:
    """Return (parts, span): `entries` in parts of whole steps, enough of them for PROGRAMS programs."""
    steps = triton.cdiv(entries, step)
    parts = max(1, min(PROGRAMS // results, steps // STEPS))
    span = triton.cdiv(steps, parts) * step
    return triton.cdiv(entries, span), span


def product(
    x: Tensor, codes: Tensor, codebooks: Tensor, layout: Layout, over: str, *,
    factors: Tensor | None = None, scales: Tensor | None = None, bias: Tensor | None = None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return `x M^T` (over "columns", x [tokens, length]) or `x M` (over "rows", x [tokens, n]), any strides, in `dtype`.

    `factors` multiply x's columns before, `scales` and `bias` the result's columns after.
    """
    tokens, fixed = x.shape[0], constants(layout)
    pieces, results = layout.blocks * (layout.dim // fixed["PIECE"]), layout.n if over == "columns" else layout.length
    one = tokens == 1
    R, Q = tile(layout, 8 if one else 64)
    if over == "columns":
        outer, (parts, span) = triton.cdiv(layout.n, R), _spans(triton.cdiv(layout.n, R), pieces, Q)
    else:
        outer, (parts, span) = triton.cdiv(pieces, Q), _spans(triton.cdiv(pieces, Q), layout.n, R)
    out = x.new_empty(tokens, results, dtype=dtype)
    to = out if parts == 1 else x.new_empty(parts, tokens, results, dtype=torch.float32)
    after = (scales, bias) if parts == 1 else (None, None)
    matrix = coded(codes, codebooks.detach().contiguous(), layout)
    if one:
        by_entry = x.stride(1)
        launch(
            inner_kernel, (outer, parts), x, *matrix, factors, None, layout.n, layout.n, layout.length, x, by_entry, by_entry,
            *after, to, span, **fixed, OVER=over, WHOLE=False, R=R, Q=Q,
        )  # fmt: skip
    else:
        T = max(16, min(64, triton.next_power_of_2(tokens)))
        launch(
            dot_kernel, (outer, parts, triton.cdiv(tokens, T)), x, *matrix, factors, layout.n, layout.length,
            x, *x.stride(), tokens, *after, to, span, **fixed, OVER=over, T=T, R=R, Q=Q, **kinds(x.dtype),
        )  # fmt: skip
    if parts > 1:
        count = out.numel()
        launch(finish_kernel, (triton.cdiv(count, 256),), x, to, parts, count, results, scales, bias, out, SIZE=256)
    return out


def book_gradient(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout
) -> Tensor:
    """Return the gradient of codebooks of a linear layer from x [tokens, inputs] and the result's gradient."""
    grad = new_gradient(codebooks, layout)
    a, b = (gradient, x) if layout.axis == "in" else (x, gradient)
    R, Q = tile(layout, 64)
    launch(
        book_gradient_kernel, (grid(layout, layout.n, R, Q),), x, *coded(codes, grad, layout), scales, layout.n, layout.length,
        a, *a.stride(), b, *b.stride(), x.shape[0], grad.stride(0), grad.shape[0],
        **constants(layout), SCALED=scaled(layout, scales), T=32, R=R, Q=Q, **kinds(x.dtype),
    )  # fmt: skip
    return grad.sum(0).view(codebooks.shape).to(codebooks.dtype)


def scale_gradient(gradient: Tensor, codes: Tensor, codebooks: Tensor, index: Tensor | None, layout: Layout) -> Tensor:
    """Return the sum of gradient times bare weight over inputs: of every output, or of rows `index` [k]; float32."""
    R, Q = tile(layout, 64)
    rows = layout.n if index is None else index.numel()
    pieces = layout.blocks * (layout.dim // constants(layout)["PIECE"])
    over, results, span = ("columns", rows, pieces) if layout.axis == "in" else ("rows", layout.length, rows)
    programs = triton.cdiv(rows, R) if layout.axis == "in" else triton.cdiv(pieces, Q)
    out = gradient.new_empty(results, dtype=torch.float32)
    if out.numel():
        launch(
            inner_kernel, (programs, 1), gradient, *coded(codes, codebooks.detach().contiguous(), layout), None, index,
            rows, layout.n, layout.length, gradient, *strides(gradient, layout), None, None, out, span,
            **constants(layout), OVER=over, WHOLE=True, R=R, Q=Q,
        )  # fmt: skip
    return out
