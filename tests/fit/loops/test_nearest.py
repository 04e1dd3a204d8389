"""The search for the nearest codeword: right to the last bits where codes are kept, near enough where k-means iterates."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processor import NO_AMX

from rpq_convert.fit import fit_kmeans
from rpq_convert.fit import problem as fitting
from rpq_convert.fit.loops import nearest as search
from rpq_convert.fit.loops.nearest import nearest

FORMS = [
    "vectors",
    pytest.param("tiles", marks=pytest.mark.skipif(bool(NO_AMX), reason=NO_AMX)),
]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "vectors":
        monkeypatch.setattr(search, "amx_allowed", lambda: False)
    return request.param


def problem(r: int, total: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = (rng.standard_normal((r, total)) * rng.lognormal(0, 1, total)).astype(np.float32)
    return points, rng.standard_normal((256, r)).astype(np.float32), rng.random((r, total), np.float32)


@settings(max_examples=40, deadline=None)
@given(r=st.integers(1, 70), total=st.integers(0, 200), seed=st.integers(0, 99), weighted=st.booleans())
def test_the_nearest_is_found(r, total, seed, weighted):
    points, codebook, weights = problem(r, total, seed)
    codes = nearest(points, weights if weighted else None, codebook)
    square = (points.T[:, None].astype(np.float64) - codebook[None]) ** 2  # [N, 256, r]
    distance = (square * (weights.T[:, None] if weighted else 1)).sum(2)
    assert codes.dtype == np.uint8 and codes.shape == (total,)
    assert (distance[np.arange(total), codes] <= distance.min(1) * (1 + 1e-5)).all()


def test_of_equal_codewords_the_first_wins():
    points, codebook, weights = problem(5, 100, 0)
    codebook[128:] = codebook[:128]
    assert nearest(points, None, codebook).max() < 128 and nearest(points, weights, codebook).max() < 128


@pytest.mark.parametrize("r", [1, 2, 3, 4, 8, 9, 11, 16, 17, 24, 33, 64, 100])
@pytest.mark.parametrize("total", [1, 31, 32, 33, 500])
def test_quick_scores_are_near_the_best(form, r, total):
    points, codebook, _ = problem(r, total, r)
    codes = nearest(points, None, codebook, quick=True)
    scores = 0.5 * (codebook.astype(np.float64) ** 2).sum(1) - points.T.astype(np.float64) @ codebook.T
    lost = scores[np.arange(total), codes] - scores.min(1)
    length = np.linalg.norm(points, axis=0) + np.linalg.norm(codebook, axis=1).max()
    assert (lost <= 2**-15 * length**2).all()


@pytest.mark.parametrize("dim", [4, 16])
def test_points_too_near_each_other_for_quick_scores(form, monkeypatch, dim):
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(8, dim, generator=generator)
    matrix = centres[torch.randint(8, (4000,), generator=generator)] + 0.003 * torch.randn(
        4000, dim, generator=generator
    )

    def error() -> float:
        fitted = fit_kmeans(matrix, dim=dim, books=1, seed=0)
        return float((matrix - fitted.codebooks[0, 0][fitted.codes[0, 0].long()]).double().square().sum())

    found = error()
    monkeypatch.setattr(fitting, "nearest", lambda *args, quick=False: nearest(*args))
    assert found < 1.01 * error()


@pytest.mark.skipif(bool(NO_AMX), reason=NO_AMX)
def test_a_fit_with_tiles_is_as_good_and_other_kernels_keep_theirs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrix, a = torch.randn(2048, 64, generator=generator), torch.randn(256, 256, generator=generator).bfloat16()
    product = a @ a  # by torch's own kernel, in tile registers
    errors = []
    for _ in range(2):
        fitted = fit_kmeans(matrix, dim=8, books=8, seed=0)
        assert torch.equal(a @ a, product)
        near = torch.cat([fitted.codebooks[0, b][fitted.codes[0, b].long()] for b in range(8)], 1)
        errors.append(float((matrix - near).double().square().sum()))
        monkeypatch.setattr(search, "amx_allowed", lambda: False)
    assert abs(errors[0] / errors[1] - 1) < 0.004
