"""Products of two small matrices whose sums stay in vector registers, inside numba.

What limits a dense product is how often a number comes from the cache. Here a register of outputs serves twelve tokens, and a
token's number two registers: 24 multiply-adds for 14 loads. LLVM would keep the sums in memory, so the loop is written here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rpq_convert.kernels.jit.memory import pointer_to
from rpq_convert.kernels.jit.vectors import FEATURES, HAS_BFLOAT16

LANES = 16 if FEATURES.get("avx512f") else 8
TOKENS = 12 if LANES == 16 else 6  # AVX-512 has 32 registers, AVX2 16
OUTPUTS = 2 * LANES
BYTES = 4 * TOKENS * OUTPUTS  # of a tile's sums
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_LONG = ir.IntType(64)


def _emit(builder: Any, args: Any, read: Any, function: str, order: Any) -> None:
    """Emit the loop of a tile over `steps`, words of 32 bits of x and rows of w, both vectors of the kind `read`."""
    x, w, steps, by_token, y = args
    pairs = [(t, v) for t in range(TOKENS) for v in range(2)]

    def after(start: Any, apart: int) -> Any:
        return builder.add(start, ir.Constant(_LONG, apart))

    def vector(start: Any, number: int, kind: Any) -> Any:
        return pointer_to(builder, after(start, 4 * LANES * number), kind)

    def spread(value: Any) -> Any:
        none, index = ir.Constant(read, ir.Undefined), ir.IntType(32)
        one = builder.insert_element(none, value, ir.Constant(index, 0))
        return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))

    kinds = order(_FLOATS, read, read)
    call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, kinds), function)
    tokens = [builder.add(x, builder.mul(by_token, ir.Constant(_LONG, t))) for t in range(TOKENS)]
    held = {p: builder.load(vector(y, 2 * p[0] + p[1], _FLOATS), align=4) for p in pairs}
    before, loop, done = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    step, sums = builder.phi(_LONG), {p: builder.phi(_FLOATS) for p in pairs}
    at, row = builder.mul(step, ir.Constant(_LONG, 4)), builder.mul(step, ir.Constant(_LONG, 4 * OUTPUTS))
    weights = [builder.load(vector(builder.add(w, row), v, read), align=4) for v in range(2)]
    new = {}
    for t, start in enumerate(tokens):
        every = spread(builder.load(pointer_to(builder, builder.add(start, at), read.element), align=4))
        for v in range(2):
            new[t, v] = builder.call(call, order(sums[t, v], every, weights[v]))
    following = after(step, 1)
    step.add_incoming(ir.Constant(_LONG, 0), before)
    step.add_incoming(following, loop)
    for p in pairs:
        sums[p].add_incoming(held[p], before)
        sums[p].add_incoming(new[p], loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
    builder.position_at_end(done)
    for p in pairs:
        builder.store(new[p], vector(y, 2 * p[0] + p[1], _FLOATS), align=4)


@intrinsic
def multiply_tile(context, x, w, terms, by_token, y):
    """Add the products of x [TOKENS, terms] and w [terms, OUTPUTS] to y [TOKENS, OUTPUTS], all float32.

    Args:
        terms: 1 or more. by_token: bytes from one token of x to the next.
    """

    def emit(context, builder, signature, args):
        _emit(builder, args, _FLOATS, f"llvm.fma.v{LANES}f32", lambda sums, a, b: [a, b, sums])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


@intrinsic
def multiply_short_tile(context, x, w, pairs, by_token, y):
    """The same for x [TOKENS, pairs, 2] and w [pairs, OUTPUTS, 2] in bfloat16; nothing where `HAS_BFLOAT16` is false."""

    def emit(context, builder, signature, args):
        if HAS_BFLOAT16 and LANES == 16:
            _emit(builder, args, _WORDS, "llvm.x86.avx512bf16.dpbf16ps.512", lambda *three: [*three])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit
