"""What computes on codes: backends, which are modules with the same functions, and the choice between them.

A backend has `linear`, `linear_gradients`, `decode`, `decode_rows` and `decode_gradients`. `reference` is ordinary torch
operations: it serves every device, and the tests hold the others to it. `cpu.backend` is compiled by numba, `gpu.backend` by
Triton. `torch_ops` has the same functions for compilers: operators that torch.compile and torch.export take as they are, and that
call another backend when they run.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType

import torch

SERVED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that compiled kernels compute


@functools.cache
def backend_for(device: str) -> ModuleType:
    """Return the fastest backend for tensors on this type of device ("cpu", "cuda", ...).

    What compiles it is imported on first use. Where numba is broken, one warning says why, and `reference` serves.
    """
    from rpq_convert.kernels import reference

    if device == "cpu":
        if why := numba_fails():
            warnings.warn(
                f"numba cannot be imported ({why}): converted layers expand their weights on the CPU, which is slower. "
                "Install numba anew: pip install --force-reinstall numba",
                RuntimeWarning,
                stacklevel=2,
            )
            return reference
        from rpq_convert.kernels.cpu import backend as cpu

        return cpu
    if device == "cuda" and _has_triton():
        from rpq_convert.kernels.gpu import backend as gpu

        return gpu
    return reference


@functools.cache
def numba_fails() -> str:
    """Return why numba, on which rpq-convert depends, cannot be imported; nothing where it can."""
    try:
        import numba  # noqa: F401
    except Exception as error:  # a numpy that does not fit raises ImportError, a damaged library OSError or worse
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def described() -> str:
    """Return one line about the CPU's kernels for `rpq env`: what compiles them, what the processor has, where they are kept."""
    if why := numba_fails():
        return f"torch alone, as numba cannot be imported: {why}"
    from rpq_convert.kernels.jit import cache, vectors

    return f"numba, for {vectors.flags() or 'no vector unit'}; kept in {cache.folder() or 'no folder'}"


def _has_triton() -> bool:
    """Whether Triton is installed and serves every CUDA device there is."""
    if importlib.util.find_spec("triton") is None:
        return False
    devices = range(torch.cuda.device_count()) if torch.version.hip is None else ()
    return all(torch.cuda.get_device_capability(i) >= (8, 0) for i in devices)
