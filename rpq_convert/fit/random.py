"""What a fitter returns, and the fitter that looks at nothing: random codes, normal codebooks.

It serves layers that are trained from scratch. Decoded entries have unit variance, whatever the number of stages, so
the caller can rescale them to the variance that the dense layer's own init would have given.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fitted:
    """Hold the outcome of a fit."""

    codebooks: torch.Tensor  # [stages, books, 256, dim], in the dtype asked for
    codes: torch.Tensor  # [stages, blocks, n] uint8
    dead: int  # codewords that no code uses


def check_layout(matrix: torch.Tensor, *, dim: int, books: int, stages: int) -> int:
    """Return the number of blocks of a row, or raise ValueError where the layout is impossible."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"a fit needs a matrix [n, L] with n >= 1 and L >= 1, got shape {tuple(matrix.shape)}")
    if dim < 1 or stages < 1:
        raise ValueError(f"dim and stages must be at least 1, got dim={dim}, stages={stages}")
    blocks = -(-matrix.shape[1] // dim)
    if not 1 <= books <= blocks:
        raise ValueError(f"books must be between 1 and the {blocks} blocks of a row, got {books}")
    return blocks


def count_dead(codes: torch.Tensor, books: int) -> int:
    """Count the codewords that no code of `codes` [stages, blocks, n] uses."""
    stages, blocks, _ = codes.shape
    dead = 0
    for stage in range(stages):
        for book in range(books):
            low, high = -(-book * blocks // books), -(-(book + 1) * blocks // books)
            dead += int((torch.bincount(codes[stage, low:high].reshape(-1), minlength=256) == 0).sum())
    return dead


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
    codebooks = torch.randn((stages, books, 256, dim), generator=generator) / stages**0.5
    return Fitted(codebooks.to(codebook_dtype), codes, count_dead(codes, books))
