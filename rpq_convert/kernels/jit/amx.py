"""Intel's tile registers (AMX) inside numba: eight of them, each 16 rows of 64 bytes.

`multiply_tiles` makes 16 x 16 sums of 32 products of bfloat16 in 16 cycles, added to float32: sixteen times what two
vector units do in float32. Three such products give what one in float32 nearly gives: a number is the sum of two of
bfloat16 (`halves_of`), and of the four products of the parts the least, 2^-18 of the whole, is left out.

The registers are not in use in a process until it asks the kernel for them (`allowed`); a thread sets their shapes before
and puts back what it found after, since torch's own kernels use them too. What was measured on a Sapphire Rapids: clearing
a register costs 35 cycles, loading it 8, so sums start from a loaded tile; registers are not renamed, so a tile is best
stored four products after the one that filled it.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rpq_convert.kernels.jit.vectors import FEATURES, emit_minimum, f32x16, i32x16

BYTE, WORD, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS, WHOLE = ir.VectorType(ir.FloatType(), 16), ir.VectorType(WORD, 16)
TILE = 1024  # bytes


@cache
def amx_allowed() -> bool:
    """Ask Linux for the tile registers, once; False where the processor or the kernel has none."""
    has = all(FEATURES.get(name) for name in ("amx-tile", "amx-bf16", "avx512f"))
    if not has or platform.system() != "Linux":
        return False
    request, permission, data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return int(ctypes.CDLL(None).syscall(request, permission, data)) == 0


def tile_config() -> np.ndarray:
    """Return the 64 bytes that make every register 16 rows of 64 bytes."""
    wanted = np.zeros(64, np.uint8)
    wanted[0] = 1  # the palette
    wanted[16:32:2] = 64  # bytes in a row
    wanted[48:56] = 16  # rows
    return wanted


def _call(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, BYTE.as_pointer())


def _register(number: Any) -> Any:
    return ir.Constant(BYTE, number.literal_value)


@intrinsic
def save_tile_config(context, address):
    """Write the shapes that this thread's registers have, 64 bytes."""

    def emit(context, builder, signature, args):
        _call(builder, "sttilecfg", _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def load_tile_config(context, address):
    def emit(context, builder, signature, args):
        _call(builder, "ldtilecfg", _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic(prefer_literal=True)
def load_tile(context, tile, address):
    """Read 16 rows of 64 bytes, one after another."""

    def emit(context, builder, signature, args):
        _call(builder, "tileloadd64", _register(tile), _pointer(builder, args[1]), ir.Constant(LONG, 64))
        return context.get_dummy_value()

    return types.void(tile, types.int64), emit


@intrinsic(prefer_literal=True)
def store_tile(context, tile, address):
    def emit(context, builder, signature, args):
        _call(builder, "tilestored64", _register(tile), _pointer(builder, args[1]), ir.Constant(LONG, 64))
        return context.get_dummy_value()

    return types.void(tile, types.int64), emit


@intrinsic(prefer_literal=True)
def multiply_tiles(context, out, a, b):
    """out[m, n] += sum_k a[m, k] b[k, n], 32 products each; a row of b holds two k, one after the other for every n."""

    def emit(context, builder, signature, args):
        _call(builder, "tdpbf16ps", _register(out), _register(a), _register(b))
        return context.get_dummy_value()

    return types.void(out, a, b), emit


def _rounded(builder: Any, value: Any) -> Any:
    """Round float32 to bfloat16, in the upper half of 32 bits."""
    bits = builder.add(builder.bitcast(value, WHOLE), ir.Constant(WHOLE, [0x8000] * 16))
    return builder.and_(bits, ir.Constant(WHOLE, [-0x10000] * 16))


@intrinsic
def split_in_two(context, value):
    """Split 16 float32 into two bfloat16 each: (large, small), the large part in the upper half of 32 bits."""

    def emit(context, builder, signature, args):
        large = _rounded(builder, args[0])
        small = _rounded(builder, builder.fsub(args[0], builder.bitcast(large, FLOATS)))
        return context.make_tuple(builder, signature.return_type, [large, small])

    return types.UniTuple(i32x16, 2)(f32x16), emit


@intrinsic
def split_in_three(context, value):
    """Split 16 float32 into three bfloat16 each, largest first, in the upper halves of 32 bits: their sum is the number."""

    def emit(context, builder, signature, args):
        rest, parts = args[0], []
        for _ in range(3):
            parts.append(_rounded(builder, rest))
            rest = builder.fsub(rest, builder.bitcast(parts[-1], FLOATS))
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(i32x16, 3)(f32x16), emit


@intrinsic
def write_pair(context, address, low, high):
    """Write 16 pairs of bfloat16, each given in the upper half of 32 bits."""

    def emit(context, builder, signature, args):
        pair = builder.or_(builder.lshr(args[1], ir.Constant(WHOLE, [16] * 16)), args[2])
        builder.store(pair, builder.inttoptr(args[0], WHOLE.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, i32x16, i32x16), emit


@intrinsic
def write_upper(context, address, value):
    """Write the upper halves of 16 words of 32 bits."""

    def emit(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(16), 16)
        upper = builder.trunc(builder.lshr(args[1], ir.Constant(WHOLE, [16] * 16)), kind)
        builder.store(upper, builder.inttoptr(args[0], kind.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, i32x16), emit


@intrinsic
def column_minimum(context, address):
    """Return the least number of every column of a stored tile; its last four bits are changed to the row it stood in."""

    def emit(context, builder, signature, args):
        rows = []
        for row in range(16):
            at = builder.add(args[0], ir.Constant(LONG, 64 * row))
            bits = builder.load(builder.inttoptr(at, WHOLE.as_pointer()), align=4)
            bits = builder.or_(builder.and_(bits, ir.Constant(WHOLE, [-16] * 16)), ir.Constant(WHOLE, [row] * 16))
            rows.append(builder.bitcast(bits, FLOATS))
        while len(rows) > 1:
            rows = [emit_minimum(builder, a, b) for a, b in zip(rows[::2], rows[1::2])]
        return rows[0]

    return f32x16(types.int64), emit


@intrinsic
def row_of_minimum(context, value):
    """Return the rows that `least_row` left in 16 numbers."""

    def emit(context, builder, signature, args):
        return builder.and_(builder.bitcast(args[0], WHOLE), ir.Constant(WHOLE, [15] * 16))

    return i32x16(f32x16), emit


@intrinsic
def code_of(context, tile, row):
    """Return 16 tile + row, lane by lane."""

    def emit(context, builder, signature, args):
        return builder.or_(builder.shl(args[0], ir.Constant(WHOLE, [4] * 16)), args[1])

    return i32x16(i32x16, i32x16), emit
