"""RPQWeight: codebooks + codes (+ scales) that expand to a dense parameter, and the lazy tensor a layer sees.

Two ideas carry the library:

* `RPQWeight` is a module that owns the stored tensors. Calling it decodes.
* `ComputedWeight` is what `layer.weight` returns: a tensor without memory. Asked for its shape or dtype it answers;
  used by an operation in `HANDLERS` (embedding lookups today) it does just the work that is needed; used by any other
  it decodes first. So a layer keeps its own forward, a subclass keeps its own, and no layer type needs code.

Writing to a computed weight, or to a view of it, would be lost in a temporary tensor, so it raises. Rejected:
`torch.nn.utils.parametrize` (replaces the class's `weight` for every instance, decodes on every read and lets in-place
writes vanish) and rebuilding layers from their attributes (loses hooks, aliases and subclass behaviour).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpq_convert.spec import CODEWORDS, Spec, dtype_name, dtype_of
from rpq_convert.view import WeightView

if TYPE_CHECKING:
    from rpq_convert.kernels.linear import Cut


@functools.cache
def _kernels() -> SimpleNamespace:
    """Return the compiled kernels' torch faces; numba is imported on first use."""
    from rpq_convert.kernels import decode, linear

    return SimpleNamespace(
        linear=linear.linear, decoded=linear.decoded_linear, pointwise=linear.pointwise, tiled=decode.tiled_linear,
        decode=decode.decode, decode_again=decode.decode_again, decode_rows=decode.decode_rows,
        check_rows=decode.check_rows,
    )  # fmt: skip


