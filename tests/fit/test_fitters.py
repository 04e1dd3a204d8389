"""What a fitter promises: exact where it can be, near the optimum where not, kind to extremes, the same bits always."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from often import often

from rpq_convert.fit import FITTERS, Fitted
from rpq_convert.planning.rules import FITS

BY_LAYOUT = [name for name in FITTERS if name != "ecvq"]  # that has one layout, and a file of its own
kmeans, additive, random = FITTERS["kmeans"], FITTERS["additive"], FITTERS["random"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode(fitted: Fitted, columns: int) -> torch.Tensor:
    stages, books = fitted.codebooks.shape[:2]
    blocks = fitted.codes.shape[1]
    total = torch.zeros(())
    for stage in range(stages):
        parts = [
            fitted.codebooks[stage, b * books // blocks].float()[fitted.codes[stage, b].long()] for b in range(blocks)
        ]
        total = total + torch.cat(parts, dim=1)  # [n, blocks * dim]
    return total[:, :columns]


def error(fitted: Fitted, matrix: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    square = (matrix.double() - decode(fitted, matrix.shape[1]).double()) ** 2
    return float((square if importance is None else square * importance).sum())


def relative(fitted: Fitted, matrix: torch.Tensor) -> float:
    return error(fitted, matrix) / float((matrix.double() ** 2).sum())


def assert_nearest(fitted: Fitted, matrix: torch.Tensor, dim: int, importance: torch.Tensor | None = None) -> None:
    """Every code's error is the least over the 256 codewords, on the valid coordinates, up to fp32 rounding."""
    books, blocks = fitted.codebooks.shape[1], fitted.codes.shape[1]
    weight = torch.ones_like(matrix) if importance is None else importance.expand(matrix.shape)
    for b in range(blocks):
        x = matrix[:, b * dim : (b + 1) * dim].double()
        w = weight[:, b * dim : (b + 1) * dim].double()
        c = fitted.codebooks[0, b * books // blocks].double()[:, : x.shape[1]]
        distance = ((x[:, None] - c[None]) ** 2 * w[:, None]).sum(2)  # [n, 256]
        chosen = distance.gather(1, fitted.codes[0, b].long()[:, None])[:, 0]
        assert (chosen <= distance.min(1).values * (1 + 1e-5) + 1e-12).all()


def test_plans_know_every_fitter():
    assert set(FITS) == set(FITTERS)


@pytest.mark.parametrize("name", BY_LAYOUT)
@pytest.mark.parametrize(("dim", "books"), [(3, 1), (3, 2), (3, 4), (1, 1), (20, 1)])
def test_shapes_and_types(name, dim, books):
    matrix = normal(40, 10)
    blocks = -(-10 // dim)
    if books > blocks:
        pytest.skip("layout impossible")
    fitted = FITTERS[name](matrix, dim=dim, books=books, stages=1, seed=0, codebook_dtype=torch.float16)
    assert fitted.codebooks.shape == (1, books, 256, dim) and fitted.codebooks.dtype == torch.float16
    assert fitted.codes.shape == (1, blocks, 40) and fitted.codes.dtype == torch.uint8
    used = {(b * books // blocks, int(c)) for b in range(blocks) for c in fitted.codes[0, b]}
    assert fitted.dead == 256 * books - len(used)


def test_random_reads_the_shape_alone_and_has_unit_variance():
    for stages in (1, 3):
        fitted = random(torch.empty(512, 96, device="meta"), dim=4, books=3, stages=stages, seed=1)
        assert abs(float(decode(fitted, 96).std()) - 1) < 0.05
    again = random(torch.empty(512, 96, device="meta"), dim=4, books=3, stages=3, seed=1)
    other = random(torch.empty(512, 96, device="meta"), dim=4, books=3, stages=3, seed=2)
    assert torch.equal(fitted.codes, again.codes) and torch.equal(fitted.codebooks, again.codebooks)
    assert not torch.equal(fitted.codes, other.codes)


@settings(max_examples=25, deadline=None)
@given(
    dim=st.sampled_from([1, 2, 3, 5, 17]),
    rows=st.integers(1, 60),
    columns=st.integers(1, 40),
    different=st.integers(1, 200),
    scale=st.sampled_from([1.0, 1e-12, 1e12]),
    offset=st.sampled_from([0.0, 1000.0]),
)
def test_few_distinct_sub_vectors_are_exact(dim, rows, columns, different, scale, offset):
    words = (normal(different, dim) + offset) * scale
    pick = torch.randint(different, (rows, -(-columns // dim)), generator=torch.Generator().manual_seed(3))
    matrix = words[pick].reshape(rows, -1)[:, :columns]
    blocks = -(-columns // dim)
    if different + rows > 256 and columns % dim:
        columns -= columns % dim
        matrix = matrix[:, :columns]
        blocks = columns // dim
    if not blocks:
        return
    for name, stages in (("kmeans", 1), ("additive", 2)):
        for books in {1, blocks}:
            fitted = FITTERS[name](matrix, dim=dim, books=books, stages=stages, seed=0)
            assert torch.equal(decode(fitted, columns), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "books"), [(1, 1), (2, 1), (4, 4), (5, 1), (8, 2), (24, 1)])
def test_codes_are_nearest_to_the_rounded_codebooks(dtype, dim, books):
    matrix = normal(700, 45) * 0.02 + 0.3
    assert_nearest(kmeans(matrix, dim=dim, books=books, stages=1, seed=0, codebook_dtype=dtype), matrix, dim)


def test_large_offset_does_not_spoil_the_fit():
    for dim in (1, 2, 4, 8):
        plain = kmeans(normal(1024, 64), dim=dim, books=1, stages=1, seed=0)
        moved = normal(1024, 64) + 100
        fitted = kmeans(moved, dim=dim, books=1, stages=1, seed=0)
        assert error(fitted, moved) < 1.02 * error(plain, normal(1024, 64))


@pytest.mark.parametrize(("name", "stages"), [("kmeans", 1), ("additive", 2)])
def test_bits_depend_on_nothing_but_the_seed(name, stages):
    matrix = normal(600, 50)
    threads = torch.get_num_threads()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    def once(out: list, seed: int = 7) -> None:
        fitted = FITTERS[name](matrix, dim=4, books=1, stages=stages, seed=seed)
        out.append((fitted.codebooks, fitted.codes))

    results: list = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            once(results)
    finally:
        torch.set_num_threads(threads)
    workers = [threading.Thread(target=once, args=(results,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for codebooks, codes in results[1:]:
        assert torch.equal(codebooks, results[0][0]) and torch.equal(codes, results[0][1])
    # The layout in memory is no part of the value.
    strided = FITTERS[name](matrix.t().contiguous().t(), dim=4, books=1, stages=stages, seed=7)
    assert torch.equal(strided.codes, results[0][1])
    once(results, seed=8)
    assert not torch.equal(results[-1][1], results[0][1])
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize(("dim", "bound"), [(1, 0.02), (2, 0.1)])
@pytest.mark.parametrize("shape", [(512, 512), (2048, 600)])  # fitted on all points, and on a sample
def test_extremes_survive_a_shared_codebook(dim, bound, shape):
    matrix = normal(*shape)
    spots = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(5))[:12]
    matrix.view(-1)[spots] = 50.0 * torch.tensor([1, -1] * 6) + normal(12)
    plain = relative(kmeans(normal(*shape), dim=dim, books=1, stages=1, seed=0), normal(*shape))
    fitted = kmeans(matrix, dim=dim, books=1, stages=1, seed=0)
    decoded = decode(fitted, shape[1])
    assert ((decoded - matrix).view(-1)[spots].abs() / matrix.view(-1)[spots].abs()).max() < bound
    assert error(fitted, matrix) < 1.2 * plain * float((normal(*shape) ** 2).sum())
    assert float((decoded - matrix).abs().max()) < 5


def test_heavy_tails_are_not_clipped():
    t = torch.distributions.StudentT(3.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        matrix = t.sample((1024, 512))
    for dim, bound in ((1, 0.0004), (2, 0.02)):
        fitted = kmeans(matrix, dim=dim, books=1, stages=1, seed=0)
        assert relative(fitted, matrix) < bound
        assert (decode(fitted, 512) - matrix).abs().max() < 0.15 * matrix.abs().max()


def test_one_dimension_is_near_the_optimum():
    # Panter and Dite: a Gaussian's best 256 levels leave sqrt(3) pi / 2 / 256^2 = 4.15e-5, less at the ends.
    matrix = normal(1024, 256)
    assert relative(kmeans(matrix, dim=1, books=1, stages=1, seed=0), matrix) < 4.15e-5
    # and no Lloyd step from here may gain anything worth having
    fitted = kmeans(matrix, dim=1, books=1, stages=1, seed=0)
    codes = fitted.codes[0].reshape(-1).long()
    values = matrix.t().reshape(-1).double()
    means = torch.zeros(256).double().index_add_(0, codes, values) / torch.bincount(codes, minlength=256)
    assert float((means - fitted.codebooks[0, 0, :, 0]).abs().max()) < 2e-3


@pytest.mark.parametrize("dim", [4, 8])
def test_not_worse_than_faiss(dim):
    faiss = pytest.importorskip("faiss")
    matrix = normal(2048, 64)
    peer = faiss.ProductQuantizer(64, 64 // dim, 8)
    peer.train(matrix.numpy())
    decoded = torch.from_numpy(peer.decode(peer.compute_codes(matrix.numpy())))
    ours = error(kmeans(matrix, dim=dim, books=64 // dim, stages=1, seed=0), matrix)
    assert ours <= 1.001 * float(((matrix - decoded).double() ** 2).sum())


def test_clusters_are_found_and_no_codeword_is_lost():
    centres = normal(250, 4) * 10
    pick = torch.randint(250, (400, 100), generator=torch.Generator().manual_seed(0))
    matrix = (centres[pick] + 0.01 * normal(400, 100, 4, seed=1)).reshape(400, 400)
    fitted = kmeans(matrix, dim=4, books=1, stages=1, seed=0)
    assert fitted.dead == 0
    assert error(fitted, matrix) / matrix.numel() < 1.5e-4  # 1e-4 is the noise; one missed centre costs 100 times that


def test_importance_per_row_shifts_the_error():
    matrix = normal(1000, 64)
    weight = torch.ones(1000, 1)
    weight[::10] = 100
    plain = kmeans(matrix, dim=4, books=1, stages=1, seed=0)
    fitted = kmeans(matrix, dim=4, books=1, stages=1, seed=0, importance=weight)
    assert error(fitted, matrix, weight) < 0.95 * error(plain, matrix, weight)
    assert_nearest(fitted, matrix, 4)


@pytest.mark.parametrize("dim", [1, 2])
def test_importance_by_size_is_that_of_the_sub_vectors_and_spares_the_large(dim):
    matrix = normal(300, 60 * dim)
    matrix[:3] *= 4
    sizes = matrix.view(300, 60, dim).square().mean(2) / matrix.square().mean()
    fitted = kmeans(matrix, dim=dim, books=1, stages=1, seed=0, importance="size")
    given = kmeans(matrix, dim=dim, books=1, stages=1, seed=0, importance=(1 + sizes).repeat_interleave(dim, 1))
    assert error(fitted, matrix) == pytest.approx(error(given, matrix), rel=0.02)
    plain, large = kmeans(matrix, dim=dim, books=1, stages=1, seed=0), torch.zeros(300, 1)
    large[:3] = 1
    assert error(fitted, matrix, large) < 0.8 * error(plain, matrix, large)


@pytest.mark.parametrize(("name", "stages"), [("kmeans", 1), pytest.param("additive", 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", often([2, 4, 20], {4}))
def test_importance_inside_a_sub_vector(name, stages, dim):
    matrix = normal(900, 60)
    weight = torch.rand(1, 60, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3
    plain = FITTERS[name](matrix, dim=dim, books=1, stages=stages, seed=0)
    fitted = FITTERS[name](matrix, dim=dim, books=1, stages=stages, seed=0, importance=weight)
    assert error(fitted, matrix, weight) < 0.9 * error(plain, matrix, weight)
    if stages == 1:
        assert_nearest(fitted, matrix, dim, weight)
    full = FITTERS[name](matrix, dim=dim, books=1, stages=stages, seed=0, importance=weight.expand(900, 60).clone())
    assert torch.equal(full.codes, fitted.codes)


def test_importance_one_number_per_sub_vector_equals_the_general_path():
    matrix = normal(500, 32)
    weight = torch.rand(500, 8, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, 1)
    nudged = weight.clone()
    nudged[0, 0] *= 1 + 1e-6  # enough to leave the fast path
    a = kmeans(matrix, dim=4, books=1, stages=1, seed=0, importance=weight)
    b = kmeans(matrix, dim=4, books=1, stages=1, seed=0, importance=nudged)
    assert abs(error(a, matrix, weight) / error(b, matrix, weight) - 1) < 0.02
    zero = kmeans(matrix, dim=4, books=1, stages=1, seed=0, importance=torch.zeros(1, 1))
    assert torch.isfinite(zero.codebooks).all()


@pytest.mark.parametrize(("name", "stages"), [("kmeans", 1), ("additive", 2)])
@pytest.mark.parametrize("books", [1, 2, 5])
def test_tail_block(name, stages, books):
    matrix = normal(800, 34)  # dim 8: 4 whole blocks and 2 coordinates
    fitted = FITTERS[name](matrix, dim=8, books=books, stages=stages, seed=0)
    if stages == 1:
        assert_nearest(fitted, matrix, 8)
    if books == 5:
        assert (fitted.codebooks[:, 4, :, 2:] == 0).all()
    tail = (matrix - decode(fitted, 34))[:, 32:]
    assert float((tail**2).mean()) < 0.1
    if books == 1:  # whole blocks are hardly worse than without the tail
        alone = FITTERS[name](matrix[:, :32], dim=8, books=1, stages=stages, seed=0)
        whole = Fitted(fitted.codebooks, fitted.codes[:, :4], 0)
        assert error(whole, matrix[:, :32]) < 1.06 * error(alone, matrix[:, :32])


def test_tail_extremes_survive():
    matrix = normal(800, 33)
    matrix[3, 32] = 60
    decoded = decode(kmeans(matrix, dim=2, books=1, stages=1, seed=0), 33)
    assert abs(float(decoded[3, 32]) - 60) < 6


def test_additive_beats_greedy_residual():
    matrix = normal(1024, 256)
    rest, greedy = matrix, torch.zeros_like(matrix)
    for _ in range(2):
        greedy = greedy + decode(kmeans(rest, dim=8, books=1, stages=1, seed=0), 256)
        rest = matrix - greedy
    two = relative(additive(matrix, dim=8, books=1, stages=2, seed=0), matrix)
    assert two < 0.92 * float((rest**2).sum() / (matrix**2).sum()) and two < 0.098
    three = relative(additive(matrix[:512], dim=8, books=1, stages=3, seed=0), matrix[:512])
    assert three < 0.033
    one = additive(matrix, dim=8, books=1, stages=1, seed=0)
    assert torch.equal(one.codes, kmeans(matrix, dim=8, books=1, stages=1, seed=0).codes)


def test_bad_input_is_refused():
    good = normal(10, 10)
    for bad in (float("nan"), float("inf"), float("-inf")):
        matrix = good.clone()
        matrix[4, 4] = bad
        for name in ("kmeans", "additive"):
            with pytest.raises(ValueError, match="NaN or infinite"):
                FITTERS[name](matrix, dim=2, books=1, stages=1, seed=0)
    for shape in ((0, 4), (4, 0)):
        for fitter in (FITTERS[name] for name in BY_LAYOUT):
            with pytest.raises(ValueError, match=r"n >= 1"):
                fitter(torch.empty(shape), dim=2, books=1, stages=1, seed=0)
    with pytest.raises(ValueError, match="additive"):
        kmeans(good, dim=2, books=1, stages=2, seed=0)
    with pytest.raises(ValueError, match="books"):
        kmeans(good, dim=2, books=6, stages=1, seed=0)
    with pytest.raises(ValueError, match="importance"):
        kmeans(good, dim=2, books=1, stages=1, seed=0, importance=torch.full((10, 1), -1.0))
    with pytest.raises(ValueError, match="float16"):
        kmeans(good * 1e6, dim=2, books=1, stages=1, seed=0, codebook_dtype=torch.float16)


def test_extreme_magnitudes():
    for scale in (1e-30, 1e30):
        fitted = kmeans(normal(400, 64) * scale, dim=2, books=1, stages=1, seed=0)
        assert error(fitted, normal(400, 64) * scale) / scale**2 / 25600 < 0.012


@pytest.mark.slow
def test_memory_never_holds_points_by_codewords():
    # Dim 2: 1,048,576 points, so points x 256 floats would be 1 GiB. A process of its own, since only the peak of all
    # resident memory counts torch's, numpy's and numba's arrays alike.
    code = """
import resource, torch
from rpq_convert.fit import FITTERS
matrix = torch.randn(2048, 1024)
for name, stages in (("kmeans", 1), ("additive", 2)):
    FITTERS[name](matrix[:128], dim=2, books=1, stages=stages, seed=0)  # compile first
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
FITTERS["kmeans"](matrix, dim=2, books=1, stages=1, seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64 * 1024  # KiB


FRESH = """
import hashlib, torch
import rpq_convert as rpq

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(40)))  # a last bit moves a choice in one of them
rpq.convert(model, preset="5bit")
digest = hashlib.sha256()
for tensor in model.state_dict().values():
    digest.update(tensor.numpy().tobytes())
with torch.no_grad():
    for tokens in (1, 8, 40):
        digest.update(model(torch.randn(tokens, 128)).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_compiled_afresh_or_from_the_cache_the_bits_are_the_same(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FRESH]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second and len(first) == 65 and any(tmp_path.rglob("*.nbc"))
