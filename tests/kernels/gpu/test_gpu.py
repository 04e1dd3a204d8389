"""The GPU's kernels without a GPU: right in Triton's interpreter, and accepted by the compiler of real targets.

The interpreter must be asked for before Triton is imported, so the cases (gpu_cases.py) run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
from paths import SUPPORT
from processor import NO_CUDA

from rpq_convert import kernels
from rpq_convert.core.layout import Layout
from rpq_convert.kernels import reference

triton = pytest.importorskip("triton")


def run_cases(**environment):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "gpu_cases.py", "-p", "no:randomly"], cwd=SUPPORT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA)
def test_on_a_device():
    run_cases(TRITON_INTERPRET="0")


def test_the_backend_is_chosen_by_device_and_triton_is_imported_on_use():
    from rpq_convert.kernels.gpu import backend

    assert kernels.backend_for("cuda") is backend and kernels.backend_for("meta") is reference
    code = "import sys, rpq_convert, rpq_convert.nn; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def compile_for(capability):
    """Return what stands in for a launch: it compiles the kernel as this launch would have it, for a device that is not here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.uint8: "*u8",
        torch.int64: "*i64",
    }
    seen = {}

    def launch(kernel, programs, on, *arguments, **constants):
        options = {k: constants.pop(k) for k in ("debug", "sanitize_overflow") if k in constants}
        signature, fixed, attributes = {}, dict(constants), {}
        for place, (parameter, value) in enumerate(zip(kernel.params, arguments)):
            name, special = parameter.name, not parameter.do_not_specialize
            if value is None or (isinstance(value, int) and value == 1 and special):
                fixed[name] = value
                continue
            signature[name] = (
                kinds[value.dtype] if isinstance(value, torch.Tensor) else "i32" if value < 1 << 31 else "i64"
            )
            if special and (value.data_ptr() if isinstance(value, torch.Tensor) else value) % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        signature = {p.name: signature.get(p.name, "constexpr") for p in kernel.params}
        source = ASTSource(kernel, signature, fixed, attributes)
        found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert found.metadata.shared <= 99 << 10, kernel  # what every device since Ampere has
        seen.setdefault(kernel.fn.__name__, []).append(found.asm["ptx"])

    return launch, seen


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_all_kernels_compile_for_real_devices(capability, monkeypatch):
    from rpq_convert.kernels.gpu import backend, products, tiles

    launch, seen = compile_for(capability)
    for module in (tiles, products):
        monkeypatch.setattr(module, "launch", launch)
    for axis, dim, books, stages, dtype, kind, scaled in (
        ("in", 8, 32, 1, torch.float16, torch.float16, False),
        ("out", 5, 3, 2, torch.bfloat16, torch.float16, True),
        ("in", 64, 1, 1, torch.float32, torch.float32, True),
    ):
        layout = Layout(axis, 2048, 256, dim, books, stages)
        codes, tables = (
            torch.zeros(stages, layout.blocks, 2048, dtype=torch.uint8),
            torch.zeros(stages, books, 256, dim).to(kind),
        )
        scales = torch.ones(layout.outputs).to(kind) if scaled else None
        bias = torch.zeros(layout.outputs) if scaled else None
        for tokens in (1, 3, 64) if capability == 80 or dim == 8 else (1, 3):
            x, gradient = (
                torch.zeros(tokens, layout.inputs, dtype=dtype),
                torch.zeros(tokens, layout.outputs, dtype=dtype),
            )
            backend.linear(x, codes, tables, scales, bias, layout)
            backend.linear_gradients(gradient, x, codes, tables, scales, layout, (True, tokens == 3, scaled))
        weight = backend.decode(codes, tables, scales, layout, dtype)
        backend.decode_gradients(weight, codes, tables, scales, None, layout, (True, scaled))
        if axis == "in":
            index = torch.zeros(7, dtype=torch.long)
            rows = tiles.decode(codes, tables, scales, index, layout, dtype)
            backend.decode_gradients(rows, codes, tables, scales, index, layout, (True, scaled))
    assert set(seen) == {n for m in (tiles, products) for n in vars(m) if n.endswith("_kernel")}
    assert any("mma" in text for text in seen["dot_kernel"])  # tensor cores
    assert "assertfail" in "".join(seen["decode_kernel"])  # rows outside an embedding are noticed
    assert "ld.global.v4" in seen["decode_kernel"][0]  # codewords come as vectors
