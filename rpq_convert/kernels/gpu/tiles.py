"""Tiles of a coded matrix on a GPU, in Triton: read from codes and codebooks, and gradients written back into codebooks.

A tile of `M [n, length]` is [R rows, Q pieces, PIECE]. A piece is the part of a sub-vector that one thread reads at once: the
largest power of two, up to 16, that divides `dim`. So a code is read once for PIECE values, codewords come as vectors, no
lane is lost to a dim like 5 or 72, and the same source serves every dim. Codewords are gathered from global memory: those
of a block stay in the L1 cache, and Triton has no gather from shared memory that is as wide.

Positions that are multiplied by a stride are 64 bits wide, since codes and weights may have more than 2^31 elements.
Arguments that change the machine code are the constants in capitals: few values each, none of them a size of a layer but
`dim`, so that a model needs few compilations. Signatures are long because Triton takes every address, stride and size as an
argument of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpq_convert.core.layout import Layout

WEIGHTS = 4096  # of a tile


@triton.jit
def at_tile(codes, by_block, by_row, books, blocks, row, row_ok, piece, DIM: tl.constexpr, PIECE: tl.constexpr, SHARE: tl.constexpr):  # fmt: skip
    """Return where a tile's codes lie [R, Q], which of them there are, and where its pieces start in a codebook [Q]."""
    PIECES: tl.constexpr = DIM // PIECE
    block = piece // PIECES
    inside = ((piece % PIECES) * PIECE).to(tl.int64)
    if SHARE == "own":
        start = block.to(tl.int64) * (256 * DIM) + inside
    elif SHARE == "one":
        start = inside
    else:
        start = block.to(tl.int64) * books // blocks * (256 * DIM) + inside
    ok = row_ok[:, None] & (block < blocks)[None, :]
    return codes + (row * by_row)[:, None] + (block.to(tl.int64) * by_block)[None, :], ok, start


