"""torch's TransformerEncoder with a padding mask: nested tensors where it is dense, padded ones where it is converted in part."""

import pytest
import torch
from torch import nn

import rpq_convert as rpq


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3)

    def forward(self, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=pad)


X, PAD = (
    torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)),
    torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
)
PARTS = {
    "all": {},
    "first layer dense": {"exclude": ["encoder.layers.0*"]},
    "last layer alone": {"include": ["encoder.layers.2*"]},
    "one weight": {"include": ["encoder.layers.1.linear1.weight"]},
    "calibrated": {"calibration": [(X, PAD)]},
    "calibrated, first layer dense": {"calibration": [(X, PAD)], "exclude": ["encoder.layers.0*"]},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
@torch.no_grad()
def test_padded_inputs_work_whatever_part_is_converted(options, tmp_path):
    model = Encoder().eval()
    expected = model(X, PAD)
    rpq.convert(model, bits=8, grow=True, **options)
    out = model(X, PAD)
    real = ~PAD
    assert (out - expected)[real].norm() < 0.02 * expected[real].norm()
    rpq.save(model, tmp_path / "out")
    loaded = rpq.load(tmp_path / "out", factory=Encoder)
    assert torch.equal(loaded(X, PAD), out)
    rpq.restore(model)
    assert model.encoder.use_nested_tensor and not [k for k in model.encoder.__dict__ if "rpq" in k]
    assert not model(X, PAD)[PAD].any()  # nested again: torch fills in zeros


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_failure_leaves_nested_tensors_on(calibrated):
    def progress(*_):
        raise KeyboardInterrupt

    model = Encoder().eval()
    with pytest.raises(KeyboardInterrupt):
        rpq.convert(model, bits=8, grow=True, progress=progress, calibration=[(X, PAD)] if calibrated else None)
    assert model.encoder.use_nested_tensor
