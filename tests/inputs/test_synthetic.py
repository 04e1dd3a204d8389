"""Synthetic inputs: one maker for calibration and for sensitivities."""

import pytest
import torch
import transformers as tf
from torch import nn

import rpq_convert as rpq
from rpq_convert.inputs.synthetic import probe_inputs


def generator():
    return torch.Generator().manual_seed(0)


def neighbours(pictures):
    """Return the correlation of pixels side by side: 0 for white noise, near 1 for smooth pictures."""
    a, b = pictures[..., :-1], pictures[..., 1:]
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


class Pictures(nn.Module):
    """As timm's models are: a module of one tensor that knows the shape of its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 24, 24)}
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).relu().mean((2, 3)))


def vit():
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    return tf.ViTModel(config).eval()


def bert():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return tf.BertModel(config).eval()


def test_sensitivities_see_the_smooth_pictures_of_calibration():
    found = probe_inputs(vit(), generator())
    assert [tuple(item["pixel_values"].shape) for item in found] == [(1, 3, 16, 16)] * 8
    pictures = torch.cat([item["pixel_values"] for item in found])
    assert torch.equal(pictures, rpq.own_inputs(vit(), samples=8, seed=0)[0]["pixel_values"])
    assert neighbours(pictures) > 0.5 > abs(neighbours(torch.randn(8, 3, 16, 16, generator=generator())))


def test_a_model_of_one_tensor_gets_them_too_and_its_budget_is_measured():
    assert [tuple(x.shape) for x in probe_inputs(Pictures(), generator())] == [(1, 3, 24, 24)] * 8
    found = rpq.sensitivities(Pictures(), grow=True)
    assert set(found) == {"stem.weight", "head.weight"} and min(found.values()) > 0


def test_sensitivities_see_the_random_tokens_of_calibration():
    found, wanted = probe_inputs(bert(), generator()), rpq.own_inputs(bert(), samples=8, window=128, seed=0)
    assert len(found) == len(wanted) > 4
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pictures_have_the_dtype_that_a_model_computes_in(dtype):
    model = vit().to(dtype)
    assert {item["pixel_values"].dtype for item in rpq.own_inputs(model, samples=2)} == {dtype}
    rpq.convert(model, bits=4, grow=True, fit="random")
    assert {item["pixel_values"].dtype for item in rpq.own_inputs(model, samples=2)} == {dtype}
    model(**rpq.own_inputs(model, samples=2)[0])


def test_nothing_is_made_for_a_model_whose_inputs_are_not_known():
    assert probe_inputs(nn.Linear(4, 4), generator()) == []
    with pytest.raises(rpq.CalibrationError, match="synthetic inputs of Linear cannot be made"):
        rpq.own_inputs(nn.Linear(4, 4))
