"""The backend for compilers: torch operators, `torch.ops.rpq.*`, which torch.compile and torch.export put into their graphs.

A compiler cannot look into numba or Triton. It sees an operator with a shape (its fake kernel) and a gradient (a second operator).
The backend that an operator runs is chosen when it is called, by device. Eager code does not use the operators: the dispatch of one
takes more microseconds than a small layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpq_convert import kernels
from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference


def _layout(codes: Tensor, codebooks: Tensor, axis: str, length: int, make: Callable[..., Layout] = Layout) -> Layout:
    stages, _, n = codes.shape
    return make(axis, n, length, codebooks.shape[-1], codebooks.shape[-3], stages)


def _real(
    codes: Tensor, codebooks: Tensor, axis: str, length: int, scales: Tensor | None, *,
    inputs: Tensor | None = None, outputs: Tensor | None = None, bias: Tensor | None = None,
) -> Layout:  # fmt: skip
    """Return the layout of tensors that kernels are about to read.

    Args:
        inputs, outputs: with one number per input or output along their last axis.

    Raises:
        ValueError: they do not fit each other.
    """
    if (
        codes.dtype != torch.uint8
        or codes.ndim != 3
        or codebooks.ndim not in (3, 4)
        or not codebooks.is_floating_point()
    ):
        raise ValueError(
            f"torch.ops.rpq: codes {codes.dtype} {list(codes.shape)} and codebooks {codebooks.dtype} {list(codebooks.shape)}"
        )
    layout = _layout(codes, codebooks, axis, length, _known)
    stages = codebooks.shape[0] if codebooks.ndim == 4 else 1
    fits = axis in ("in", "out") and (stages, codebooks.shape[-2], codes.shape[1]) == (
        layout.stages,
        256,
        layout.blocks,
    )
    wanted = ((inputs, layout.inputs), (outputs, layout.outputs), (bias, layout.outputs))
    if (
        not fits
        or layout.books > layout.blocks
        or (scales is not None and tuple(scales.shape) != (layout.outputs,))
        or any(t is not None and (t.shape[-1] if t.ndim else -1) != size for t, size in wanted)
    ):
        raise ValueError(
            f"torch.ops.rpq: tensors that do not fit a weight [{layout.outputs}, {layout.inputs}] with {layout}"
        )
    return layout


_known = functools.lru_cache(4096)(
    Layout
)  # for real tensors, whose sizes are numbers; a layout keeps what it has computed


def _backend(codes: Tensor, dtype: torch.dtype) -> Any:
    return kernels.backend_for(codes.device.type) if dtype in kernels.SERVED else reference


def _given(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors: one without elements stands for a gradient that nobody needs."""
    return tuple(like.new_empty(0) if g is None else g.contiguous() for g in grads)


def _wanted(grads: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs))


@torch.library.custom_op("rpq::linear", mutates_args=())
def _linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, axis: str, length: int
) -> Tensor:
    layout = _real(codes, codebooks, axis, length, scales, inputs=x, bias=bias)
    if not x.numel():
        return x.new_zeros(x.shape[0], layout.outputs)
    return _backend(codes, x.dtype).linear(x, codes, codebooks, scales, bias, layout)


@_linear.register_fake
def _(x, codes, codebooks, scales, bias, axis, length):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], _layout(codes, codebooks, axis, length).outputs)


