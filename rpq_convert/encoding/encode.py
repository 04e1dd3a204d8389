"""One job, one tensor, one result: the pure step that conversion in memory and as a stream share."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.results import Encoded, Statistics
from rpq_convert.core.rotation import rotate
from rpq_convert.core.spec import CODEBOOK_DTYPES, DTYPES, dtype_of
from rpq_convert.encoding.init_std import default_std
from rpq_convert.errors import EncodeError
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.plan import Job


def encode(
    job: Job,
    tensor: Tensor,
    *,
    std: float | None = None,
    statistics: Statistics | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Encoded:
    """Fit codebooks and codes to a tensor; with `fit="random"`, draw them at the tensor's standard deviation.

    Args:
        job: what to do; its seed decides every random number.
        tensor: the dense parameter. On meta it must be a random fit, and `std` the deviation to reach.
        statistics: of the layer's calibration inputs. With them the error of its output is minimised, not that of its weights.
        start: the tensors of an earlier encoding, to start from. Without statistics it is kept.

    Raises:
        EncodeError: wrong shape, NaN or infinite values, values out of the range of the codebooks' dtype.
    """
    began = time.perf_counter()
    if tuple(tensor.shape) != job.shape:
        raise EncodeError(f"{job.name}: the plan says {list(job.shape)}, the tensor is {list(tensor.shape)}")
    if tensor.is_meta and not job.is_random:
        raise EncodeError(f"{job.name}: the tensor is on meta, so there is nothing to fit; use fit='random'")
    dense = tensor.detach().to("cpu", torch.float32) if not tensor.is_meta else tensor
    if not tensor.is_meta and not torch.isfinite(dense.sum()) and not torch.isfinite(dense).all():
        bad = int((~torch.isfinite(dense)).sum())
        raise EncodeError(f"{job.name} {list(job.shape)} holds {bad} NaN or infinite values; fix or exclude it")
    if job.spec.rotation and not job.is_random:
        view = job.weight_view
        matrix = rotate(view.to_matrix(dense, "in"), job.spec.rotation)
        dense = view.from_matrix(matrix, job.shape, "in").contiguous()
        statistics = statistics and _rotated(statistics, job.spec.rotation)
    encoded = _random(job, dense, std) if job.is_random else _fit(job, dense, statistics, start)
    tensors, dead, zero_row = encoded
    error = None
    if not job.is_random:
        error = relative_error(dense, build(job, tensors, zero_row, dtype=torch.float32))
    inputs = statistics.inputs if statistics else None
    return Encoded(job.name, tensors, error, dead, time.perf_counter() - began, zero_row, inputs)


def build(job: Job, tensors: Mapping[str, Tensor], zero_row: int | None, dtype: torch.dtype | None = None) -> RPQWeight:
    """Return the module that holds these tensors."""
    rpq = RPQWeight(
        job.spec, job.weight_view, job.shape, dtype=dtype or dtype_of(job.dtype), device="meta", zero_row=zero_row
    )
    for name, tensor in tensors.items():
        rpq.set_tensor(name, tensor)
    rpq._probe = torch.empty(0, dtype=rpq.dtype, device=tensors["codes"].device)
    return rpq


CHUNK = 1 << 18  # weights decoded at a time to measure an error


@torch.no_grad()
def relative_error(dense: Tensor, rpq: RPQWeight) -> float:
    """Return `|W - W'|^2 / |W|^2`, 0 for a zero tensor that decodes to zeros."""
    matrix = rpq.view.to_matrix(dense, rpq.spec.axis)  # [n, L]
    base = rest = 0.0
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        part = matrix[start : start + step].double()
        base += float(part.square().sum())
        rest += float(part.sub_(rpq.matrix_rows(start, start + step)).square_().sum())
    return rest / base if base else (math.inf if rest else 0.0)


# Without statistics, large weights count more up to this dim: nearest codewords leave them the largest errors, and language models
# depend on them. At 8 bits SmolLM2's divergence falls from 0.0054 to 0.0037 (MiniLM's mean cosine stays at 0.9998). At dim 2 the
# gain is smaller: SmolLM2's divergence falls from 0.611 to 0.573, and MiniLM's cosine falls from 0.973 to 0.967.
LARGE = 1


def _fit(
    job: Job, dense: Tensor, statistics: Statistics | None, start: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], int, int | None]:
    from rpq_convert.fit import FITTERS, Fitted, count_dead, fit_gptq  # numba: imported on use

    spec, view = job.spec, job.weight_view
    tensors: dict[str, Tensor] = {}
    zero_row = job.padding_idx if job.padding_idx is not None and not dense[job.padding_idx].any() else None
    if statistics is not None and statistics.cross is not None:
        dense = view.from_matrix(_asymmetric(view.to_matrix(dense, "in"), statistics), job.shape, "in").contiguous()
    if spec.outliers:
        matrix = view.to_matrix(dense, "in")
        positions = matrix.abs().topk(spec.outliers, 1).indices.sort(1).values
        dtypes = {part: dtype for part, (dtype, _) in spec.tensors(view, job.shape).items()}
        values = matrix.gather(1, positions).to(dtypes["outliers"])
        if not torch.isfinite(values).all():
            raise EncodeError(f"{job.name}: an outlier overflows {spec.outlier_dtype}; use outliers=0")
        tensors |= {"outliers": values, "positions": positions.to(dtypes["positions"])}
        dense = view.from_matrix(matrix.scatter(1, positions, 0.0), job.shape, "in").contiguous()
    scaled, exact = dense, None
    if spec.scales is not None:
        spread = view.spread_scales(torch.empty(view.scale_shape(job.shape))).shape
        scales = row_scales(spread, dense) if start is None else start["scales"].reshape(spread)
        stored = scales.to(DTYPES[spec.scales])
        if not torch.isfinite(stored).all():
            raise EncodeError(f"{job.name}: a row scale overflows {spec.scales}; use scales='float32'")
        tensors["scales"] = stored.reshape(view.scale_shape(job.shape))
        exact = stored.float()
        scaled = dense / torch.where(exact > 0, exact, 1.0)
    codebook_dtype = CODEBOOK_DTYPES[spec.codebook_dtype]
    if float(scaled.abs().max()) > torch.finfo(codebook_dtype).max:
        raise EncodeError(f"{job.name}: values overflow {spec.codebook_dtype} codebooks; use codebook_dtype='float32'")
    try:
        matrix = view.to_matrix(scaled, spec.axis)
        size = {"dim": spec.dim, "books": spec.books, "stages": spec.stages}
        common: dict[str, Any] = {**size, "seed": job.seed, "codebook_dtype": codebook_dtype}
        before = None
        if start is not None:
            books, codes = _unstored(job, start)
            before = Fitted(books, codes, count_dead(codes, spec.books))
        if statistics is None:
            large = spec.stages == 1 and spec.dim <= LARGE
            fitted = before or FITTERS[job.fit](matrix, importance="size" if large else None, **common)
        else:
            hessian = statistics.hessian
            if hessian.ndim == 3 and spec.axis == "out" and "expert" not in view.axes:
                hessian = hessian.mean(0)  # a sub-vector runs over outputs of several groups
            fitted = fit_gptq(matrix, hessian, axis=spec.axis, scales=exact, start=before, **common)
    except ValueError as e:
        raise EncodeError(f"{job.name} {list(job.shape)}: {e}") from e
    return tensors | _stored(job, fitted.codebooks, fitted.codes), fitted.dead, zero_row


def _rotated(statistics: Statistics, rotation: int) -> Statistics:
    def turn(matrix: Tensor) -> Tensor:  # R H R^T, first its columns, then its rows
        return rotate(rotate(matrix, rotation).mT, rotation).mT

    cross = None if statistics.cross is None else turn(statistics.cross)
    return Statistics(turn(statistics.hessian), statistics.inputs, cross)


# The share of asymmetric calibration. With d the dense model's inputs and x those that the converted layers before it give,
# W' = W (sum d x^T) (sum x x^T)^-1 is the nearest to W d that a layer can give from x (Li et al. 2025, arXiv:2504.02692). The
# whole of it follows chance: MiniLM at 2 bits has a mean cosine of .791 without, .820 with half, .797 with all of it.
ASYMMETRIC, DAMP = 0.5, 0.01


def _asymmetric(matrix: Tensor, statistics: Statistics) -> Tensor:
    """Return weights [outputs, inputs] moved towards what gives the dense model's output from drifted inputs."""
    hessian, cross = statistics.hessian, statistics.cross
    assert cross is not None
    damped = hessian.clone()
    damped.diagonal().add_(max(DAMP * float(hessian.diagonal().mean()), 1e-30))
    right = (cross - hessian).mT @ matrix.double().mT
    factor, fails = torch.linalg.cholesky_ex(damped)
    move = (
        torch.linalg.solve(damped, right) if int(fails) else torch.cholesky_solve(right, factor)
    ).mT  # W (C - H) H^-1
    return matrix + (ASYMMETRIC * move).to(matrix.dtype)


