"""Codebooks as kernels read them, kept while they do not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpq_convert.kernels.cpu.few_tokens import TOP
from rpq_convert.kernels.jit.vectors import HAS_HALF

SMALL = 1 << 16  # codebooks of fewer numbers are kept wide
# id(codebooks) -> (weak reference, version, address, shape, sample, its values, {kind: tensors}); torch's dictionary of
# weak references takes a microsecond longer
_READY: dict[int, tuple[Any, ...]] = {}


def ready(codebooks: Tensor, kind: Any, make: Callable[[], Any] | None = None) -> Any:
    """Return codebooks [stages, books, 256, dim] as a kernel reads them.

    Kind "lookup": (as [stages, books, dim, 256], norms of the longest codewords [stages, books]); float32, or float16 where
    that is what they are and there are many, as memory is what limits a few tokens. Kind "digits": (bytes
    [stages, books, dim, 3, 256], steps [stages, books]), see `dots`. A dtype's name: in that dtype, as stored; with " down",
    as [stages, books, dim, 256]. Any other: what `make` returns.

    Kept while the tensor lives and does not change. Writes through `.data` leave no mark on a tensor's version, so some of
    its values are compared as well.
    """
    if codebooks.is_inference():
        return make() if make else _prepare(codebooks.detach(), kind)
    held = _READY.get(id(codebooks))
    if (
        held is None
        or held[0]() is not codebooks
        or held[1] != codebooks._version
        or held[2] != codebooks.data_ptr()
        or held[3] != codebooks.shape
        or held[4].tolist() != held[5]
    ):
        values = codebooks.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // 13)]
        name = id(codebooks)
        weak = weakref.ref(codebooks, lambda gone: _forget(name, gone))
        state = (weak, codebooks._version, codebooks.data_ptr(), codebooks.shape)
        held = _READY[name] = (*state, sample, sample.tolist(), {})
    kinds = held[6]
    if kind not in kinds:
        kinds[kind] = make() if make else _prepare(codebooks.detach(), kind)
    return kinds[kind]


def _forget(name: int, gone: Any) -> None:
    if name in _READY and _READY[name][0] is gone:
        del _READY[name]


def _prepare(codebooks: Tensor, kind: str) -> Any:
    if kind == "lookup":
        wide = codebooks.float()
        keep_half = codebooks.dtype == torch.float16 and codebooks.numel() > SMALL and HAS_HALF
        kept = codebooks if keep_half else wide
        return kept.transpose(-1, -2).contiguous(), torch.linalg.vector_norm(wide, dim=-1).amax(-1).contiguous()
    if kind == "digits":
        step = codebooks.float().abs().amax((-1, -2)) / TOP
        step = torch.where(step == 0, 1.0, step)
        whole = (codebooks.double() / step[..., None, None].double()).round().long() + 0x808080
        digits = torch.stack([whole >> 8 * i & 255 for i in range(3)], -1).to(torch.uint8)  # [..., 256, dim, 3]
        return digits.movedim(-3, -1).contiguous(), step * 65536
    name, _, down = kind.partition(" ")
    kept = codebooks.to(getattr(torch, name))
    return (kept.transpose(-1, -2) if down else kept).contiguous()


def plain_float(t: Tensor | None) -> Tensor | None:
    """Return a tensor whose address kernels can use; mostly the tensor itself."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.detach().float().contiguous()


def kept_float(scales: Tensor | None) -> Tensor | None:
    """Return scales as float32 without gaps, kept for the next call where they are not."""
    if scales is None or (scales.dtype == torch.float32 and scales.is_contiguous()):
        return scales
    return ready(scales, "float32")  # type: ignore[no-any-return]


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
