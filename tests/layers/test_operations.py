"""Unusual inputs: a converted layer gives what its dense layer gives, or raises where that raises."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import rpq_convert as rpq

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
OF_VECTORS = {
    "sparse": X.to_sparse(), "csr": X.relu().to_sparse_csr(), "whole": X.long(), "bool": X > 0, "double": X.double(), "half": X.half(),
    "bfloat16": X.bfloat16(), "complex": X + 1j, "strided": torch.stack([X, X], 2)[:, :, 0], "negative": (X - 1j * X).conj().imag,
    "expanded": X[:1].expand(4, -1), "one": X[0], "none": X[:0], "number": X[0, 0], "long": X.repeat(1, 2), "nan": X / 0 * 0,
    "far": X * 1e30, "near": X * 1e-40, "meta": X.to("meta"),
}  # fmt: skip
OF_ENTRIES = {
    "floats": torch.tensor([1.5, 2.0]), "bytes": torch.tensor([1, 2]).byte(), "short": torch.tensor([1, 2]).short(),
    "bool": torch.tensor([True, False]), "complex": torch.tensor([1 + 0j]), "int": torch.tensor([[1, 2]]).int(), "none": torch.tensor([]),
    "no rows": torch.tensor([], dtype=torch.long), "negative": torch.tensor([[-1]]), "beyond": torch.tensor([[50]]),
    "number": torch.tensor(3), "float": torch.tensor(3.0),
}  # fmt: skip


def given(layer, x):
    """Return what a layer gives, as tensors that compare; None where it raises."""
    with contextlib.suppress(RuntimeError, ValueError, IndexError):
        return layer(x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build, inputs", [
    (lambda: nn.Linear(32, 24), OF_VECTORS),
    (lambda: nn.Linear(32, 24).double(), OF_VECTORS),
    (lambda: nn.Embedding(50, 16), OF_ENTRIES),
    (lambda: nn.Embedding(50, 16, padding_idx=1), OF_ENTRIES),
    (lambda: nn.Embedding(50, 16, sparse=True), OF_ENTRIES),
    (lambda: nn.EmbeddingBag(50, 16), OF_ENTRIES),
])  # fmt: skip
def test_unusual_inputs_give_what_the_dense_layer_gives(build, inputs, cast, grad):
    torch.manual_seed(0)
    layer = build()
    rpq.convert(layer, bits=8, grow=True)
    dense = rpq.restore(copy.deepcopy(layer))
    for name, x in inputs.items():
        with torch.autocast("cpu", cast, enabled=cast is not None), torch.set_grad_enabled(grad):
            found, wanted = given(layer, x), given(dense, x)
        assert (found is None) == (wanted is None), name
        if wanted is not None:
            assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
        if wanted is not None and not wanted.is_meta:
            far = float(wanted.nan_to_num(0, 0, 0).abs().max()) if wanted.numel() else 0.0
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=far * (2e-2 if cast else 1e-5), equal_nan=True, msg=name
            )
