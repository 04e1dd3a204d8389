"""Vector registers inside numba: a numba type for `<16 x float>` and its like, and the few operations that kernels use.

LLVM vectorises simple loops by itself, but not "add this row of 16 tokens to that one, chosen by a code": it must be told
that a row is one register. `load(address, tag)` and its like emit one LLVM instruction each; addresses are plain integers,
which also makes calls from Python cheap. A vector type that the processor lacks is split by LLVM, so the code runs
everywhere.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from rpq_convert.kernels.jit.memory import pointer_to


def _features() -> dict[str, bool]:
    """Return what the processor that numba compiles for can do: this one, or the one that NUMBA_CPU_FEATURES asks for."""
    asked: str | None = getattr(config, "CPU_FEATURES", None)
    if asked is None:
        return dict(llvmlite.binding.get_host_cpu_features())
    return {name[1:]: name[0] == "+" for name in asked.split(",") if name}


FEATURES = _features()
PROCESSOR = getattr(config, "CPU_NAME", None) or llvmlite.binding.get_host_cpu_name()  # LLVM's name for it, as "znver5"
HAS_VBMI = platform.machine() in ("x86_64", "AMD64") and bool(FEATURES.get("avx512vbmi"))
HAS_VNNI = HAS_VBMI and bool(FEATURES.get("avx512vnni"))
HAS_FLOAT16 = platform.machine() in ("aarch64", "arm64") or bool(FEATURES.get("f16c"))
HAS_BFLOAT16 = bool(FEATURES.get("avx512bf16"))  # dense products in bfloat16 are faster than in float32
HAS_AMX = bool(FEATURES.get("amx-bf16"))  # and much faster
# Intel's AVX-512 processors multiply two full registers a cycle, AMD's up to Zen 4 one, and torch's own products on any of AMD's: dense
# products gain, lookups do not
TWO_FMA_512 = bool(FEATURES.get("avx512f")) and not PROCESSOR.startswith("znver")
FLAGS = ("avx2", "avx512f", "avx512vnni", "avx512vbmi", "avx512bf16", "amx-bf16", "neon")  # that kernels ask for


def flags() -> str:
    """Return the features of this processor that kernels choose by, in words such as "avx2, avx512f"."""
    return ", ".join(name for name in FLAGS if FEATURES.get(name))


KINDS = {"f32": ir.FloatType(), "i8": ir.IntType(8), "i32": ir.IntType(32)}


class Vector(types.Type):
    """`lanes` values of a kind, one LLVM vector."""

    def __init__(self, kind: str, lanes: int) -> None:
        self.kind, self.lanes = kind, lanes
        super().__init__(name=f"{kind}x{lanes}")


def llvm_type(vector: Vector) -> Any:
    return ir.VectorType(KINDS[vector.kind], vector.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, llvm_type(kind))


f32x2, f32x4, f32x8, f32x16, f32x32 = (Vector("f32", lanes) for lanes in (2, 4, 8, 16, 32))
i8x64, i32x16 = Vector("i8", 64), Vector("i32", 16)


# How many lanes a kernel uses is decided by the type of an argument, so that one source serves all and numba's cache on
# disk knows them apart: int8, int16 and int32 stand for 8, 16 and 32 floats, uint16 and uint32 for 2 and 4.
LANES = {2: np.uint16(0), 4: np.uint32(0), 8: np.int8(0), 16: np.int16(0), 32: np.int32(0)}


def _of(tag: Any) -> Vector:
    if not tag.signed:
        return {16: f32x2, 32: f32x4}[tag.bitwidth]
    return {8: f32x8, 16: f32x16, 32: f32x32}[tag.bitwidth]


@intrinsic
def width(context, tag):
    """Return the number of lanes, a constant."""

    def emit(context, builder, signature, args):
        return ir.Constant(ir.IntType(64), _of(tag).lanes)

    return types.int64(tag), emit


def emit_load(vector: Vector) -> Any:
    def emit(context, builder, signature, args):
        return builder.load(pointer_to(builder, args[0], llvm_type(vector)), align=1)

    return emit


@intrinsic
def load(context, address, tag):
    """Read a vector."""
    return _of(tag)(types.int64, tag), emit_load(_of(tag))


@intrinsic
def load_float16(context, address):
    """Read 16 float16 as float32; NaN where `HAS_HALF` is false: LLVM would call a function that numba does not have."""

    def emit(context, builder, signature, args):
        if not HAS_FLOAT16:
            return ir.Constant(llvm_type(f32x16), [float("nan")] * 16)
        half = builder.load(pointer_to(builder, args[0], ir.VectorType(ir.HalfType(), 16)), align=1)
        return builder.fpext(half, llvm_type(f32x16))

    return f32x16(types.int64), emit


@intrinsic
def transpose_floats(context, address, by, to, by_to):
    """Write 16 x 16 floats turned around; rows lie `by` bytes apart, those written `by_to`."""

    def emit(context, builder, signature, args):
        address, by, to, by_to = args
        kind, long = llvm_type(f32x16), ir.IntType(64)

        def row(start: Any, apart: Any, number: int) -> Any:
            at = builder.add(start, builder.mul(apart, ir.Constant(long, number)))
            return pointer_to(builder, at, kind)

        index = ir.VectorType(ir.IntType(32), 16)
        low, high = (ir.Constant(index, [i // 2 + i % 2 * 16 + first for i in range(16)]) for first in (0, 8))
        vectors = [builder.load(row(address, by, i), align=4) for i in range(16)]
        for _ in range(4):  # each round interleaves the vectors of both halves
            pairs = list(zip(vectors[:8], vectors[8:]))
            vectors = [builder.shuffle_vector(a, b, order) for a, b in pairs for order in (low, high)]
        for i, vector in enumerate(vectors):
            builder.store(vector, row(to, by_to, i), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit


@intrinsic
def spread(context, value, tag):
    """Return a vector with one value in every lane."""
    vector = _of(tag)

    def emit(context, builder, signature, args):
        kind, index = llvm_type(vector), ir.IntType(32)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), args[0], ir.Constant(index, 0))
        order = ir.Constant(ir.VectorType(index, vector.lanes), [0] * vector.lanes)
        return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), order)

    return vector(types.float32, tag), emit


@intrinsic
def store(context, address, vector):
    """Write a vector to memory."""

    def emit(context, builder, signature, args):
        builder.store(args[1], pointer_to(builder, args[0], llvm_type(vector)), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, vector), emit


@intrinsic
def add(context, a, b):
    return a(a, a), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def multiply(context, a, b):
    return a(a, a), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def absolute(context, a):
    def emit(context, builder, signature, args):
        kind = llvm_type(a)
        fabs = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.fabs.v{a.lanes}f32")
        return builder.call(fabs, args)

    return a(a), emit


@intrinsic
def greater(context, a, b):
    """Return the greater of a and b, lane by lane; b where one is NaN."""
    return a(a, a), lambda context, builder, signature, args: builder.select(builder.fcmp_ordered(">", *args), *args)


@intrinsic
def multiply_add(context, a, b, c):
    """Return a * b + c, rounded once."""

    def emit(context, builder, signature, args):
        kind = llvm_type(a)
        fma = ir.FunctionType(kind, [kind, kind, kind])
        return builder.call(cgutils.get_or_insert_function(builder.module, fma, f"llvm.fma.v{a.lanes}f32"), args)

    return a(a, a, a), emit


@intrinsic
def multiply_add_one(context, a, b, c):
    """The same for single floats."""

    def emit(context, builder, signature, args):
        kind = ir.FloatType()
        fma = ir.FunctionType(kind, [kind, kind, kind])
        return builder.call(cgutils.get_or_insert_function(builder.module, fma, "llvm.fma.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), emit


@intrinsic
def add_pairs(context, a, b):
    """Return the sums of a's neighbouring lanes, then of b's."""

    def emit(context, builder, signature, args):
        index, lanes = ir.VectorType(ir.IntType(32), a.lanes), range(0, 2 * a.lanes, 2)
        even, odd = (builder.shuffle_vector(*args, ir.Constant(index, [i + o for i in lanes])) for o in (0, 1))
        return builder.fadd(even, odd)

    return a(a, a), emit


@intrinsic
def total(context, a):
    """Return the sum of a vector's lanes, halves first."""

    def emit(context, builder, signature, args):
        value, lanes = args[0], a.lanes
        while lanes > 1:
            lanes //= 2
            index = ir.VectorType(ir.IntType(32), lanes)
            none = ir.Constant(value.type, ir.Undefined)
            low = builder.shuffle_vector(value, none, ir.Constant(index, list(range(lanes))))
            high = builder.shuffle_vector(value, none, ir.Constant(index, list(range(lanes, 2 * lanes))))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(a), emit


