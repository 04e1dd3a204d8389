"""Codebooks and scales as kernels read them, kept as long as the tensor lives and does not change.

They are kept by tensor, not by weight, since a compiled or exported graph calls kernels with tensors alone.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpq_convert.kernels.cpu.few_tokens import TOP
from rpq_convert.kernels.jit.vectors import HAS_FLOAT16

SMALL = 1 << 16  # codebooks of fewer numbers are kept wide
WHOLE = 1 << 15  # bytes of a tensor that are compared whole, in two microseconds


class Prepared:
    """What was made of one tensor, by kind, and how to tell that the tensor has changed since.

    Writes through `.data` leave no mark on a tensor's version, so its values are compared as well. Where only the values have changed,
    as in every step of training, tables get the new ones in the memory that they have: launches that hold their addresses stay, and no
    small piece of memory comes to lie among those that activations left.
    """

    def __init__(self, tensor: Tensor, gone: Callable[[Any], None]) -> None:
        self.tensor = weakref.ref(tensor, gone)
        self.place, self.shape, self.dtype = tensor.data_ptr(), tensor.shape, tensor.dtype
        self.kinds: dict[Any, Any] = {}
        self.tables: dict[str, tuple[Tensor, ...]] = {}  # those of `kinds` that are made of the tensor's values
        self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        self.version, self.values = tensor._version, _values(tensor)
        self.size = tensor.nbytes if type(self.values) is bytes else 0

    def fits(self, tensor: Tensor) -> bool:
        """Whether this is of the tensor as it is now; tables get its values where only these have changed."""
        if self.tensor() is not tensor:
            return False
        if self.unchanged(tensor):
            return True
        place, shape, dtype = tensor.data_ptr(), tensor.shape, tensor.dtype
        if (place, shape, dtype) != (self.place, self.shape, self.dtype) or not place or not tensor.is_contiguous():
            return False
        for kind, tables in self.tables.copy().items():
            for table, new in zip(tables, _tables(tensor, kind)):
                if table.data_ptr() != new.data_ptr():
                    table.copy_(new)
        self._note(tensor)  # at last: another thread that finds it noted uses the tables
        return True

    def unchanged(self, tensor: Tensor) -> bool:
        """Whether the tensor that this was made of is what it was."""
        if self.version != tensor._version or self.place != tensor.data_ptr() or self.shape != tensor.shape:
            return False
        if self.size and tensor.is_contiguous():
            return ctypes.string_at(self.place, self.size) == self.values
        return bool(_values(tensor) == self.values)


def _values(tensor: Tensor) -> Any:
    """Return a tensor's bytes, or evenly spread values of a large one. numpy would keep FSDP from freeing the memory."""
    place, size = tensor.data_ptr(), tensor.nbytes
    if not place:  # its memory was given back
        return None
    if size <= WHOLE and tensor.is_contiguous():
        return ctypes.string_at(place, size)
    return tensor.detach().reshape(-1)[:: max(1, tensor.numel() // 64)].tolist()


_KEPT: dict[int, Prepared] = {}  # by id of the tensor; torch's dictionary of weak references takes a microsecond longer


def prepared(codebooks: Tensor, kind: Any, make: Callable[[], Any] | None = None) -> Any:
    """Return codebooks [stages, books, 256, dim], or scales, as a kernel reads them, made once.

    Args:
        kind: "lookup": (codebooks as [stages, books, dim, 256], norms of the longest codewords [stages, books]); float32, or
            float16 where that is what they are and there are many, as memory is what limits a few tokens. "digits": (bytes
            [stages, books, dim, 3, 256], steps [stages, books]), see `few_tokens`. A dtype's name and " planes": the bytes of its
            numbers, lowest first, [stages, books, dim, bytes, 256]. A dtype's name: in that dtype, as stored; with
            " transposed" after it, as [stages, books, dim, 256]. Any other: what `make` returns.
    """
    if codebooks.is_inference():
        return make() if make else _alone(_tables(codebooks, kind))
    entry = held(codebooks)
    if kind not in entry.kinds:
        if make is None:
            entry.tables[kind] = _tables(codebooks, kind)
        entry.kinds[kind] = make() if make else _alone(entry.tables[kind])
    return entry.kinds[kind]


def _alone(tables: tuple[Tensor, ...]) -> Any:
    return tables if len(tables) > 1 else tables[0]


def held(tensor: Tensor) -> Prepared:
    """Return what is kept of a tensor as it is now."""
    name = id(tensor)
    found = _KEPT.get(name)
    if found is None or not found.fits(tensor):
        found = _KEPT[name] = Prepared(tensor, functools.partial(_forget, _KEPT, name))
    return found


def _forget(kept: dict[int, Prepared], name: int, gone: Any) -> None:
    """Drop what was kept of a tensor that is gone. At the end of a process, too, when this module's names are."""
    if name in kept and kept[name].tensor is gone:
        del kept[name]


def _tables(tensor: Tensor, kind: str) -> tuple[Tensor, ...]:
    """Return what `prepared` says of a kind: no inference tensors, which could not be written later."""
    with torch.inference_mode(False):
        return _made(tensor.detach(), kind)


def _made(codebooks: Tensor, kind: str) -> tuple[Tensor, ...]:
    if kind == "lookup":
        wide = codebooks.float()
        keep_half = codebooks.dtype == torch.float16 and codebooks.numel() > SMALL and HAS_FLOAT16
        kept = codebooks if keep_half else wide
        return kept.transpose(-1, -2).contiguous(), torch.linalg.vector_norm(wide, dim=-1).amax(-1).contiguous()
    if kind == "digits":
        step = codebooks.float().abs().amax((-1, -2)) / TOP
        step = torch.where(step == 0, 1.0, step)
        whole = (codebooks.double() / step[..., None, None].double()).round().long() + 0x808080
        digits = torch.stack([whole >> 8 * i & 255 for i in range(3)], -1).to(torch.uint8)  # [..., 256, dim, 3]
        return digits.movedim(-3, -1).contiguous(), step * 65536
    name, _, order = kind.partition(" ")
    kept = codebooks.to(getattr(torch, name))
    if order == "planes":
        return (kept.contiguous().view(torch.uint8).unflatten(-1, (kept.shape[-1], -1)).movedim(-3, -1).contiguous(),)
    return ((kept.transpose(-1, -2) if order else kept).contiguous(),)


def contiguous_float32(t: Tensor | None) -> Tensor | None:
    """Return a tensor whose address kernels can use; mostly the tensor itself."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.detach().float().contiguous()


def cached_float32(scales: Tensor | None) -> Tensor | None:
    """Return scales as float32 without gaps, kept for the next call where they are not."""
    if scales is None or (scales.dtype == torch.float32 and scales.is_contiguous()):
        return scales
    return prepared(scales, "float32")  # type: ignore[no-any-return]


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