@triton.jit
def read_tile(
    codes, by_stage, by_block, by_row, table, by_table, books, blocks, row, row_ok, piece,
    DIM: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Return rows `row` [R] int64 and pieces `piece` [Q] of M, [R, Q, PIECE], without scales; float32 if stages are summed."""
    place, ok, start = at_tile(codes, by_block, by_row, books, blocks, row, row_ok, piece, DIM, PIECE, SHARE)
    start = start[None, :, None] + tl.arange(0, PIECE)[None, None, :]
    code = tl.load(place, ok, other=0).to(tl.int32)
    total = tl.load(table + start + (code * DIM)[:, :, None], ok[:, :, None], other=0)
    if STAGES > 1:
        total = total.to(tl.float32)
        for _stage in tl.static_range(1, STAGES):
            place += by_stage
            table += by_table
            code = tl.load(place, ok, other=0).to(tl.int32)
            total += tl.load(table + start + (code * DIM)[:, :, None], ok[:, :, None], other=0).to(tl.float32)
    return total


@triton.jit
def add_tile(
    values, codes, by_stage, by_block, by_row, grad, by_table, books, blocks, row, row_ok, piece,
    DIM: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Add a tile's gradient [R, Q, PIECE] float32 to those of the codewords that it came from."""
    place, ok, start = at_tile(codes, by_block, by_row, books, blocks, row, row_ok, piece, DIM, PIECE, SHARE)
    start = start[None, :, None] + tl.arange(0, PIECE)[None, None, :]
    for _stage in tl.static_range(STAGES):
        code = tl.load(place, ok, other=0).to(tl.int32)
        tl.atomic_add(grad + start + (code * DIM)[:, :, None], values, ok[:, :, None], sem="relaxed")
        place += by_stage
        grad += by_table


@triton.jit
def rows_of_program(first, index, rows, entries, R: tl.constexpr):
    """Return the rows of this program, which of them there are, and which rows of M they stand for."""
    row = first + tl.arange(0, R).to(tl.int64)
    row_ok = row < rows
    source = row
    if index is not None:
        source = tl.load(index + row, row_ok, other=0)
        inside = (source >= 0) & (source < entries)
        tl.device_assert(inside, "an index is out of range for the embedding", row_ok)
        row_ok = row_ok & inside  # nothing is read outside even where the assertion is compiled out
    return row, row_ok, source


@triton.jit
def decode_kernel(
    codes, by_stage, by_block, by_row, table, by_table, books, blocks, scales, index, rows, entries, length,
    out, out_by_row, out_by_column,
    DIM: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    SCALED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Write M, or its rows `index`, into memory of any strides; SCALED says which way scales run: "rows", "columns", ""."""
    tiles = tl.cdiv(rows, R)
    which = tl.program_id(0)
    row, row_ok, source = rows_of_program((which % tiles).to(tl.int64) * R, index, rows, entries, R)
    piece = which // tiles * Q + tl.arange(0, Q)
    value = read_tile(
        codes, by_stage, by_block, by_row, table, by_table, books, blocks, source, row_ok, piece, DIM, PIECE, STAGES, SHARE
    )  # fmt: skip
    kind: tl.constexpr = out.dtype.element_ty
    value = value.to(kind)
    column = (piece * PIECE)[:, None] + tl.arange(0, PIECE)[None, :]
    if SCALED == "rows":
        factor = tl.load(scales + source, row_ok, other=0).to(kind).to(tl.float32)
        value = (value.to(tl.float32) * factor[:, None, None]).to(kind)
    if SCALED == "columns":
        factor = tl.load(scales + column, column < length, other=0).to(kind).to(tl.float32)
        value = (value.to(tl.float32) * factor[None, :, :]).to(kind)
    place = out + (row * out_by_row)[:, None, None] + (column.to(tl.int64) * out_by_column)[None, :, :]
    tl.store(place, value, row_ok[:, None, None] & (column < length)[None, :, :])


@triton.jit
def decode_gradient_kernel(
    codes, by_stage, by_block, by_row, grad, by_table, books, blocks, scales, index, rows, entries, length,
    given, given_by_row, given_by_column, by_copy, copies,
    DIM: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    SCALED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Add the gradient of M (or of its rows `index`), of any strides, to `grad` [copies, stages, books, 256, dim] float32."""
    tiles = tl.cdiv(rows, R)
    which = tl.program_id(0)
    row, row_ok, source = rows_of_program((which % tiles).to(tl.int64) * R, index, rows, entries, R)
    piece = which // tiles * Q + tl.arange(0, Q)
    column = (piece * PIECE)[:, None] + tl.arange(0, PIECE)[None, :]
    place = given + (row * given_by_row)[:, None, None] + (column.to(tl.int64) * given_by_column)[None, :, :]
    value = tl.load(place, row_ok[:, None, None] & (column < length)[None, :, :], other=0).to(tl.float32)
    if SCALED == "rows":
        value *= tl.load(scales + source, row_ok, other=0).to(tl.float32)[:, None, None]
    if SCALED == "columns":
        value *= tl.load(scales + column, column < length, other=0).to(tl.float32)[None, :, :]
    grad += which % copies * by_copy
    add_tile(
        value, codes, by_stage, by_block, by_row, grad, by_table, books, blocks, source, row_ok, piece,
        DIM, PIECE, STAGES, SHARE,
    )  # fmt: skip


# ---- the same from torch -----------------------------------------------------------------------------------------------


def launch(kernel: Any, programs: tuple[int, ...], on: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of `on`; Triton itself would take the current one."""
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[programs](*arguments, **constants)
    else:
        kernel[programs](*arguments, **constants)


def coded(codes: Tensor, table: Tensor, layout: Layout) -> tuple[Any, ...]:
    """Return a coded matrix as the first arguments of every kernel; `table` may be a gradient of codebooks as well."""
    return codes, *codes.stride(), table, layout.books * 256 * layout.dim, layout.books, layout.blocks


def constants(layout: Layout) -> dict[str, Any]:
    """Return the constants that a layout fixes at compilation."""
    share = "one" if layout.books == 1 else "own" if layout.books == layout.blocks else "some"
    piece = min(16, layout.dim & -layout.dim)
    return {"DIM": layout.dim, "PIECE": piece, "STAGES": layout.stages, "SHARE": share}


def tile(layout: Layout, columns: int) -> tuple[int, int]:
    """Return (R, Q) of a tile of WEIGHTS weights that is about so many columns wide."""
    wide = max(columns, min(16, layout.dim & -layout.dim))
    return WEIGHTS // wide, wide // min(16, layout.dim & -layout.dim)


def scaled(layout: Layout, scales: Tensor | None) -> str:
    """Return which axis of M has the scales, one per output."""
    return "" if scales is None else "rows" if layout.axis == "in" else "columns"


def strides(weight: Tensor, layout: Layout) -> tuple[int, int]:
    """Return the strides of M's rows and columns in a weight [outputs, inputs]."""
    by_output, by_input = weight.stride()
    return (by_output, by_input) if layout.axis == "in" else (by_input, by_output)


def grid(layout: Layout, rows: int, R: int, Q: int) -> int:
    """Return how many tiles cover `rows` rows of M."""
    pieces = layout.blocks * (layout.dim // min(16, layout.dim & -layout.dim))
    return triton.cdiv(rows, R) * triton.cdiv(pieces, Q)


def decode(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Return the weight [outputs, inputs], or its rows `index`, in `dtype`, contiguous; not differentiable."""
    rows = layout.n if index is None else index.numel()
    out = codes.new_empty(layout.outputs if index is None else rows, layout.inputs, dtype=dtype)
    if not out.numel():
        return out
    R, Q = tile(layout, 64)
    launch(
        decode_kernel, (grid(layout, rows, R, Q),), out,
        *coded(codes, codebooks.detach().contiguous(), layout), scales, index, rows, layout.n, layout.length,
        out, *strides(out, layout), **constants(layout), SCALED=scaled(layout, scales), R=R, Q=Q,
        debug=index is not None, sanitize_overflow=False,
    )  # fmt: skip
    return out


def new_gradient(codebooks: Tensor, layout: Layout) -> Tensor:
    """Return zeros [copies, stages, books, 256, dim] float32 that programs add to.

    Few codebooks have copies that programs take in turn, as additions to one place wait for each other.
    """
    copies = max(1, min(16, layout.blocks) // layout.books)
    return codebooks.new_zeros(copies, layout.stages, layout.books, 256, layout.dim, dtype=torch.float32)


def decode_gradient(
    gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, layout: Layout
) -> Tensor:
    """Return the gradient of codebooks from that of the weight [outputs, inputs], or of its rows `index`."""
    rows = layout.n if index is None else index.numel()
    grad = new_gradient(codebooks, layout)
    if gradient.numel():
        R, Q = tile(layout, 64)
        launch(
            decode_gradient_kernel, (grid(layout, rows, R, Q),), grad,
            *coded(codes, grad, layout), scales, index, rows, layout.n, layout.length, gradient, *strides(gradient, layout),
            grad.stride(0), grad.shape[0], **constants(layout), SCALED=scaled(layout, scales), R=R, Q=Q,
        )  # fmt: skip
    return grad.sum(0).view(codebooks.shape).to(codebooks.dtype)
