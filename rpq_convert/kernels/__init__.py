"""What computes on codes: files with one face, and the choice between them.

A face is a module with `linear`, `linear_gradients`, `decode`, `decode_rows` and `decode_gradients`: `plain` is ordinary torch
operations, right on every device and the reference of all; `cpu` is compiled by numba, `gpu` by Triton. `operators` has the
same face for compilers: operations that they take as they are, and that call one of the others when they run.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

SERVED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that compiled kernels compute


@functools.cache
def face(device: str) -> ModuleType:
    """Return the fastest face for tensors on this type of device; what compiles it is imported on first use."""
    if device == "cpu":
        try:
            from rpq_convert.kernels.cpu import backend as cpu
        except ImportError:  # no numba for this machine
            pass
        else:
            return cpu
    if device == "cuda" and _has_triton():
        from rpq_convert.kernels.gpu import backend as gpu

        return gpu
    from rpq_convert.kernels import reference

    return reference


def _has_triton() -> bool:
    """Whether Triton is installed and serves every CUDA device there is."""
    if importlib.util.find_spec("triton") is None:
        return False
    devices = range(torch.cuda.device_count()) if torch.version.hip is None else ()
    return all(torch.cuda.get_device_capability(i) >= (8, 0) for i in devices)
