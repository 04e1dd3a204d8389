"""Layers built by hand, to be trained from random codes: `RPQLinear(1024, 4096, num_codebooks=16)`.

Each constructor makes the torch layer on meta and converts it, so that what comes back is that torch layer (same
forward, same arguments, `isinstance(x, nn.Linear)`) with a computed weight. Nothing of a layer is written twice: the
constructors below are signatures, in RPQ-pytorch's order. Their classes answer `isinstance` and are never instantiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rpq_convert.conversion.memory import convert
from rpq_convert.core.keywords import keywords
from rpq_convert.core.options import dtype_text
from rpq_convert.core.spec import dtype_of
from rpq_convert.errors import PlanError
from rpq_convert.layers import surgery
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.models.fresh import draw_seed, materialise

__all__ = [
    "RPQBilinear", "RPQConv1d", "RPQConv2d", "RPQConv3d", "RPQConvTranspose1d", "RPQConvTranspose2d",
    "RPQConvTranspose3d", "RPQEmbedding", "RPQLinear", "RPQWeight",
]  # fmt: skip


@keywords()
def build_layer(
    kind: type[nn.Module],
    arguments: Mapping[str, Any],
    num_codebooks: int | None,
    *,
    bits: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Any:
    """Build one layer with random codes, at the variance that its own initialisation would have given the weight.

    Args:
        kind: the torch class, and `arguments` those of its constructor.
        num_codebooks: one codebook for each of this many equal parts of the output axis (an embedding's width).
        bits: instead of `num_codebooks`: code bits per weight, one codebook for the whole weight.
        seed: decides codes and codebooks; by default drawn from `generator`, or from torch's global generator, so that
            `torch.manual_seed` decides as it does for any torch layer.

    Raises:
        PlanError (a ValueError): a number of codebooks that does not divide the width; it names some that do.
    """
    if (num_codebooks is None) == (bits is None):
        raise PlanError(f"RPQ{kind.__name__} needs either num_codebooks or bits")
    if num_codebooks is not None and (not isinstance(num_codebooks, int) or isinstance(num_codebooks, bool)):
        raise PlanError(f"num_codebooks must be a whole number of at least 1, not {num_codebooks!r}")
    named = dtype_text(dtype or torch.get_default_dtype())
    layer = kind(**arguments, device="meta", dtype=dtype_of(named))
    size = {"num_codebooks": num_codebooks} if bits is None else {"bits": bits, "books": 1}
    rule = {"match": "weight", **size, "codebook_dtype": named, "scales": "none"}
    if seed is not None and generator is None:
        generator = torch.Generator().manual_seed(seed)
    seed = draw_seed(generator) if seed is None else seed
    where = device or torch.get_default_device()
    with torch.device("cpu"):  # the same numbers on every device
        convert(layer, rules=[rule], fit="random", grow=True, seed=seed, executor="serial")
    materialise(layer, generator=generator)
    layer.num_codebooks = num_codebooks  # type: ignore[assignment]
    # inside `parameters_on_meta` (a loader builds an empty model) there is nothing to move
    return layer if any(p.is_meta for p in layer.parameters()) else layer.to(where)


class _Constructor(type):
    """Makes `isinstance(layer, RPQLinear)` true for every converted Linear, however it was converted."""

    layer: type[nn.Module]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, surgery.RPQLayer) and isinstance(instance, cls.layer)


class RPQLinear(metaclass=_Constructor):
    """Build an `nn.Linear` whose weight is codes and `num_codebooks` codebooks, with sub-vectors along the outputs.

    Example:
        >>> RPQLinear(1024, 4096, num_codebooks=16)(torch.randn(1, 1, 1024)).shape
        torch.Size([1, 1, 4096])
    """

    layer = nn.Linear

    def __new__(  # type: ignore[misc]
        cls,
        in_features: int,
        out_features: int,
        num_codebooks: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        **how: Any,
    ) -> nn.Linear:
        arguments = {"in_features": in_features, "out_features": out_features, "bias": bias}
        return build_layer(cls.layer, arguments, num_codebooks, device=device, dtype=dtype, **how)


class RPQEmbedding(metaclass=_Constructor):
    """Build an `nn.Embedding` whose table is codes and `num_codebooks` codebooks; its padding row is zero and stays so.

    A lookup expands just the rows it needs. `sparse=True` is accepted; the codebooks' gradients are dense, and small.
    """

    layer = nn.Embedding

    def __new__(  # type: ignore[misc]
        cls,
        num_embeddings: int,
        embedding_dim: int,
        num_codebooks: int | None = None,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        **how: Any,
    ) -> nn.Embedding:
        arguments = {
            "num_embeddings": num_embeddings, "embedding_dim": embedding_dim, "padding_idx": padding_idx,
            "max_norm": max_norm, "norm_type": norm_type, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse,
        }  # fmt: skip
        return build_layer(cls.layer, arguments, num_codebooks, device=device, dtype=dtype, **how)


class RPQBilinear(metaclass=_Constructor):
    """Build an `nn.Bilinear` whose weight is codes and `num_codebooks` codebooks, with sub-vectors along the outputs."""

    layer = nn.Bilinear

    def __new__(  # type: ignore[misc]
        cls,
        in1_features: int,
        in2_features: int,
        out_features: int,
        num_codebooks: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        **how: Any,
    ) -> nn.Bilinear:
        arguments = {
            "in1_features": in1_features, "in2_features": in2_features, "out_features": out_features, "bias": bias
        }  # fmt: skip
        return build_layer(cls.layer, arguments, num_codebooks, device=device, dtype=dtype, **how)


HOW = ("bits", "seed", "generator", "device", "dtype")


class _Convolution(metaclass=_Constructor):
    """The shared signature: torch's arguments (stride, padding, groups, …) follow `num_codebooks` by keyword."""

    layer: type[nn.Module]

    def __new__(  # type: ignore[misc]
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        num_codebooks: int | None = None,
        **rest: Any,
    ) -> Any:
        how = {k: rest.pop(k) for k in HOW if k in rest}
        arguments = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, **rest}
        return build_layer(cls.layer, arguments, num_codebooks, **how)


class RPQConv1d(_Convolution):
    """Build an `nn.Conv1d` with a computed weight; the codebooks divide `out_channels`."""

    layer = nn.Conv1d


class RPQConv2d(_Convolution):
    """Build an `nn.Conv2d` with a computed weight; the codebooks divide `out_channels`."""

    layer = nn.Conv2d


class RPQConv3d(_Convolution):
    """Build an `nn.Conv3d` with a computed weight; the codebooks divide `out_channels`."""

    layer = nn.Conv3d


class RPQConvTranspose1d(_Convolution):
    """Build an `nn.ConvTranspose1d` with a computed weight; the codebooks divide `out_channels / groups`."""

    layer = nn.ConvTranspose1d


class RPQConvTranspose2d(_Convolution):
    """Build an `nn.ConvTranspose2d` with a computed weight; the codebooks divide `out_channels / groups`."""

    layer = nn.ConvTranspose2d


class RPQConvTranspose3d(_Convolution):
    """Build an `nn.ConvTranspose3d` with a computed weight; the codebooks divide `out_channels / groups`."""

    layer = nn.ConvTranspose3d
