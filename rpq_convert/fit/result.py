"""What a fitter returns, and the check of its layout."""

from __future__ import annotations

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
