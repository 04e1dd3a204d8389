"""Codes: whole numbers that choose codewords, as a buffer that training habits cannot corrupt.

Codes are buffers, not parameters: a loop over `model.parameters()` (an optimizer, a norm, an average, noise, unfreezing, FSDP's flat
parameter) means numbers that can be trained. A loop over buffers or over `state_dict()` still contains them. An average of indices is no
index, so a `Codes` tensor takes new values only from an ordinary tensor of its own dtype, as loading does. Every other write must leave
the codes as they are, or it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-4  # what averages of equal codes, computed in float32, may miss them by
FOREACH = "_foreach_"
# Sums of bytes would wrap around: these are computed in double precision, and `codes += x` gives another tensor.
ARITHMETIC = frozenset(("add", "sub", "mul")) | {
    f"__{side}{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv") for side in ("", "r")
}
# writes that change no value
HARMLESS = ("share_memory_", "rename_", "retain_grad_")
KEPT = frozenset(
    (Tensor.detach, Tensor.clone, Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.contiguous, Tensor.data.__get__)  # type: ignore[attr-defined]
)


class Codes(Tensor):
    """The codes, or positions of outliers, of an RPQWeight: reads like any tensor, refuses to be averaged or scaled.

    Attributes:
        plain: the same memory as an ordinary tensor, for code that knows what it writes.
    """

    plain: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__set__" and isinstance(args[0], Codes):
            return _set(func, args[0], args[1])
        target = args[0] if args else next(iter(kwargs.values()), None)
        if name == "requires_grad_":
            return target  # unfreezing a model leaves its codes alone
        if name in ARITHMETIC and not isinstance(kwargs.get("out"), Codes):
            return func(*(_number(a) for a in args), **{k: _number(a) for k, a in kwargs.items()})
        in_place = _in_place(name)
        if in_place and isinstance(target, (list, tuple)) and any(isinstance(t, Codes) for t in target):
            return _each(name, args, kwargs)
        if (in_place and isinstance(target, Codes)) or isinstance(kwargs.get("out"), Codes):
            return _write(func, name, target if in_place else kwargs["out"], args, kwargs)  # type: ignore[arg-type]
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        same = isinstance(out, Tensor) and isinstance(target, Codes) and out.dtype == target.plain.dtype
        return guard(out) if func in KEPT and same else out

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc, override]
        return self + other

    def __isub__(self, other: Any) -> Tensor:  # type: ignore[misc, override]
        return self - other

    def __imul__(self, other: Any) -> Tensor:  # type: ignore[misc, override]
        return self * other

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        if id(self) not in memo:
            memo[id(self)] = guard(self.plain.clone())
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)  # a file holds an ordinary tensor


def guard(codes: Tensor) -> Codes:
    """Return the same memory as a `Codes` tensor."""
    if isinstance(codes, Codes):
        return codes
    with torch._C.DisableTorchFunctionSubclass():
        plain = codes.detach()
        guarded = plain.as_subclass(Codes)
    guarded.plain = plain
    return guarded


def unguarded(codes: Tensor) -> Tensor:
    """Return codes as an ordinary tensor over the same memory."""
    return codes.plain if type(codes) is Codes else codes


def whole(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers of any dtype, such as the average of checkpoints, as ordinary codes of this one.

    Raises:
        ValueError: they are not whole, or out of range.
    """
    values = unguarded(values)
    if values.dtype == dtype or values.is_complex() or values.is_meta:
        return values
    near, bounds = values.double().round(), torch.iinfo(dtype)
    if not bool(((near >= bounds.min) & (near <= bounds.max) & ((near - values).abs() <= ROUNDING)).all()):
        raise ValueError(
            "holds numbers between codes, as an average of models whose codes differ does; average copies of one converted model, or "
            "restored models"
        )
    return near.to(dtype)


def _number(value: Any) -> Any:
    return value.plain.double() if isinstance(value, Codes) else value


def _in_place(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in HARMLESS
    return (
        in_place
        or name == "__setitem__"
        or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    )


def _set(func: Any, codes: Codes, value: Any) -> None:
    """Set an attribute: `.data` is a write, gradients are not for codes."""
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if attribute == "requires_grad":
        return
    if attribute != "data":
        with torch._C.DisableTorchFunctionSubclass():
            return func(codes, value)
    plain = unguarded(value)
    if not isinstance(value, Codes) and plain.dtype == codes.plain.dtype and plain.shape == codes.plain.shape:
        codes.plain = plain.detach()
        with torch._C.DisableTorchFunctionSubclass():
            func(codes, codes.plain)
        return
    _replace(codes, plain, "an assignment to .data", load=False)


def _each(name: str, args: Any, kwargs: Any) -> None:
    """Do what a `torch._foreach_…_` function does, tensor by tensor."""
    own = name.removeprefix(FOREACH)
    for i, target in enumerate(args[0]):
        rest = [a[i] if isinstance(a, (list, tuple)) else a for a in args[1:]]
        getattr(target, own)(*rest, **kwargs)


def _write(func: Callable[..., Any], name: str, codes: Codes, args: Any, kwargs: Any) -> Codes:
    """Carry out an in-place operation on a copy, in double precision, and keep what it gives where the codes may hold it."""
    if name == "copy_":
        source = args[1] if len(args) > 1 else kwargs["src"]
        return _replace(codes, unguarded(source), name, load=not isinstance(source, Codes))
    if name == "__setitem__" and getattr(args[2], "dtype", None) == codes.plain.dtype:
        func(codes.plain, args[1], unguarded(args[2]))
        return codes
    copy = codes.plain.double()
    args = [copy if a is codes else _number(a) for a in args]
    kwargs = {k: copy if a is codes else _number(a) for k, a in kwargs.items()}
    func(*args, **kwargs)
    return _replace(codes, copy, name, load=False)


def _replace(codes: Codes, values: Any, what: str, *, load: bool) -> Codes:
    """Take values that are the same, or, to `load` them, any of the same dtype; refuse others."""
    own = codes.plain
    if load and values.dtype == own.dtype:
        own.copy_(values)
        return codes
    fits = values.shape == own.shape
    if fits and values.dtype == own.dtype and torch.equal(values.to(own.device), own):
        return codes  # as most averages end: without eight bytes for every code
    changed = int(((values.double().to(own.device) - own).abs() > ROUNDING).sum()) if fits else own.numel()
    if not changed:
        return codes
    raise RuntimeError(
        f"{what} would change {changed:,} of {own.numel():,} RPQ codes, which are indices and not numbers: average or blend models of "
        "the same codes (copies of one converted model), use load_state_dict to take another model's, or rpq_convert.restore(model) "
        "first"
    )
