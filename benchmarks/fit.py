"""Compare k-means with faiss, torch and scikit-learn, one codebook per block, in one run, and time the other fitters.

    python benchmarks/fit.py [rows] [columns]

CPU seconds of one thread, so that a busy machine disturbs less; only the ratios within one run mean something.
"""

import statistics
import subprocess
import sys
import time

import faiss
import torch
from threadpoolctl import threadpool_limits

from rpq_convert.fit import FITTERS, Fitted
from rpq_convert.fit.kmeans import ITERATIONS


def decode(fitted: Fitted, columns: int) -> torch.Tensor:
    books, blocks = fitted.codebooks.shape[1], fitted.codes.shape[1]
    total = torch.zeros(())
    for codebooks, codes in zip(fitted.codebooks, fitted.codes):
        total = total + torch.cat([codebooks[b * books // blocks][codes[b].long()] for b in range(blocks)], 1)
    return total[:, :columns]


def timed(call):
    """Return the result and the CPU seconds; the median of five runs where one takes less than a second."""
    runs = []
    while not runs or (len(runs) < 5 and runs[0] < 1):
        start = time.thread_time()
        result = call()
        runs.append(time.thread_time() - start)
    return result, statistics.median(runs)


def peer(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    quantizer = faiss.ProductQuantizer(matrix.shape[1], matrix.shape[1] // dim, 8)
    quantizer.cp.min_points_per_centroid = 1  # else a warning per codebook
    quantizer.train(matrix.numpy())
    return torch.from_numpy(quantizer.decode(quantizer.compute_codes(matrix.numpy())))


def with_torch(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Fit all blocks at once by batched products, as a straightforward torch program does."""
    points = matrix.view(len(matrix), -1, dim).transpose(0, 1).contiguous()  # [blocks, n, dim]
    codebooks = points[:, torch.randperm(points.shape[1])[:256]].clone()
    for last in [False] * ITERATIONS + [True]:
        codes = (codebooks.square().sum(2)[:, None] - 2 * points @ codebooks.mT).argmin(2)  # [blocks, n]
        if not last:
            index = codes[..., None].expand_as(points)
            sums = torch.zeros_like(codebooks).scatter_add_(1, index, points)
            counts = torch.zeros(codebooks.shape[:2]).scatter_add_(
                1, codes, torch.ones_like(codes, dtype=torch.float32)
            )
            codebooks = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], codebooks)
    return codebooks.gather(1, codes[..., None].expand_as(points)).transpose(0, 1).reshape(matrix.shape)


def with_sklearn(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    from sklearn.cluster import KMeans

    parts = []
    for block in matrix.split(dim, 1):
        fitted = KMeans(256, init="random", n_init=1, max_iter=ITERATIONS, tol=0, random_state=0).fit(block.numpy())
        parts.append(torch.from_numpy(fitted.cluster_centers_)[torch.from_numpy(fitted.labels_).long()])
    return torch.cat(parts, 1)


def gemm_limit(weights: int) -> float:
    """Return the seconds in which this thread makes the products of all distances at the rate of its dense products."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    rate = max(2 * 1024**3 / timed(lambda: a @ b)[1] for _ in range(9))
    return (ITERATIONS + 1) * 256 * 2 * weights / rate


def extra_memory(rows: int, columns: int, dim: int) -> str:
    """Return how far a fit's peak is above the memory before it and its result, measured in a process of its own."""
    code = f"""
import resource, torch
from rpq_convert.fit import fit_kmeans
torch.set_num_threads(1)
matrix = torch.randn({rows}, {columns})
fit_kmeans(matrix[:, :{2 * dim}], dim={dim}, books=2, stages=1, seed=0)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
read = lambda name: int([x for x in open("/proc/self/status") if x.startswith(name)][0].split()[1]) / 1024
before = read("VmRSS")
fitted = fit_kmeans(matrix, dim={dim}, books={columns // dim}, stages=1, seed=0)
result = (fitted.codes.nbytes + fitted.codebooks.nbytes) / 2**20
print(f"{{max(0.0, read('VmHWM') - before - result):.1f}}")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return out.stdout.strip() or "not measured"


def peers_table(rows: int, columns: int) -> list[list[str]]:
    """Return the rows of the comparison: one per dim; slow peers see a part of the matrix, and the time is scaled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))  # [rows, columns]
    found, fit = [], FITTERS["kmeans"]
    with threadpool_limits(1):
        for dim in (4, 8, 16, 64):
            books = columns // dim
            fit(matrix[:512, :dim], dim=dim, books=1, stages=1, seed=0)  # compile
            ours, seconds = timed(lambda dim=dim, books=books: fit(matrix, dim=dim, books=books, stages=1, seed=0))
            mine = float(((matrix - decode(ours, columns)) ** 2).mean())
            limit = gemm_limit(matrix.numel())
            cells = [str(dim), f"{seconds:.2f} s", f"{seconds / limit:.2f}"]
            for call, share in ((peer, 1), (with_torch, 8), (with_sklearn, 16)):
                part = matrix[:, : max(dim, columns // share)].contiguous()
                theirs, time_part = timed(lambda call=call, part=part, dim=dim: call(part, dim))
                other = float(((part - theirs) ** 2).mean())
                scaled = time_part * columns / part.shape[1]
                cells += [f"{scaled:.1f} s", f"1/{scaled / seconds:.1f}", f"{mine / other:.4f}"]
            found.append([*cells, extra_memory(rows, columns, dim) + " MiB"])
    torch.set_num_threads(threads)
    return found


HEAD = ["dim", "ours", "ours / GEMM-rate limit", "faiss", "ours / faiss", "error / faiss's", "torch, batched", "ours / torch",
        "error / torch's", "scikit-learn", "ours / scikit-learn", "error / scikit-learn's", "memory over the result"]  # fmt: skip


def main() -> None:
    rows, columns = int((sys.argv[1:2] or [4096])[0]), int((sys.argv[2:3] or [256])[0])
    print(f"One codebook per block, N(0, 1) matrix {rows} x {columns}, codes included:\n")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for row in peers_table(rows, columns):
        print("| " + " | ".join(row) + " |")
    torch.set_num_threads(1)
    print("\nOne shared codebook, N(0, 1) matrix 576 x 1536:\n")
    print("| fitter | dim | stages | bits | seconds | relative MSE |")
    print("|---|---|---|---|---|---|")
    matrix = torch.randn(576, 1536, generator=torch.Generator().manual_seed(1))
    power = float((matrix**2).mean())
    for name, dim, stages in [("kmeans", d, 1) for d in (1, 2, 4, 8)] + [("additive", 8, 2), ("additive", 8, 3)]:
        fit = FITTERS[name]
        fit(matrix[:40], dim=dim, books=1, stages=stages, seed=0)  # compile
        fitted, seconds = timed(
            lambda fit=fit, dim=dim, stages=stages: fit(matrix, dim=dim, books=1, stages=stages, seed=0)
        )
        mse = float(((matrix - decode(fitted, 1536)) ** 2).mean()) / power
        print(f"| {name} | {dim} | {stages} | {8 * stages / dim:g} | {seconds:.2f} | {mse:.5f} |")


if __name__ == "__main__":
    main()
