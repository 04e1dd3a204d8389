"""A fit reads its matrix block by block; its bits are those of a wide copy, whatever the size of the blocks."""

import pytest
import torch

from rpq_convert.core.axes import WeightView
from rpq_convert.encoding import encode as encoding
from rpq_convert.encoding import scales as scaling
from rpq_convert.encoding.encode import encode
from rpq_convert.fit import matrix as blocks
from rpq_convert.fit.matrix import Matrix
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.planner import make_plan
from rpq_convert.planning.slots import Slot

VIEWS = [
    ("out in", (150, 200)),
    ("in out", (200, 150)),
    ("out in kh kw", (70, 30, 3, 3)),
    ("expert out in", (3, 80, 100)),
    ("expert in out", (3, 80, 100)),
    ("out expert in", (80, 3, 100)),
]


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few rows."""

    def made(part=1 << 12):
        monkeypatch.setattr(blocks, "PART", part)
        monkeypatch.setattr(encoding, "PART", part)
        monkeypatch.setattr(scaling, "PART", part)

    return made


def weight(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], *[1] * (len(shape) - 1))).to(dtype)


@pytest.mark.parametrize("names, shape", VIEWS, ids=[names for names, _ in VIEWS])
def test_blocks_are_those_of_a_wide_copy(names, shape, small):
    small()
    view, tensor = WeightView(names), weight(shape, torch.float16)
    scales = scaling.row_scales(view, tensor)
    for axis in ("in", "out"):
        job = make_plan([Slot("w", (), "", (), shape, torch.float16, view)], PlanOptions(bits=4, axis=axis)).jobs[0]
        matrix = Matrix(view.to_matrix(tensor, axis), scaling.divisors(job, scales))
        whole = view.to_matrix(tensor.float() / scales, axis)
        assert torch.equal(matrix.whole, whole)
        assert matrix.extremes == (whole.min().item(), whole.max().item())
        assert torch.equal(torch.cat(list(matrix.parts(0))), whole) and torch.equal(
            torch.cat(list(matrix.parts(1)), 1), whole
        )


@pytest.mark.parametrize(
    "options",
    [{"bits": 4}, {"preset": "5bit"}, {"bits": 8}, {"bits": 2, "axis": "out"}, {"bits": 4, "storage": "rans"}],
    ids=str,
)
def test_fits_do_not_depend_on_blocks(options, small):
    slot = Slot("w", (), "Linear", (), (200, 170), torch.bfloat16, WeightView("out in"))
    job = make_plan([slot], PlanOptions(**options)).jobs[0]
    tensor = weight(slot.shape, slot.dtype)
    whole = encode(job, tensor)
    small()
    again, wide = encode(job, tensor), encode(job, tensor.float())
    for part, value in whole.tensors.items():
        assert torch.equal(value, again.tensors[part]) and torch.equal(value, wide.tensors[part])
    assert whole.error == again.error == wide.error


def test_uneven_weights_and_large_random_ones_are_near(small, monkeypatch):
    """Sums over all numbers may differ in their last bits; what follows from them does not."""
    slot = Slot("w", (), "Linear", (), (200, 170), torch.float32, WeightView("out in"))
    tensor = weight(slot.shape, slot.dtype) ** 5
    uneven = make_plan([slot], PlanOptions(bits=8)).jobs[0]
    drawn = make_plan([slot], PlanOptions(bits=4, fit="random")).jobs[0]
    before = encode(uneven, tensor), encode(drawn, tensor)
    small()
    monkeypatch.setattr(encoding, "WIDE", 0)
    after = encode(uneven, tensor), encode(drawn, tensor)
    assert torch.equal(before[0].tensors["codes"], after[0].tensors["codes"])
    assert torch.allclose(before[1].tensors["scales"], after[1].tensors["scales"], rtol=1e-3)


def test_not_a_number_is_found_in_every_block(small):
    small()
    slot = Slot("w", (), "Linear", (), (200, 170), torch.float16, WeightView("out in"))
    tensor = weight(slot.shape, slot.dtype)
    tensor[150, 3], tensor[199, 169] = float("nan"), float("inf")
    with pytest.raises(encoding.EncodeError, match="holds 2 NaN or infinite values"):
        encode(make_plan([slot], PlanOptions(bits=4)).jobs[0], tensor)
