"""Pictures of plain modules: the size that a module takes is found without computing anything."""

import pytest
import torch
from torch import nn
from vit_pytorch import ViT

import rpq_convert as rpq
from rpq_convert.inputs.pictures import picture_shape
from rpq_convert.inputs.synthetic import own_kind, probe_inputs
from rpq_convert.running.meta import build_empty

SIZE = {"num_classes": 10, "dim": 32, "depth": 1, "heads": 2, "mlp_dim": 32}


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.MaxPool2d(2), nn.Conv2d(4, 8, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 10)
    )


def pooled():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, y):
        return self.conv(x) + y


FOUND = {
    "fixed": (lenet, (1, 32, 32)), "any size": (pooled, (3, 224, 224)), "flat": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 9)), (1, 28, 28)),
    "patches": (lambda: ViT(image_size=28, patch_size=7, channels=1, **SIZE), (1, 28, 28)),
    "more patches": (lambda: ViT(image_size=224, patch_size=16, **SIZE), (3, 224, 224)),
    "vectors": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), None),
    "vectors after an activation": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(64, 8)), None), "steps": (lambda: nn.LSTM(64, 64), None),
    "ids": (lambda: nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), None), "signals": (lambda: nn.Conv1d(3, 8, 3), None), "two": (Two, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_the_size_is_found_by_trying(name):
    make, shape = FOUND[name]
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert picture_shape(model) == picture_shape(build_empty(make)) == shape
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_synthetic_pictures_of_plain_modules():
    model = pooled().eval()
    (first, *_) = rpq.own_inputs(model, samples=8)
    assert first.shape[1:] == (3, 224, 224) and model(first).shape[1] == 3
    assert own_kind(model, search=True) == "noise pictures of 3 x 224 x 224"
    assert own_kind(model) == "" and probe_inputs(model, torch.Generator()) == []  # nothing is tried unasked
