"""The CPU backend: numba kernels and the choice between them."""