class RPQWeight(nn.Module):
    """One parameter as codewords.

    Args:
        spec: how it is stored.
        view: the parameter's axes.
        shape: the parameter's shape.
        dtype: dtype of the expanded weight (the codebooks may be narrower).
        padding_idx: an embedding's padding row; it gets no gradient.
        zero_row: a row of an embedding that expands to zeros, whatever its codes say (an untrained padding row).

    Shape:
        codebooks [books, 256, dim], codes uint8 [blocks, n] or [n, blocks], scales [out]; with several stages,
        codebooks and codes have a leading stage axis.
    """

    codebooks: nn.Parameter
    codes: nn.Parameter
    scales: nn.Parameter | None
    kept: Tensor | None = None  # the expanded weight, inside a block of `rpq_convert.decoded`

    def __init__(
        self,
        spec: Spec,
        view: WeightView,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        zero_row: int | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.view, self.shape, self.zero_row = spec, view, tuple(shape), zero_row
        self._probe = torch.empty(0, dtype=dtype, device=device)  # follows .to() and remembers the expanded dtype
        for name, (kind, size) in spec.tensors(view, self.shape).items():
            empty = torch.zeros(size, dtype=kind, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=kind.is_floating_point))
        if spec.scales is None:
            self.register_parameter("scales", None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the expanded weight."""
        return self._probe.dtype

    @property
    def trainable(self) -> bool:
        return self.codebooks.requires_grad or (self.scales is not None and self.scales.requires_grad)

    @functools.cached_property
    def cut(self) -> Cut:
        """The coded matrix as kernels see it."""
        from rpq_convert.kernels.linear import Cut

        n, length = self.view.matrix_shape(self.shape, self.spec.axis)
        return Cut(self.spec.axis, n, length, self.spec.dim, self.spec.books, self.spec.stages)

    @property
    def compiled(self) -> bool:
        """Whether the kernels serve: real tensors on the CPU, with nothing that watches or rewrites torch's operations."""
        return (
            type(self.codes) is nn.Parameter
            and self.codes.device.type == "cpu"
            and self.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def stages_codes(self) -> Tensor:
        """Return the codes as [stages, blocks, n], a view."""
        codes = self.codes if self.spec.stages > 1 else self.codes.unsqueeze(0)
        return codes if self.spec.layout == "blocks" else codes.transpose(1, 2)

    def forward(self) -> Tensor:
        """Expand to the dense parameter, in its stored shape, contiguous, differentiable."""
        if not self.compiled:
            matrix = self._expand(None)  # [n, L]
            return self._finish(self.view.from_matrix(matrix, self.shape, self.spec.axis))
        decode, codes, axes = _kernels().decode, self.stages_codes(), self.view.axes
        if axes[0] == "out" and "expert" not in axes:
            weight = decode(codes, self.codebooks, self.scales, self.cut, self.dtype).view(self.shape)
            return self._finish(weight, scaled=True)
        weight = decode(codes, self.codebooks, None, self.cut, self.dtype)
        matrix = weight if self.spec.axis == "in" else weight.T
        return self._finish(self.view.from_matrix(matrix, self.shape, self.spec.axis))

    def rows(self, index: Tensor, *, checked: bool = False) -> Tensor:
        """Expand the rows `index [r]` of a two-axis parameter cut along its input axis: [r, L]."""
        if not self.compiled:
            return self._finish(self._expand(index), index)
        kernels = _kernels()
        index = index.long().contiguous()
        if checked:
            kernels.check_rows(index, self.shape[0])
        rows = kernels.decode_rows(self.stages_codes(), self.codebooks, self.scales, index, self.cut, self.dtype)
        return self._finish(rows, index, scaled=True)

    @torch.no_grad()
    def matrix_rows(self, start: int, stop: int) -> Tensor:
        """Expand rows `start` to `stop` of the matrix view alone: [stop - start, L], not differentiable."""
        part = self._expand(slice(start, stop))
        if self.scales is not None:
            spread = self.view.spread_scales(self.scales).expand(self.shape)
            part = part * self.view.to_matrix(spread, self.spec.axis)[start:stop].to(self.dtype)
        if self.zero_row is not None and self.spec.axis == "out":
            part[:, self.zero_row] = 0
        elif self.zero_row is not None and start <= self.zero_row < stop:
            part[self.zero_row - start] = 0
        return part

    @property
    def rows_are_entries(self) -> bool:
        """Whether one row of the stored parameter is one row of `M`, so that `rows` serves lookups."""
        return self.spec.axis == "in" and self.view.axes == ("out", "in")

    def _expand(self, index: Tensor | slice | None) -> Tensor:
        spec = self.spec
        length = self.view.matrix_shape(self.shape, spec.axis)[1]
        codes = self.stages_codes().transpose(1, 2)  # [stages, n, blocks]
        if index is not None:
            codes = codes[:, index]
        blocks = codes.shape[2]
        table = self.codebooks.reshape(spec.stages, spec.books * CODEWORDS, spec.dim)
        if spec.stages > 1:
            table = table.to(
                torch.promote_types(table.dtype, torch.float32)
            )  # sums of stages are not rounded on the way
        first = torch.arange(blocks, device=codes.device, dtype=torch.int32) * spec.books // blocks * CODEWORDS
        total: Tensor | None = None
        for stage in range(spec.stages):
            part = F.embedding(codes[stage].int() + first, table[stage])  # [n, blocks, dim]
            total = part if total is None else total + part
        assert total is not None
        return total.to(self.dtype).flatten(1)[:, :length]

    def _finish(self, weight: Tensor, index: Tensor | None = None, *, scaled: bool = False) -> Tensor:
        """Apply row scales and the zero row to a stored-shape weight, or to the rows `index` of it."""
        if self.scales is not None and not scaled:
            scales = self.scales if index is None else self.scales[index]
            weight = weight * self.view.spread_scales(scales.to(self.dtype))
        if self.zero_row is not None:
            at = torch.arange(self.shape[0], device=weight.device) if index is None else index
            weight = weight.masked_fill((at == self.zero_row)[:, None], 0)
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RPQWeight:
        super()._apply(fn, recurse)
        self._probe = fn(self._probe)
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.spec.describe()}, {dtype_name(self.dtype)}"

    def to_config(self) -> dict[str, Any]:
        """Return the JSON-able description from which `from_config` rebuilds the module, empty."""
        return {
            **self.spec.to_dict(),
            "view": self.view.names,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "zero_row": self.zero_row,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], device: torch.device | str | None = None) -> RPQWeight:
        """Rebuild an empty module from `to_config`'s dict."""
        rest = dict(config)
        view = WeightView(rest.pop("view"))
        shape, dtype, zero_row = tuple(rest.pop("shape")), dtype_of(rest.pop("dtype")), rest.pop("zero_row")
        return cls(Spec(**rest), view, shape, dtype=dtype, device=device, zero_row=zero_row)


