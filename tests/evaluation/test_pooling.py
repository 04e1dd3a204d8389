"""How token vectors become one: by what the folder says, written out by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rpq_convert.errors import EvaluateError
from rpq_convert.evaluation.pooling import Pooled

HIDDEN = torch.arange(24.0).view(2, 4, 3).sin()
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])  # padding on the right and on the left


class Encoder(nn.Module):
    def forward(self, **inputs):
        return type("Output", (), {"last_hidden_state": HIDDEN})


def folder_of(place, facts, *more):
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling/config.json").write_text(json.dumps(facts))
    (place / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, *({"path": p} for p in more)]))
    return place


def rows():
    return HIDDEN[0, :3], HIDDEN[1, 1:]


WEIGHTS = torch.tensor([[1.0], [2.0], [3.0]])
MODES = {
    "cls_token": lambda x: x[0], "mean_tokens": lambda x: x.mean(0), "max_tokens": lambda x: x.amax(0),
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / 3**0.5, "lasttoken": lambda x: x[-1],
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, tmp_path):
    folder = folder_of(
        tmp_path, {"word_embedding_dimension": 3, f"pooling_mode_{mode}": True, "pooling_mode_other": False}
    )
    found = Pooled(Encoder(), folder)(attention_mask=MASK)
    assert torch.allclose(found, torch.stack([MODES[mode](x) for x in rows()]), atol=1e-6)


def test_later_tokens_count_more(tmp_path):
    folder = folder_of(tmp_path, {"pooling_mode_weightedmean_tokens": True})
    x = HIDDEN[0, :3]
    assert torch.allclose(Pooled(Encoder(), folder)(attention_mask=MASK)[0], (x * WEIGHTS).sum(0) / 6, atol=1e-6)


def test_the_mean_without_a_folder_several_modes_and_new_files(tmp_path):
    mean = torch.stack([x.mean(0) for x in rows()])
    assert torch.allclose(Pooled(Encoder())(attention_mask=MASK), mean, atol=1e-6)
    folder = folder_of(tmp_path, {"pooling_mode": ["mean", "cls"]})
    assert torch.allclose(Pooled(Encoder(), folder)(attention_mask=MASK)[:, :3], mean, atol=1e-6)


def test_a_dense_module_follows(tmp_path):
    folder = folder_of(tmp_path, {"pooling_mode_mean_tokens": True}, "2_Dense")
    (folder / "2_Dense").mkdir()
    facts = {"in_features": 3, "out_features": 2, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense/config.json").write_text(json.dumps(facts))
    tensors = {"linear.weight": torch.ones(2, 3), "linear.bias": torch.ones(2)}
    save_file(tensors, folder / "2_Dense/model.safetensors")
    mean = torch.stack([x.mean(0) for x in rows()])
    wanted = torch.tanh(mean.sum(1, keepdim=True) + 1).expand(2, 2)
    assert torch.allclose(Pooled(Encoder(), folder)(attention_mask=MASK), wanted, atol=1e-6)


def test_what_is_unknown_is_said(tmp_path):
    folder = folder_of(tmp_path, {"pooling_mode": "magic"})
    with pytest.raises(EvaluateError, match="unknown pooling 'magic'; known are cls"):
        Pooled(Encoder(), folder)
