"""One job, one tensor, one result: the pure step that conversion in memory and as a stream share."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.reproducible import is_reproducible, mean, reproducible, total, total_log
from rpq_convert.core.results import Encoded, Statistics
from rpq_convert.core.rotation import rotate, rotate_weight
from rpq_convert.core.spec import CODEBOOK_DTYPES, DTYPES, dtype_of
from rpq_convert.encoding.init_std import default_std
from rpq_convert.encoding.measure import output_errors, weight_errors
from rpq_convert.encoding.scales import divisors, input_scales, row_scales, stored_scales
from rpq_convert.errors import EncodeError
from rpq_convert.fit.matrix import PART, Matrix
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
    with reproducible(job.reproducible):
        given = tensor if tensor.is_meta else tensor.detach().to("cpu")
        if not tensor.is_meta:
            _check_finite(job, given)
        if job.is_random:
            encoded = _random(job, given, std)
        else:
            if statistics is not None or job.spec.rotation or job.spec.outliers:
                given = given.float()  # else no wide copy of it is made
            dense, seen = given, statistics and _grouped(statistics, job)
            if job.spec.rotation:
                dense = rotate_weight(dense, job.weight_view, job.spec.rotation)
                seen = seen and _rotated(seen, job.spec.rotation)
            encoded = _fit(job, dense, seen, start)
        tensors, dead, zero_row = encoded
        measured: dict[str, Any] = {}
        if not job.is_random:
            rpq = build(job, tensors, zero_row, dtype=torch.float32)
            measured["error"], measured["worst"] = weight_errors(given, rpq)
            if statistics is not None:
                measured["inputs"] = statistics.inputs
                found = output_errors(given, rpq().detach(), rpq, statistics.hessian)
                measured["output_error"], measured["worst_output"] = found
    return Encoded(job.name, tensors, dead=dead, seconds=time.perf_counter() - began, zero_row=zero_row, **measured)


WIDE = 1 << 26  # numbers of a tensor of which a wide copy may be made


def _check_finite(job: Job, given: Tensor) -> None:
    parts = torch.split(given.reshape(-1), PART)
    if bad := sum(int((~torch.isfinite(part)).sum()) for part in parts if not torch.isfinite(part.float().sum())):
        raise EncodeError(f"{job.name} {list(job.shape)} holds {bad} NaN or infinite values; fix or exclude it")


def build(job: Job, tensors: Mapping[str, Tensor], zero_row: int | None, dtype: torch.dtype | None = None) -> RPQWeight:
    """Return the module that holds these tensors."""
    rpq = RPQWeight(
        job.spec, job.weight_view, job.shape, dtype=dtype or dtype_of(job.dtype), device="meta", zero_row=zero_row
    )
    for name, tensor in tensors.items():
        rpq.set_tensor(name, tensor)
    rpq._probe = torch.empty(0, dtype=rpq.dtype, device=tensors["codes"].device)
    return rpq


# Without statistics, large weights count more up to this dim: nearest codewords leave them the largest errors, and language models
# depend on them. At 8 bits SmolLM2's divergence falls from 0.0054 to 0.0037 (MiniLM's mean cosine stays at 0.9998). At dim 2 the
# gain is smaller: SmolLM2's divergence falls from 0.611 to 0.573, and MiniLM's cosine falls from 0.973 to 0.967.
LARGE = 1
# Weights of one output may differ by orders of magnitude: a few large ones meet quiet inputs, small ones loud inputs, and an error
# that is small beside the large ones ruins the output. Where the weights' mean logarithm, relative to their row's scale, is below
# UNEVEN (Gaussian -0.64, Laplace -0.92), errors count relative to the weight they belong to, down to NEAR of the row's scale. The
# first layer of a speaker encoder (benchmarks/speaker.py) has -1.4: with it alone at 8 bits the mean cosine is .995 by size, .9998 so.
UNEVEN, NEAR, NOTHING, LEAST_BITS = -1.2, 0.1, 1e-3, 4


def _importance(job: Job, matrix: Matrix) -> Tensor | str | None:
    """Return how much the errors of weights [n, L] count that are fitted without statistics."""
    spec = job.spec
    if spec.bits >= LEAST_BITS and spec.scales is not None:
        logs, count, outputs = 0.0, 0, 0 if spec.axis == "in" else 1
        for part in matrix.parts(outputs):
            size = _relative(part, outputs)
            counted = size > NOTHING  # what is as good as zero says nothing of the others
            logs += total_log(size.where(counted, 1.0))
            count += int(counted.sum())
        if count and logs / count < UNEVEN:
            near = [1 / (_relative(part, outputs).square_() + NEAR**2) for part in matrix.parts(outputs)]
            return torch.cat(near, outputs)
    return "size" if spec.stages == 1 and spec.dim <= LARGE and spec.rate is None else None


def _relative(part: Tensor, outputs: int) -> Tensor:
    """Return the size of weights relative to the spread of their output, which lies along this axis: 1, or a power of two."""
    spread = mean(part.square(), 1 - outputs, keepdim=True).sqrt_()
    return (part / spread.clamp_min_(torch.finfo(torch.float32).tiny)).abs_()


def _outliers(job: Job, dense: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of the weights that are kept apart, and the weight without them."""
    spec, view = job.spec, job.weight_view
    matrix = view.to_matrix(dense, "in")
    positions = matrix.abs().topk(spec.outliers, 1).indices.sort(1).values
    dtypes = {part: dtype for part, (dtype, _) in spec.tensors(view, job.shape).items()}
    exact = matrix.gather(1, positions)
    values = exact.to(dtypes["outliers"])
    if not torch.isfinite(values).all():
        raise EncodeError(f"{job.name}: an outlier overflows {spec.outlier_dtype}; use outliers=0")
    tiny = exact.abs() < torch.finfo(dtypes["outliers"]).tiny  # what such numbers lose stays with the codes
    left = torch.where(tiny, exact - values.float(), 0.0)
    tensors = {"outliers": values, "positions": positions.to(dtypes["positions"])}
    return tensors, view.from_matrix(matrix.scatter(1, positions, left), job.shape, "in").contiguous()


