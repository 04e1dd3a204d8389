"""Tables of 256 bytes in four vector registers, and whole numbers in planes of bytes.

A code picks a byte of its table in two permutations, 64 codes at a time; numbers of 24 bits are three such bytes. `pick` needs
AVX-512 VBMI, `dot_bytes` VNNI: ask `vectors.HAS_VBMI` and `HAS_VNNI` first.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rpq_convert.kernels.jit.memory import emit_prefetch, pointer_to
from rpq_convert.kernels.jit.vectors import HAS_VBMI, HAS_VNNI, emit_load, f32x16, i8x64, i32x16, llvm_type


@intrinsic
def load_bytes(context, address):
    return i8x64(types.int64), emit_load(i8x64)


def _load_first(builder: Any, address: Any, count: Any) -> Any:
    """Emit a read of the first 1 to 64 of 64 bytes; those that are not read are zeros."""
    kind, long = llvm_type(i8x64), ir.IntType(64)
    place = pointer_to(builder, address, kind)
    ones = builder.lshr(ir.Constant(long, -1), builder.sub(ir.Constant(long, 64), count))
    mask = builder.bitcast(ones, ir.VectorType(ir.IntType(1), 64))
    function = ir.FunctionType(kind, [place.type, ir.IntType(32), mask.type, kind])
    read = cgutils.get_or_insert_function(builder.module, function, "llvm.masked.load.v64i8.p0")
    return builder.call(read, [place, ir.Constant(ir.IntType(32), 1), mask, ir.Constant(kind, [0] * 64)])


@intrinsic
def load_first_bytes(context, address, count):
    """Read 1 to 64 bytes, and zeros after them."""
    return i8x64(types.int64, types.int64), lambda context, builder, signature, args: _load_first(builder, *args)


@intrinsic
def load_ints(context, address):
    return i32x16(types.int64), emit_load(i32x16)


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))


def _write_planes(builder: Any, address: Any, by: Any, registers: list[Any], signed: bool) -> None:
    """Emit `write_planes` and `write_digits`."""
    if not HAS_VBMI:  # compiled with its callers, but not run
        return
    floats, ints, many, word = llvm_type(f32x16), llvm_type(i32x16), llvm_type(i8x64), ir.IntType(32)
    kind = ir.FunctionType(ints, [floats, ints, ir.IntType(16), word])
    convert = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.cvtps2dq.512")
    rest = [ir.Constant(ints, [0] * 16), ir.Constant(ir.IntType(16), -1), ir.Constant(word, 4)]
    whole = [builder.call(convert, [v, *rest]) for v in registers]
    if signed:
        whole = [builder.add(v, ir.Constant(ints, [0x808080] * 16)) for v in whole]
    whole = [builder.bitcast(v, many) for v in whole]
    lows, tops = [], []
    for x, y in (whole[:2], whole[2:]):
        lows.append(_shuffle(builder, x, y, [*range(0, 128, 4), *range(1, 128, 4)]))
        tops.append(_shuffle(builder, x, y, [*range(2, 128, 4)] * 2))
    low, high = list(range(32)), list(range(32, 64))
    for plane, (pair, part) in enumerate(((lows, low), (lows, high), (tops, low))):
        value = _shuffle(builder, pair[0], pair[1], [*part, *(64 + i for i in part)])
        if signed:
            value = builder.xor(value, ir.Constant(many, [-128] * 64))
        at = builder.add(address, builder.mul(by, ir.Constant(by.type, plane)))
        builder.store(value, pointer_to(builder, at, many), align=1)


@intrinsic
def write_planes(context, address, by, a, b, c, d):
    """Round 4 x 16 floats below 2^23 to whole numbers and write their three low bytes, 64 each, `by` apart.

    A register of bytes is written at once: smaller pieces would not be there yet when they are read as one.
    """

    def emit(context, builder, signature, args):
        _write_planes(builder, args[0], args[1], args[2:], False)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, a, b, c, d), emit


@intrinsic
def write_digits(context, address, by, a, b, c, d):
    """The same in digits from -128 to 127 with base 256, the highest included: for floats up to 8,355,711."""

    def emit(context, builder, signature, args):
        _write_planes(builder, args[0], args[1], args[2:], True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, a, b, c, d), emit


def _interleave(builder: Any, a: Any, b: Any, high: bool) -> Any:
    """Emit the interleaving of two vectors within lanes of 16 bytes, which is one instruction: their low or high halves."""
    count = a.type.count
    half = count // 8
    order = []
    for lane in range(4):
        for i in range(half):
            at = lane * 2 * half + high * half + i
            order += [at, count + at]
    return _shuffle(builder, a, b, order)


@intrinsic
def transpose_bytes(context, address, by, rows, columns, to, by_to):
    """Write bytes [rows, columns], at most 16 and 64, `by` apart, turned around: [64, 16], `by_to` apart.

    What is not there reads as some byte. Four rounds of interleaving within lanes turn around four tiles of 16 x 16.
    """

    def emit(context, builder, signature, args):
        address, by, rows, columns, to, by_to = args
        long = ir.IntType(64)
        last = builder.sub(rows, ir.Constant(long, 1))
        vectors = []
        for i in range(16):
            number = ir.Constant(long, i)
            emit_prefetch(builder, builder.add(address, builder.mul(ir.Constant(long, i + 16), by)))
            row = builder.select(builder.icmp_signed("<", number, rows), number, last)
            vectors.append(_load_first(builder, builder.add(address, builder.mul(row, by)), columns))
        for _ in range(4):
            vectors = [
                _interleave(builder, vectors[i], vectors[i + 8], high) for i in range(8) for high in (False, True)
            ]
        for i, v in enumerate(vectors):
            for lane in range(4):
                part = _shuffle(builder, v, v, list(range(16 * lane, 16 * lane + 16)))
                at = builder.add(to, builder.mul(ir.Constant(long, 16 * lane + i), by_to))
                builder.store(part, pointer_to(builder, at, part.type), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


@intrinsic
def table_lookup(context, codes, t0, t1, t2, t3):
    """Return table[code] for 64 codes and a table of 256 bytes; nothing of use where `HAS_VBMI` is false."""

    def emit(context, builder, signature, args):
        if not HAS_VBMI:  # compiled with its callers, but not run
            return args[0]
        kind = llvm_type(i8x64)
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        permute = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind, kind]), name)
        codes, t0, t1, t2, t3 = args
        low, high = builder.call(permute, [t0, codes, t1]), builder.call(permute, [t2, codes, t3])
        upper = builder.icmp_signed("<", codes, ir.Constant(kind, [0] * 64))  # codes 128 and up
        return builder.select(upper, high, low)

    return i8x64(codes, t0, t1, t2, t3), emit


@intrinsic
def dot_bytes(context, sums, a, b):
    """Return sums [16] + the products of a's bytes, without a sign, and b's, with one, four by four; needs `HAS_VNNI`."""

    def emit(context, builder, signature, args):
        if not HAS_VNNI:  # compiled with its callers, but not run
            return args[0]
        kind = llvm_type(i32x16)
        function = ir.FunctionType(kind, [kind, kind, kind])
        multiply = cgutils.get_or_insert_function(builder.module, function, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(multiply, [args[0], builder.bitcast(args[1], kind), builder.bitcast(args[2], kind)])

    return i32x16(sums, a, b), emit


@intrinsic
def add_ints(context, a, b):
    return a(a, a), lambda context, builder, signature, args: builder.add(*args)


@intrinsic
def subtract_ints(context, a, b):
    return a(a, a), lambda context, builder, signature, args: builder.sub(*args)


@intrinsic
def ints_to_floats(context, a):
    return f32x16(a), lambda context, builder, signature, args: builder.sitofp(args[0], llvm_type(f32x16))


@intrinsic
def bytes_of_128(context):
    """Return 64 bytes of 128."""
    return i8x64(), lambda context, builder, signature, args: ir.Constant(llvm_type(i8x64), [-128] * 64)


@intrinsic
def zero_bytes(context):
    return i8x64(), lambda context, builder, signature, args: ir.Constant(llvm_type(i8x64), [0] * 64)


@intrinsic
def zero_ints(context):
    """Return 16 zeros."""
    return i32x16(), lambda context, builder, signature, args: ir.Constant(llvm_type(i32x16), [0] * 16)


@intrinsic
def add_planes(context, address, b0, b1, b2):
    """Add 64 numbers of 24 bits, given by their bytes, to 64 int32 in memory.

    Bytes are interleaved within 16-byte lanes, which is one instruction each; so number 16 l + 4 q + e is found at
    position 16 q + 4 l + e (`natural` gives the position of a number).
    """

    def emit(context, builder, signature, args):
        address, b0, b1, b2 = args
        kind = llvm_type(i8x64)
        sign = builder.ashr(b2, ir.Constant(kind, [7] * 64))
        words = ir.VectorType(ir.IntType(16), 32)
        whole = ir.VectorType(ir.IntType(32), 16)
        for high in (False, True):
            low16 = builder.bitcast(_interleave(builder, b0, b1, high), words)
            high16 = builder.bitcast(_interleave(builder, b2, sign, high), words)
            for upper in (False, True):
                value = builder.bitcast(_interleave(builder, low16, high16, upper), whole)
                at = builder.add(address, ir.Constant(ir.IntType(64), 64 * (2 * high + upper)))
                pointer = pointer_to(builder, at, whole)
                builder.store(builder.add(builder.load(pointer, align=1), value), pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, b0, b1, b2), emit


@intrinsic
def in_write_order(context, codes):
    """Return 64 codes so ordered that `write_words` puts what they name back in order."""

    def emit(context, builder, signature, args):
        order = [16 * quarter + 4 * lane + i for lane in range(4) for quarter in range(4) for i in range(4)]
        return _shuffle(builder, args[0], args[0], order)

    return codes(codes), emit


@intrinsic
def write_words(context, first, second, b0, b1, b2, b3):
    """Write 64 words of 32 bits, given by their bytes, lowest first: 32 to each address."""

    def emit(context, builder, signature, args):
        first, second, *planes = args
        pairs, whole = ir.VectorType(ir.IntType(16), 32), llvm_type(i32x16)
        for high, start in ((False, first), (True, second)):
            low16, high16 = (
                builder.bitcast(_interleave(builder, *two, high), pairs) for two in (planes[:2], planes[2:])
            )
            for upper in (False, True):
                value = builder.bitcast(_interleave(builder, low16, high16, upper), whole)
                at = builder.add(start, ir.Constant(ir.IntType(64), 64 * upper))
                builder.store(value, pointer_to(builder, at, whole), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, b0, b1, b2, b3), emit


def position_of(number: int) -> int:
    """Return where `add_planes` keeps a number of a group of 64."""
    lane, rest = divmod(number, 16)
    quarter, element = divmod(rest, 4)
    return 16 * quarter + 4 * lane + element
