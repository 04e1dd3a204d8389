"""Quantized already: what tells that another tool has made codes of a model's weights.

Such weights mean nothing without their scales, and a model that has no place for the scales would be converted to noise. So they are
refused before the first fit: models in memory by what their tensors and modules are, checkpoints by the tensors that they hold, by
what their config announces and by the records that tools leave beside them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpq_convert.errors import PlanError, SourceError
from rpq_convert.planning.announced import AGAIN
from rpq_convert.planning.layer_types import is_rpq

TOOLS = (
    "torchao", "optimum", "quanto", "bitsandbytes", "hqq", "gptqmodel", "auto_gptq", "awq", "autoawq", "aqlm", "eetq", "fbgemm_gpu",
    "compressed_tensors", "modelopt", "quark", "vptq", "spqr_quant", "auto_round", "neural_compressor", "fp_quant", "sinq",
    "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized",
    *(f"transformers.integrations.{kind}" for kind in ("bitnet", "finegrained_fp8", "fbgemm_fp8", "higgs", "mxfp4", "nvfp4")),
    *(f"transformers.integrations.{kind}" for kind in ("gguf", "ggml", "fouroversix")),
)  # fmt: skip
SCALE = re.compile(r"(.*[._])?\w*(scales?|scale_inv|zero_points?|zeros)", re.IGNORECASE)
PARTS = re.compile(  # of a quantized weight, whatever module they belong to
    r"(.*\.)?(qweight|qzeros|g_idx|scb|(nested_)?absmax|(nested_)?quant_map|quant_state.*|weight_format|w_q|qidxs|trellis|suh|svh|scaled_fp8"
    r"|q_(weight|scale|scale_max|groups|perm|invperm)|weight_(scale|scale_inv|scale_2|zero_point|packed|shape|global_scale|g_idx)"
    r"|(input|output|scale)_(scale|global_scale|zero_point|weight)|_?packed_params.*|.*_quantizer\._(amax|scale)|.*_(blocks|scales))",
    re.IGNORECASE,
)
PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)


def refuse_model(model: nn.Module) -> None:
    """Refuse a model in memory that another tool has quantized, before anything is touched.

    Raises:
        PlanError: which of its parts is quantized.
    """
    for path, module in model.named_modules():
        if is_rpq(module):
            continue
        own = {**module._parameters, **module._buffers}
        tensors: dict[str, Tensor] = {n: t for n, t in own.items() if t is not None}
        if (
            found := _of_tool(type(module))
            or next((f for t in tensors.values() if (f := _kind(t))), "")
            or _packed(tensors)
        ):
            where = f"{path} ({type(module).__name__})" if path else type(module).__name__
            raise PlanError(f"{where} is quantized already ({found}); {AGAIN}")


def _of_tool(kind: type) -> str:
    """Return the tool that a class comes from, or an empty text."""
    place = f"{kind.__module__}."
    return next((tool for tool in TOOLS if place.startswith(f"{tool}.")), "")


def _kind(tensor: Tensor) -> str:
    """Return what kind of quantized tensor this is, or an empty text."""
    if tensor.is_quantized:
        return str(tensor.dtype)
    inner = type(tensor.data) if isinstance(tensor, nn.Parameter) else type(tensor)
    for kind in (type(tensor), inner):
        if tool := _of_tool(kind):
            return f"{tool}: {kind.__name__}"
        if hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith(
            ("torch.distributed", "torch.nested", "rpq_convert")
        ):
            return f"a tensor of {kind.__module__}: {kind.__name__}"
    return ""


def _packed(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of whole or one-byte numbers in the place of a weight, with scales beside them, or an empty text."""
    scaled = any(SCALE.fullmatch(n) for n in tensors)
    low = [n for n, t in tensors.items() if t.dtype in PACKED or (t.is_floating_point() and t.dtype.itemsize == 1)]
    weights = [n for n in low if tensors[n].ndim > 1 and ("weight" in n or n.startswith("q"))]
    return f"{weights[0]} is {tensors[weights[0]].dtype}, with scales beside it" if scaled and weights else ""


def refuse_parts(
    unused: Mapping[str, Any], used: Mapping[str, tuple[Any, Tensor]], state: Mapping[str, Tensor], where: str | Path
) -> None:
    """Refuse a checkpoint that holds scales, zero points or packed weights for which its model has no place.

    Args:
        unused: the model's name for it -> entry of a header, of what has no place in the model.
        used: name -> (entry or tensor of the checkpoint, the model's own tensor). state: the model's tensors.
    """
    matrices = {name for name, t in state.items() if t.ndim > 1 and t.is_floating_point()}
    low = next((n for n, (found, own) in used.items() if own.is_floating_point() and not _is_float(found.dtype)), "")
    small = any(found.dtype.itemsize == 1 for found, own in used.values() if own.is_floating_point())
    for name, info in unused.items():
        packed = info.dtype in PACKED and len(info.shape) > 1 and "weight" in name
        if packed or PARTS.fullmatch(name) or _beside(name, matrices) or (small and SCALE.fullmatch(name)):
            _refuse(name, info, "that the model has no place for", where)
    if low:
        _refuse(low, used[low][0], "where the model has floating-point numbers", where)


def _refuse(name: str, info: Any, why: str, where: str | Path) -> None:
    raise SourceError(
        f"{where} is quantized already: {name} {list(info.shape)} {info.dtype} is a scale, a zero point or packed weights {why}; {AGAIN}"
    )


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _beside(name: str, matrices: Collection[str]) -> bool:
    """Return whether a name continues that of a weight, or is one of its layer: `fc.weight_scale`, `fc.input_scale`, `fc.lora_A.weight`."""
    for i, sign in enumerate(name):
        if sign in "._" and name[:i] in matrices:
            return True
        if sign == "." and f"{name[:i]}.weight" in matrices and name[i + 1 :] != "bias":
            return True
    return False
