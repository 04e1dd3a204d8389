"""What this machine lacks, in the words of pytest's summary; empty where it lacks nothing."""

import torch

from rpq_convert.kernels.jit import amx, vectors

_FLAGS = f"on this processor (flags: {vectors.flags() or 'none that kernels use'})"
NO_AMX = "" if amx.amx_allowed() else f"no AMX {_FLAGS}" if not vectors.HAS_AMX else "this system does not allow AMX"
NO_VBMI = "" if vectors.HAS_VNNI else f"no AVX-512 VBMI and VNNI {_FLAGS}"
NO_CUDA = "" if torch.cuda.is_available() else f"no CUDA device (torch {torch.__version__})"