def _refuse(what: str, owner: str) -> RuntimeError:
    return RuntimeError(
        f"{owner} is computed from RPQ codes, so {what} would be lost. Train its codebooks (<name>_rpq.codebooks), or "
        "call rpq_convert.restore(model) first to get ordinary dense weights back."
    )


IN_PLACE = {"__setitem__"} | {
    f"__i{op}__"
    for op in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
}


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], guarded: type) -> bool:
    """Whether the call writes into a guarded tensor: an in-place method on it, or `out=` it."""
    name = getattr(func, "__name__", "")
    if name == "__set__":  # an attribute of the tensor; gradient bookkeeping on a computed weight is refused as well
        return bool(args) and isinstance(args[0], guarded)
    in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
    target = (
        next(iter(args), None) if args else kwargs.get("tensor", kwargs.get("input", kwargs.get("self")))
    )  # torch.nn.init says tensor=
    targets = target if isinstance(target, (list, tuple)) else [target]  # torch._foreach_add_ and its family take lists
    return (in_place and any(isinstance(t, guarded) for t in targets)) or isinstance(kwargs.get("out"), guarded)


class DecodedView(Tensor):
    """A read-only alias of a decoded weight (a slice, a transpose): reads like any tensor, refuses writes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs, DecodedView):
            raise _refuse(f"{getattr(func, '__name__', 'this')} on a view of it", "A weight")
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return _guard_alias(out, next((a for a in args if isinstance(a, DecodedView)), None))


def _guard_alias(out: Any, source: Tensor | None) -> Any:
    """Wrap a result that shares memory with the decoded tensor, so that a write to it raises too."""
    if source is None:
        return out
    if isinstance(out, (tuple, list)) and any(isinstance(o, Tensor) for o in out):
        return type(out)([_guard_alias(o, source) for o in out]) if type(out) in (tuple, list) else out
    if type(out) is not Tensor or out.device.type == "meta" or out.numel() == 0:
        return out
    with torch._C.DisableTorchFunctionSubclass():
        if out.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            return out.as_subclass(DecodedView)
    return out


class ComputedWeight(Tensor):
    """What `layer.weight` returns: the shape and dtype of the dense parameter, its values decoded when they are used."""

    # transformers' initialisers leave a tensor alone that says so: there is nothing to initialise in a computed weight.
    _is_hf_initialized = True
    _rpq: RPQWeight
    _name: str

    @staticmethod
    def __new__(cls, rpq: RPQWeight, name: str) -> ComputedWeight:
        self = torch.Tensor._make_wrapper_subclass(cls, rpq.shape, dtype=rpq.dtype, device=rpq.codes.device)
        self._rpq, self._name = rpq, name
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ATTRIBUTES and isinstance(args[0], ComputedWeight):
            return ATTRIBUTES[func](args[0])
        if _writes(func, args, kwargs, ComputedWeight):
            first = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
            target = next(a for a in (*first, *kwargs.values()) if isinstance(a, ComputedWeight))
            raise _refuse(f"{getattr(func, '__name__', 'this')} on it", object.__getattribute__(target, "_name"))
        handler = HANDLERS.get(func)
        if handler is not None:
            done = handler(*args, **kwargs)
            if done is not NotImplemented:
                return done
        decoded: dict[int, Tensor] = {}
        args, kwargs = _decode_in(args, decoded), _decode_in(kwargs, decoded)
        out = func(*args, **kwargs)
        for source in decoded.values():
            out = _guard_alias(out, source)
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only below autograd (code that switches __torch_function__ off): decoding here would cut the gradient.
        decoded: dict[int, Tensor] = {}
        with torch.no_grad():
            return func(*_decode_in(args, decoded), **_decode_in(kwargs or {}, decoded))


def _decode_in(value: Any, decoded: dict[int, Tensor]) -> Any:
    """Return the argument tree with every computed weight decoded, each module once."""
    if isinstance(value, ComputedWeight):
        rpq = object.__getattribute__(value, "_rpq")
        if id(rpq) not in decoded:
            decoded[id(rpq)] = rpq()
        return decoded[id(rpq)]
    if type(value) in (tuple, list):
        return type(value)(_decode_in(v, decoded) for v in value)
    if type(value) is dict:
        return {k: _decode_in(v, decoded) for k, v in value.items()}
    return value


def _rpq(weight: ComputedWeight) -> RPQWeight:
    return object.__getattribute__(weight, "_rpq")


def _size(weight: ComputedWeight, dim: int | None = None) -> Any:
    size = torch.Size(_rpq(weight).shape)
    return size if dim is None else size[dim]


# Questions that need no values. Everything not listed decodes.
ATTRIBUTES: dict[Any, Callable[[ComputedWeight], Any]] = {
    Tensor.shape.__get__: _size,  # type: ignore[attr-defined]
    Tensor.dtype.__get__: lambda w: _rpq(w).dtype,  # type: ignore[attr-defined]
    Tensor.device.__get__: lambda w: _rpq(w).codes.device,  # type: ignore[attr-defined]
    Tensor.ndim.__get__: lambda w: len(_rpq(w).shape),  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__: lambda w: _rpq(w).trainable,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: lambda w: _rpq(w).codes.is_meta,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda w: _rpq(w).codes.is_cuda,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__: lambda w: False,  # type: ignore[attr-defined]
    Tensor.grad.__get__: lambda w: None,  # type: ignore[union-attr]
    Tensor.dim: lambda w: len(_rpq(w).shape),
    Tensor.numel: lambda w: _size(w).numel(),
    Tensor.nelement: lambda w: _size(w).numel(),
    Tensor.element_size: lambda w: _rpq(w).dtype.itemsize,
    Tensor.is_floating_point: lambda w: True,
    Tensor.is_complex: lambda w: False,
    Tensor.is_contiguous: lambda w: True,
}


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    return _product(input, weight, bias, ("out", "in"))


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`bias + x W`: how transformers' Conv1D calls its weight, stored [in, out]."""
    if beta != 1 or alpha != 1 or input.ndim != 1:
        return NotImplemented
    return _product(mat1, mat2, input, ("in", "out"))