def row_scales(shape: tuple[int, ...], dense: Tensor) -> Tensor:
    """Return the root mean square of each output row, in a shape that broadcasts over the tensor."""
    axes = [i for i, size in enumerate(shape) if size == 1 and dense.shape[i] != 1]
    return (
        torch.linalg.vector_norm(dense, dim=axes, keepdim=True) / math.sqrt(dense.numel() / math.prod(shape))
        if axes
        else dense.abs()
    )


def _random(job: Job, tensor: Tensor, std: float | None) -> tuple[dict[str, Tensor], int, int | None]:
    from rpq_convert.fit import FITTERS

    spec, view = job.spec, job.weight_view
    if std is None:
        std = float(tensor.std(correction=0)) if not tensor.is_meta else default_std(job)
    fitted = FITTERS["random"](
        torch.empty(view.matrix_shape(job.shape, spec.axis), device="meta"), dim=spec.dim, books=spec.books,
        stages=spec.stages, seed=job.seed, codebook_dtype=torch.float32,
    )  # fmt: skip
    codebooks = fitted.codebooks
    tensors: dict[str, Tensor] = {}
    if spec.scales is not None:
        tensors["scales"] = torch.full(view.scale_shape(job.shape), std, dtype=DTYPES[spec.scales])
    else:
        codebooks = codebooks * std
    codebooks = codebooks.to(CODEBOOK_DTYPES[spec.codebook_dtype])
    return tensors | _stored(job, codebooks, fitted.codes), fitted.dead, job.padding_idx


def _stored(job: Job, codebooks: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Bring fitted tensors [stages, …] into the stored layout."""
    if job.spec.layout == "rows":
        codes = codes.transpose(1, 2)
    if job.spec.stages == 1:
        codebooks, codes = codebooks[0], codes[0]
    return {"codebooks": codebooks.contiguous(), "codes": codes.contiguous()}


def _unstored(job: Job, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return stored codebooks and codes as fits have them; undoes `_stored`."""
    codebooks, codes = tensors["codebooks"], tensors["codes"]
    if job.spec.stages == 1:
        codebooks, codes = codebooks[None], codes[None]
    return codebooks, (codes.transpose(1, 2) if job.spec.layout == "rows" else codes).contiguous()
