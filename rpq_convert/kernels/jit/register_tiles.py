"""A product of two small matrices whose sums stay in vector registers, inside numba.

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
from rpq_convert.kernels.jit.vectors import FEATURES

LANES = 16 if FEATURES.get("avx512f") else 8
TOKENS = 12 if LANES == 16 else 6  # AVX-512 has 32 registers, AVX2 16
OUTPUTS = 2 * LANES
BYTES = 4 * TOKENS * OUTPUTS  # of a tile's sums
_VECTOR, _LONG = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)


def _address(builder: Any, start: Any, apart: int) -> Any:
    return builder.add(start, ir.Constant(_LONG, apart))


def _spread(builder: Any, value: Any) -> Any:
    none, index = ir.Constant(_VECTOR, ir.Undefined), ir.IntType(32)
    one = builder.insert_element(none, value, ir.Constant(index, 0))
    return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))


@intrinsic
def multiply_tile(context, x, w, terms, by_token, y):
    """Add the products of x [TOKENS, terms] and w [terms, OUTPUTS] to y [TOKENS, OUTPUTS], all float32.

    Args:
        terms: 1 or more. by_token: bytes from one token of x to the next.
    """

    def emit(context, builder, signature, args):
        x, w, terms, by_token, y = args
        pairs = [(t, v) for t in range(TOKENS) for v in range(2)]

        def vector(start: Any, number: int) -> Any:
            return pointer_to(builder, _address(builder, start, 4 * LANES * number), _VECTOR)

        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
        )
        tokens = [builder.add(x, builder.mul(by_token, ir.Constant(_LONG, t))) for t in range(TOKENS)]
        before, loop, after = (
            builder.block,
            builder.append_basic_block("terms"),
            builder.append_basic_block("summed"),
        )
        held = {p: builder.load(vector(y, 2 * p[0] + p[1]), align=4) for p in pairs}
        builder.branch(loop)
        builder.position_at_end(loop)
        term, sums = builder.phi(_LONG), {p: builder.phi(_VECTOR) for p in pairs}
        at, row = builder.mul(term, ir.Constant(_LONG, 4)), builder.mul(term, ir.Constant(_LONG, 4 * OUTPUTS))
        weights = [builder.load(vector(builder.add(w, row), v), align=4) for v in range(2)]
        new = {}
        for t, start in enumerate(tokens):
            value = builder.load(pointer_to(builder, builder.add(start, at), ir.FloatType()), align=4)
            every = _spread(builder, value)
            for v in range(2):
                new[t, v] = builder.call(fma, [every, weights[v], sums[t, v]])
        following = _address(builder, term, 1)
        term.add_incoming(ir.Constant(_LONG, 0), before)
        term.add_incoming(following, loop)
        for p in pairs:
            sums[p].add_incoming(held[p], before)
            sums[p].add_incoming(new[p], loop)
        builder.cbranch(builder.icmp_signed("<", following, terms), loop, after)
        builder.position_at_end(after)
        for p in pairs:
            builder.store(new[p], vector(y, 2 * p[0] + p[1]), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit
