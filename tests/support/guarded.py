"""Run every CPU path on tensors that end, or begin, at a page that must not be touched. A program: a wrong read is a signal."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.axes import WeightView
from rpq_convert.core.spec import Spec
from rpq_convert.kernels.cpu import backend, linear, prepared, vector_products
from rpq_convert.layers.weight import RPQWeight

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
SHAPES = ((1, 1), (7, 5), (64, 64), (33, 70), (70, 33), (130, 300), (513, 65))
DIMS = (1, 2, 3, 4, 6, 7, 8, 16, 64, 70)
TOKENS = (1, 2, 4, 8, 9, 17, 40, 200)


def guarded(tensor: Tensor, *, front: bool) -> Tensor:
    """Return a copy that ends right before a page that may not be read, or begins right after one."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-max(1, size) // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (at, at + PAGE + pages):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE if front else PAGE + pages - size
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=max(1, size), offset=min(offset, PAGE + pages - 1))
    return raw[:size].view(tensor.dtype).reshape(tensor.shape).copy_(tensor)


def guard_prepared(front: bool) -> None:
    """Guard the tables as well that are made of codebooks."""
    plain = prepared._tables
    prepared._tables = lambda tensor, kind: tuple(guarded(t, front=front) for t in plain(tensor, kind))


def outputs(front: bool) -> None:
    """Guard what kernels write as well: results, sums and tables that are made on the way."""
    new_empty, new_zeros, empty = Tensor.new_empty, Tensor.new_zeros, torch.empty

    def fresh(make: Any) -> Any:
        return lambda *args, **kwargs: guarded(make(*args, **kwargs), front=front)

    Tensor.new_empty, Tensor.new_zeros, torch.empty = fresh(new_empty), fresh(new_zeros), fresh(empty)
    torch.zeros_like = lambda like: like.new_zeros(like.shape)


def weight(spec: Spec, shape: tuple[int, int], front: bool) -> RPQWeight:
    rpq = RPQWeight(spec, WeightView("out in"), shape)
    for name, (dtype, size) in spec.tensors(rpq.view, shape).items():
        filled = torch.randint(0, 256, size, dtype=torch.uint8) if name == "codes" else torch.randn(size).to(dtype)
        rpq.set_tensor(name, guarded(filled, front=front))
    return rpq


def exercise(rpq: RPQWeight, front: bool) -> None:
    """Multiply, decode, look up and differentiate."""
    outputs, inputs = rpq.layout.outputs, rpq.layout.inputs
    bias = guarded(torch.randn(outputs), front=front)
    trains = rpq.codebooks.dtype != torch.float8_e4m3fn
    for tokens, dtype in itertools.product(TOKENS, (torch.float32, torch.bfloat16)):
        x = guarded(torch.randn(tokens, inputs).to(dtype), front=front)
        with torch.no_grad():
            codes, codebooks, scales = rpq.parts()
            given = bias.to(dtype) if dtype != torch.float32 else bias
            backend.linear(x, codes, codebooks, scales, given, rpq.layout)
            linear.linear(x, codes, codebooks, scales, given, rpq.layout)
            backend.tiled_linear(x, codes, codebooks, scales, given, rpq.layout)
            short = dtype if vector_products.takes_short(x) else torch.float32
            vector_products.multiply_all(
                rpq.layout.axis == "in", x.to(short)[None], dtype, codes, codebooks, rpq.layout, 0, 0, bias.data_ptr(),
                x.new_empty(1, tokens, outputs, dtype=short),
            )  # fmt: skip
        if trains:
            gradient = guarded(torch.randn(tokens, outputs).to(dtype), front=front)
            needs = (True, True, scales is not None)
            with torch.no_grad():
                linear.linear_gradients(gradient, x, codes, codebooks, scales, rpq.layout, needs)
                linear.decoded_gradients(gradient, x, codes, codebooks, scales, rpq.layout, needs)
    with torch.no_grad():
        codes, codebooks, scales = rpq.parts()
        backend.decode_into_buffer(codes, codebooks, scales, rpq.layout)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            backend.decode(codes, codebooks, scales, rpq.layout, dtype)
        for images, pixels in ((1, 1), (2, 17), (1, 49)):
            picture = guarded(torch.randn(images, inputs, pixels), front=front)
            backend.pointwise(picture, codes, codebooks, scales, bias, rpq.layout)
        if rpq.spec.axis == "in":
            for count in (1, 3, 65):
                index = guarded(torch.randint(0, outputs, (count,)), front=front)
                for dtype in (torch.float32, torch.bfloat16):
                    backend.decode_rows(codes, codebooks, scales, index, rpq.layout, dtype)
                if trains:
                    some = guarded(torch.randn(count, inputs), front=front)
                    backend.decode_gradients(
                        some, codes, codebooks, scales, index, rpq.layout, (True, scales is not None)
                    )
        if trains:
            whole = guarded(torch.randn(outputs, inputs), front=front)
            backend.decode_gradients(whole, codes, codebooks, scales, None, rpq.layout, (True, scales is not None))


def main(front: bool, axis: str, every: int) -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    guard_prepared(front)
    outputs(front)
    count = 0
    for shape, dim, stages in itertools.product(SHAPES, DIMS, (1, 2, 3)):
        length = shape[0] if axis == "out" else shape[1]
        if dim > max(length, 8):
            continue
        blocks = -(-length // dim)
        for books, layout in {(1, "blocks"), (blocks, "rows" if axis == "in" else "blocks")}:
            kinds = itertools.cycle(
                (("float32", None), ("float16", "float32"), ("bfloat16", "float16"), ("float8_e4m3fn", "float32"))
            )
            dtype, scales = next(itertools.islice(kinds, count % 4, None))
            spec = Spec(dim, books, stages, axis, dtype, scales, layout)
            count += 1
            if count % every == 0:
                print(shape, spec.describe(), layout, flush=True)
                exercise(weight(spec, shape, front), front)
    print(f"{count // every} weights")


if __name__ == "__main__":
    main(sys.argv[1] == "front", sys.argv[2], int(sys.argv[3]))
