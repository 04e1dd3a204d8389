"""The fitter that reads no weights: random codes, normal codebooks.

It serves layers that are trained from scratch. Decoded entries have unit variance, whatever the number of stages, so
the caller can rescale them to the variance that the dense layer's own init would have given.
"""

from __future__ import annotations

import numpy as np
import torch

from rpq_convert.core.elementary import normal
from rpq_convert.core.reproducible import is_reproducible
from rpq_convert.fit.result import Fitted, check_layout, count_dead


def fit_random(
    matrix: torch.Tensor,
    *,
    dim: int,
    books: int,
    stages: int,
    seed: int,
    codebook_dtype: torch.dtype = torch.float32,
    importance: torch.Tensor | None = None,
) -> Fitted:
    """Draw uniform codes and codebooks N(0, 1 / stages) from the seed; only the matrix's shape is read.

    >>> fitted = fit_random(torch.empty(8, 12, device="meta"), dim=4, books=3, stages=1, seed=0)
    >>> fitted.codebooks.shape, fitted.codes.shape
    (torch.Size([1, 3, 256, 4]), torch.Size([1, 3, 8]))
    """
    blocks = check_layout(matrix, dim=dim, books=books, stages=stages)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (stages, blocks, matrix.shape[0]), generator=generator, dtype=torch.uint8)
    size = (stages, books, 256, dim)
    if is_reproducible():  # torch's normal numbers depend on the processor, its whole ones do not
        codebooks = torch.from_numpy(normal(np.random.default_rng(seed), size)).float() / stages**0.5
    else:
        codebooks = torch.randn(size, generator=generator, dtype=torch.float32) / stages**0.5
    return Fitted(codebooks.to(codebook_dtype), codes, count_dead(codes, books))