def _product(x: Tensor, weight: Any, bias: Tensor | None, axes: tuple[str, ...]) -> Any:
    """Multiply by a computed weight without expanding it, where that is the faster way."""
    if not isinstance(weight, ComputedWeight) or isinstance(x, ComputedWeight) or isinstance(bias, ComputedWeight):
        return NotImplemented
    rpq = _rpq(weight)
    if rpq.view.axes != axes or x.device.type != "cpu" or not rpq.compiled:
        return NotImplemented
    kernels, cut, dtype = _kernels(), rpq.cut, rpq.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype != dtype:
        return NotImplemented  # torch says what is wrong
    if x.ndim == 0 or x.shape[-1] != cut.inputs or x.numel() == 0:
        return NotImplemented
    training = torch.is_grad_enabled() and (x.requires_grad or rpq.trainable)
    if rpq.zero_row is not None and training:
        return NotImplemented
    flat = x if x.ndim == 2 else x.reshape(-1, cut.inputs)
    flat = flat if flat.dtype == dtype else flat.to(dtype)
    serve = kernels.linear if cut.cost(flat.shape[0], dtype) <= 1 else kernels.decoded if training else kernels.tiled
    out = serve(flat, rpq.stages_codes(), rpq.codebooks, rpq.scales, bias, cut)
    if rpq.zero_row is not None:
        out[:, rpq.zero_row] = 0 if bias is None else bias[rpq.zero_row].to(dtype)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], cut.outputs)


def _all(values: Any, wanted: int) -> bool:
    return all(v == wanted for v in (values if isinstance(values, (tuple, list)) else (values,)))