@torch.library.custom_op("rpq::linear_backward", mutates_args=())
def _linear_backward(
    gradient: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, axis: str, length: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = _real(codes, codebooks, axis, length, scales, inputs=x, outputs=gradient)
    backend = _backend(codes, x.dtype) if x.numel() else reference
    grads = backend.linear_gradients(gradient.contiguous(), x, codes, codebooks, scales, layout, tuple(needs))
    return _given(grads, x)  # type: ignore[return-value]


@_linear_backward.register_fake
def _(gradient, x, codes, codebooks, scales, axis, length, needs):  # type: ignore[no-untyped-def]
    return _shapes((x, codebooks, scales), needs, x)


def _shapes(tensors: tuple[Tensor | None, ...], needs: list[bool], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        like.new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in zip(tensors, needs)
    )


@torch.library.custom_op("rpq::decode", mutates_args=())
def _decode(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, axis: str, length: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    layout, backend = _real(codes, codebooks, axis, length, scales), _backend(codes, dtype)
    if index is None:
        return backend.decode(codes, codebooks, scales, layout, dtype)
    return backend.decode_rows(codes, codebooks, scales, index, layout, dtype)


@_decode.register_fake
def _(codes, codebooks, scales, index, axis, length, dtype):  # type: ignore[no-untyped-def]
    layout = _layout(codes, codebooks, axis, length)
    return codebooks.new_empty(layout.outputs if index is None else index.shape[0], layout.inputs, dtype=dtype)


@torch.library.custom_op("rpq::decode_backward", mutates_args=())
def _decode_backward(
    gradient: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor | None, axis: str, length: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout, backend = _real(codes, codebooks, axis, length, scales, inputs=gradient), _backend(codes, gradient.dtype)
    grads = backend.decode_gradients(gradient.contiguous(), codes, codebooks, scales, index, layout, tuple(needs))
    return _given(grads, codebooks)  # type: ignore[return-value]


@_decode_backward.register_fake
def _(gradient, codes, codebooks, scales, index, axis, length, needs):  # type: ignore[no-untyped-def]
    return _shapes((codebooks, scales), needs, codebooks)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebooks, scales, bias, ctx.axis, ctx.length = inputs
    ctx.save_for_backward(x, codes, codebooks, scales)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[2], needs[3]]
    grads = _linear_backward(gradient, *ctx.saved_tensors, ctx.axis, ctx.length, wanted)
    dx, dbooks, dscales = _wanted(grads, wanted)
    dbias = gradient.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs[4] else None
    return dx, None, dbooks, dscales, dbias, None, None


def _keep_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.axis, ctx.length, _ = inputs
    ctx.save_for_backward(*tensors)


def _decode_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    wanted = [ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    grads = _decode_backward(gradient, *ctx.saved_tensors, ctx.axis, ctx.length, wanted)
    return None, *_wanted(grads, wanted), None, None, None, None


_linear.register_autograd(_linear_gradients, setup_context=_keep_linear)
_decode.register_autograd(_decode_gradients, setup_context=_keep_decode)


def linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, bias: Tensor | None, layout: Layout
) -> Tensor:
    """Return `x W^T + bias`, x [tokens, inputs]."""
    return _linear(x, codes, codebooks, scales, bias, layout.axis, layout.length)


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the weight [outputs, inputs], contiguous, in `dtype`."""
    return _decode(codes, codebooks, scales, None, layout.axis, layout.length, dtype)


def decode_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, index: Tensor, layout: Layout, dtype: torch.dtype
) -> Tensor:
    """Return rows `index` [k] of a weight whose sub-vectors run along its inputs: [k, inputs]."""
    return _decode(codes, codebooks, scales, index, layout.axis, layout.length, dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return what `ExportedProgram.run_decompositions` takes to make plain torch operations of RPQ's operators.

    The program then runs where rpq_convert is not installed, and each weight is expanded whenever it is used.

    Example:
        >>> program = torch.export.export(model, (x,))
        >>> program.run_decompositions({**torch.export.default_decompositions(), **rpq.decompositions()})
    """

    def product(x, codes, codebooks, scales, bias, axis, length):  # type: ignore[no-untyped-def]
        return reference.linear(x, codes, codebooks, scales, bias, _layout(codes, codebooks, axis, length))

    def weight(codes, codebooks, scales, index, axis, length, dtype):  # type: ignore[no-untyped-def]
        layout = _layout(codes, codebooks, axis, length)
        if index is None:
            return reference.decode(codes, codebooks, scales, layout, dtype)
        return reference.decode_rows(codes, codebooks, scales, index, layout, dtype)

    return {torch.ops.rpq.linear.default: product, torch.ops.rpq.decode.default: weight}