def _zero_row(job: Job, dense: Tensor) -> int | None:
    """Return the padding row of a table, where it holds zeros."""
    return job.padding_idx if job.padding_idx is not None and not dense[job.padding_idx].any() else None


def _fit(
    job: Job, dense: Tensor, statistics: Statistics | None, start: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], int, int | None]:
    from rpq_convert.fit import FITTERS, Fitted, count_dead, fit_ecvq_to_inputs, fit_gptq  # numba: imported on use

    spec, view = job.spec, job.weight_view
    tensors: dict[str, Tensor] = {}
    zero_row = _zero_row(job, dense)
    if statistics is not None and statistics.cross is not None:
        dense = view.from_matrix(_asymmetric(view.to_matrix(dense, "in"), statistics), job.shape, "in").contiguous()
    if spec.outliers:
        kept, dense = _outliers(job, dense)
        tensors |= kept
    exact, inputs = None, None
    if spec.input_scales is not None:
        given = (
            start["input_scales"]
            if start is not None
            else input_scales(Matrix(view.to_matrix(dense, "in")), statistics)
        )
        tensors["input_scales"] = given.to(DTYPES[spec.input_scales])
        inputs = tensors["input_scales"].float()
    if spec.scales is not None:
        if start is None:
            stored = stored_scales(job, row_scales(view, dense, inputs))
        else:
            stored = view.spread_scales(start["scales"]).to(DTYPES[spec.scales])
        tensors["scales"] = stored.reshape(view.scale_shape(job.shape))
        exact = stored.float()
    along = None if inputs is None else inputs[None] if spec.axis == "in" else inputs[:, None]
    matrix = Matrix(view.to_matrix(dense, spec.axis), None if exact is None else divisors(job, exact), along)
    codebook_dtype = CODEBOOK_DTYPES[spec.codebook_dtype]
    if max(-matrix.extremes[0], matrix.extremes[1]) > torch.finfo(codebook_dtype).max:
        raise EncodeError(f"{job.name}: values overflow {spec.codebook_dtype} codebooks; use codebook_dtype='float32'")
    try:
        size = {"dim": spec.dim, "books": spec.books, "stages": spec.stages}
        common: dict[str, Any] = {**size, "seed": job.seed, "codebook_dtype": codebook_dtype}
        how: dict[str, Any] = {"axis": spec.axis, "scales": exact, "inputs": inputs}
        before = None
        if spec.rate is not None:
            common["rate"] = spec.rate
        if start is not None:
            books, codes = _unstored(job, start)
            before = Fitted(books, codes, count_dead(codes, spec.books))
        if statistics is None:
            fitted = before or FITTERS[job.fit](matrix, importance=_importance(job, matrix), **common)
        elif spec.rate is not None:
            fitted = fit_ecvq_to_inputs(matrix.whole, statistics.hessian, **how, **common)
        else:
            fitted = fit_gptq(matrix.whole, statistics.hessian, start=before, **how, **common)
    except ValueError as e:
        raise EncodeError(f"{job.name} {list(job.shape)}: {e}") from e
    return tensors | _stored(job, fitted.codebooks, fitted.codes), fitted.dead, zero_row


def _grouped(statistics: Statistics, job: Job) -> Statistics:
    """Return the statistics of a convolution's groups as parts that are equal runs of the matrix's rows, or as one whole."""
    view, hessian = job.weight_view, statistics.hessian
    if hessian.ndim == 2 or "expert" in view.axes:
        return statistics
    if view.axes.index("in") < view.axes.index("out"):  # transposed: a group is a run of inputs
        if job.spec.axis == "in" or job.spec.rotation:
            return replace(statistics, hessian=torch.block_diag(*hessian))
    elif job.spec.axis == "out":
        return replace(statistics, hessian=hessian.mean(0))  # a sub-vector runs over outputs of several groups
    return statistics


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


def _random(job: Job, tensor: Tensor, std: float | None) -> tuple[dict[str, Tensor], int, int | None]:
    from rpq_convert.fit import FITTERS

    spec, view = job.spec, job.weight_view
    if std is None:
        std = _spread(tensor) if not tensor.is_meta else default_std(job)
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


def _spread(tensor: Tensor) -> float:
    """Return the standard deviation of all numbers; of large tensors part by part, so that no wide copy of them is made."""
    if tensor.numel() <= WIDE and not is_reproducible():
        return float(tensor.float().std(correction=0))
    parts = torch.split(tensor.reshape(-1), PART)
    middle = sum(float(total(p.double())) for p in parts) / tensor.numel()
    return math.sqrt(sum(float(total(p.double().sub_(middle).square_())) for p in parts) / tensor.numel())


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