def _conv(plain: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the handler of a convolution: 1 x 1 ones are linear layers, others decode into memory that is used again."""

    def handle(
        input: Tensor, weight: Any, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Any:  # fmt: skip
        if not isinstance(weight, ComputedWeight) or type(input) not in (Tensor, nn.Parameter):
            return NotImplemented
        rpq = _rpq(weight)
        training = torch.is_grad_enabled() and (
            input.requires_grad or rpq.trainable or (bias is not None and bias.requires_grad)
        )
        if training or rpq.dtype != torch.float32 != input.dtype or torch.is_autocast_enabled("cpu"):
            return NotImplemented
        if not rpq.compiled or input.device.type != "cpu" or rpq.view.axes[0] != "out":
            return NotImplemented
        kernels = _kernels()
        parts, cut = (rpq.stages_codes(), rpq.codebooks, rpq.scales), rpq.cut
        points = math.prod(rpq.shape[2:]) == 1 and groups == 1 and _all(padding, 0) and _all(stride, 1)
        if points and input.ndim == len(rpq.shape) and input.shape[1] == cut.inputs and input.numel():
            pixels = math.prod(input.shape[2:])
            if cut.cost(len(input) * pixels) <= 1:
                flat = kernels.pointwise(input.reshape(len(input), cut.inputs, pixels), *parts, bias, cut)
                return flat.view(len(input), cut.outputs, *input.shape[2:])
        return plain(input, kernels.decode_again(*parts, cut).view(rpq.shape), bias, stride, padding, dilation, groups)

    return handle


def _looked_up(index: Tensor, weight: Any, padding_idx: int | None) -> tuple[Tensor, Tensor, int | None] | None:
    """Return (rows, new index, new padding_idx) so that a lookup runs on the few decoded rows it needs."""
    if not isinstance(weight, ComputedWeight):
        return None
    rpq = _rpq(weight)
    if not rpq.rows_are_entries or index.device.type == "meta" or not index.numel():
        return None
    entries = rpq.shape[0]
    used, inverse = torch.unique(index, return_inverse=True)
    if used[0] < 0 or used[-1] >= entries:
        bad = used[0] if used[0] < 0 else used[-1]
        raise IndexError(f"index {int(bad)} is out of range for an embedding of {entries} entries")
    if padding_idx is None:
        return rpq.rows(used), inverse, None
    if padding_idx < 0:
        padding_idx += entries
    at = int(torch.searchsorted(used, padding_idx))
    return rpq.rows(used), inverse, at if at < len(used) and int(used[at]) == padding_idx else None


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if isinstance(weight, ComputedWeight) and max_norm is None and not scale_grad_by_freq:
        rpq = _rpq(weight)
        frozen = padding_idx is None or not (
            torch.is_grad_enabled() and rpq.trainable
        )  # no gradient to keep from a row
        if frozen and rpq.rows_are_entries and rpq.compiled and input.device.type == "cpu" and input.numel():
            return rpq.rows(input.reshape(-1), checked=True).view(*input.shape, rpq.shape[1])
    found = _looked_up(input, weight, padding_idx)
    if found is None:
        return (
            F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)
            if sparse
            else NotImplemented
        )
    rows, index, padding = found
    if max_norm is not None:  # torch rescales the looked-up rows in place, outside autograd
        rows = rows * 1  # a fresh tensor, so that the rescaling touches nothing that is saved for backward
    # sparse gradients would be those of the decoded rows, which are no parameter: the codebooks' are dense and small
    return F.embedding(index, rows, padding, max_norm, norm_type, scale_grad_by_freq, False)


def _embedding_bag(
    input: Tensor,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    found = _looked_up(input, weight, padding_idx)
    if found is None and sparse:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, False, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    if found is None:
        return NotImplemented
    rows, index, padding = found
    if padding_idx is not None and padding is None:  # the padding row is not among the bags: leave it out of the call
        padding_idx = None
    return F.embedding_bag(
        index, rows * 1 if max_norm is not None else rows, offsets, max_norm, norm_type, scale_grad_by_freq, mode,
        False, per_sample_weights, include_last_offset, padding,
    )  # fmt: skip


# Operations that do better than decode-then-call; a handler that returns NotImplemented falls back to decoding.
HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.conv1d: _conv(F.conv1d),
    F.conv2d: _conv(F.conv2d),
    F.conv3d: _conv(F.conv3d),
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
