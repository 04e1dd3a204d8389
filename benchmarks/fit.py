"""Compare k-means with faiss, one codebook per block, in one run and on one thread, and time the other fitters.

    python benchmarks/fit.py [rows] [columns]

CPU seconds of this process, so that a busy machine disturbs less; only the ratios within one run mean something.
"""

import sys
import time

import faiss
import torch

from rpq_convert.fit import FITTERS, Fitted


def decode(fitted: Fitted, columns: int) -> torch.Tensor:
    books, blocks = fitted.codebooks.shape[1], fitted.codes.shape[1]
    total = torch.zeros(())
    for codebooks, codes in zip(fitted.codebooks, fitted.codes):
        total = total + torch.cat([codebooks[b * books // blocks][codes[b].long()] for b in range(blocks)], 1)
    return total[:, :columns]


def timed(call):
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def peer(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    quantizer = faiss.ProductQuantizer(matrix.shape[1], matrix.shape[1] // dim, 8)
    quantizer.cp.min_points_per_centroid = 1  # else a warning per codebook
    quantizer.train(matrix.numpy())
    return torch.from_numpy(quantizer.decode(quantizer.compute_codes(matrix.numpy())))


def main() -> None:
    rows, columns = int((sys.argv[1:2] or [4096])[0]), int((sys.argv[2:3] or [256])[0])
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))  # [rows, columns]

    print(f"One codebook per block, N(0, 1) matrix {rows} x {columns}, codes included:\n")
    print("| dim | faiss s | ours s | faiss / ours | faiss MSE | ours MSE | ours / faiss |")
    print("|---|---|---|---|---|---|---|")
    for dim in (4, 8, 16, 64):
        books = columns // dim
        FITTERS["kmeans"](matrix[:512, :dim], dim=dim, books=1, stages=1, seed=0)  # compile
        ours, our_time = timed(
            lambda dim=dim, books=books: FITTERS["kmeans"](matrix, dim=dim, books=books, stages=1, seed=0)
        )
        theirs, their_time = timed(lambda dim=dim: peer(matrix, dim))
        mine, other = float(((matrix - decode(ours, columns)) ** 2).mean()), float(((matrix - theirs) ** 2).mean())
        ratio = f"{their_time / our_time:.1f} | {other:.5f} | {mine:.5f} | {mine / other:.4f}"
        print(f"| {dim} | {their_time:.2f} | {our_time:.2f} | {ratio} |")

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
