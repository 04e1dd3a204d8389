"""Fitters: a matrix -> codebooks and codes. Pure functions of their arguments and of a seed; one line per entry.

Every fitter has the signature
`fit(matrix, *, dim, books, stages, seed, codebook_dtype=torch.float32, importance=None) -> Fitted`:
matrix [n, L] of any float dtype, codebooks [stages, books, 256, dim], codes uint8 [stages, blocks, n]; ValueError where no fit
is possible. `fit_ecvq` takes a rate besides, and `fit_gptq` the Hessian of calibration inputs besides.
"""

from collections.abc import Callable

from rpq_convert.fit.additive import fit_additive
from rpq_convert.fit.ecvq import fit_ecvq, fit_ecvq_to_inputs
from rpq_convert.fit.gptq import fit_gptq
from rpq_convert.fit.kmeans import fit_kmeans
from rpq_convert.fit.random import fit_random
from rpq_convert.fit.result import Fitted, count_dead

__all__ = [
    "FITTERS",
    "Fitted",
    "count_dead",
    "fit_additive",
    "fit_ecvq",
    "fit_ecvq_to_inputs",
    "fit_gptq",
    "fit_kmeans",
    "fit_random",
]

FITTERS: dict[str, Callable[..., Fitted]] = {
    "random": fit_random,
    "kmeans": fit_kmeans,
    "additive": fit_additive,
    "ecvq": fit_ecvq,
}
