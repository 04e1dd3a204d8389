"""Machines without AVX-512, or without numba: the answers are the same."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import sys
import torch
from torch import nn
import rpq_convert as rpq
from rpq_convert import kernels
{before}
torch.manual_seed(0)
model = nn.ModuleDict(dict(
    wide=nn.Linear(96, 160), narrow=nn.Linear(96, 160), words=nn.Embedding(300, 96), spots=nn.Conv2d(96, 64, 3)
))
rpq.convert(model["wide"], dim=8, axis="in", fit="random", grow=True)
rpq.convert(model["narrow"], dim=2, axis="out", fit="random", grow=True)
rpq.convert(model["words"], dim=4, fit="random", grow=True)
rpq.convert(model["spots"], dim=8, fit="random", grow=True)
for tokens in (1, 2, 8, 40):
    x = torch.randn(tokens, 96, requires_grad=True)
    for name in ("wide", "narrow"):
        layer = model[name]
        dense = layer.weight_rpq().detach()
        found = layer(x)
        torch.testing.assert_close(found, x @ dense.T + layer.bias, rtol=1e-4, atol=1e-4)
        gradient, = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(gradient, dense.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x.bfloat16().float()), x.bfloat16().float() @ dense.T + layer.bias,
                                       rtol=1e-4, atol=1e-4)
    index = torch.randint(300, (tokens,))
    assert torch.equal(model["words"](index), model["words"].weight_rpq().detach()[index])
with torch.no_grad():
    image = torch.randn(1, 96, 5, 5)
    wanted = torch.nn.functional.conv2d(image, model["spots"].weight_rpq(), model["spots"].bias)
    torch.testing.assert_close(model["spots"](image), wanted, rtol=1e-4, atol=1e-4)
{check}
print("the same")
"""


def run(before: str, check: str, **environment: str) -> None:
    code = CODE.format(before=before, check=check)
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert out.stdout.strip() == "the same", out.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a processor of another kind")
def test_a_processor_without_avx_computes_the_same(tmp_path):
    run(
        "from rpq_convert.kernels.jit import vectors\nassert not vectors.HAS_VBMI and not vectors.HAS_FLOAT16",
        "assert kernels.backend_for('cpu').__name__.endswith('cpu.backend')",
        NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="+sse2", NUMBA_CACHE_DIR=str(tmp_path),
    )  # fmt: skip


def test_without_numba_torch_alone_computes_the_same_and_one_warning_says_why():
    run(
        "rpq.convert\nsys.modules['numba'] = None\nimport warnings\ncaught = warnings.catch_warnings(record=True)\nseen = caught.__enter__()\n"
        "kernels.backend_for.cache_clear()\nkernels.numba_fails.cache_clear()",
        "assert kernels.backend_for('cpu').__name__.endswith('reference')\n"
        "said = [str(w.message) for w in seen if 'numba' in str(w.message)]\n"
        "assert len(said) == 1 and 'import of numba halted' in said[0] and 'pip install' in said[0], said\n"
        "assert 'import of numba halted' in kernels.described()",
    )  # fmt: skip


@pytest.mark.slow
def test_an_error_of_our_own_kernels_is_not_taken_for_a_missing_numba():
    code = (
        "import sys, pytest\nfrom rpq_convert import kernels\nsys.modules['rpq_convert.kernels.cpu.backend'] = None\n"
        "with pytest.raises(ImportError):\n    kernels.backend_for('cpu')\nprint('the same')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "the same", out.stderr[-2000:]