# ---- the least of many numbers, and which it was ---------------------------------------------------------------------


def emit_minimum(builder: Any, a: Any, b: Any) -> Any:
    """Emit the lesser of two vectors of numbers, none of them NaN: one instruction."""
    kind = ir.FunctionType(a.type, [a.type, a.type])
    name = f"llvm.minnum.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b], fastmath=("nnan", "nsz"))


@intrinsic
def minimum(context, a, b):
    return a(a, a), lambda context, builder, signature, args: emit_minimum(builder, *args)


@intrinsic
def subtract(context, a, b):
    return a(a, a), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def subtract_product(context, c, a, b):
    """Return c - a * b, rounded once."""

    def emit(context, builder, signature, args):
        kind = llvm_type(a)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind, kind, kind]), f"llvm.fma.v{a.lanes}f32"
        )
        return builder.call(fma, [builder.fneg(args[1]), args[2], args[0]])

    return a(c, a, b), emit


@intrinsic
def zero_codes(context, tag):
    """Return a vector of int32 zeros, as many as the tag's lanes."""
    whole = Vector("i32", _of(tag).lanes)
    return whole(tag), lambda context, builder, signature, args: ir.Constant(llvm_type(whole), [0] * whole.lanes)


@intrinsic
def select_code(context, a, b, code, codes):
    """Return `code` in the lanes where a < b, else what `codes` has there."""

    def emit(context, builder, signature, args):
        a, b, code, codes = args
        word, none = ir.IntType(32), ir.Constant(codes.type, ir.Undefined)
        one = builder.insert_element(none, builder.trunc(code, word), ir.Constant(word, 0))
        every = builder.shuffle_vector(one, none, ir.Constant(codes.type, [0] * codes.type.count))
        return builder.select(builder.fcmp_ordered("<", a, b), every, codes)

    return codes(a, b, types.int64, codes), emit


@intrinsic
def write_codes(context, address, codes):
    """Write a vector of codes to memory, a byte each."""

    def emit(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(8), codes.lanes)
        builder.store(builder.trunc(args[1], kind), pointer_to(builder, args[0], kind), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, codes), emit
