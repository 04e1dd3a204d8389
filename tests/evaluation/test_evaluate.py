"""Evaluation against figures computed by hand, and the command on real folders."""

import copy
import json
import math

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

import rpq_convert as rpq
from rpq_convert.errors import EvaluateError
from rpq_convert.evaluation.layers import layer_errors


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    base = tf.LlamaForCausalLM(config).eval()
    model = copy.deepcopy(base)
    rpq.convert(model, bits=2, grow=True)
    return base, model


def test_language_model(pair):
    base, model = pair
    ids = torch.randint(0, 256, (100,))
    found = rpq.evaluate(base, model, ids, window=32, batch=2)
    assert found.samples == 3 * 31
    with torch.no_grad():
        p, q = (m(ids[:96].view(3, 32)).logits[:, :-1].log_softmax(-1).flatten(0, 1) for m in (base, model))
    wanted = ids[:96].view(3, 32)[:, 1:].flatten()
    assert found.metrics["perplexity"] == pytest.approx(math.exp(F.nll_loss(q, wanted)), rel=1e-4)
    assert found.metrics["base_perplexity"] == pytest.approx(math.exp(F.nll_loss(p, wanted)), rel=1e-4)
    assert found.metrics["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.metrics["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert found.metrics["kl"] > 0 and found.metrics["top1_agreement"] < 1
    same = rpq.evaluate(base, base, ids, window=32)
    assert same.metrics["kl"] == 0 and same.metrics["ratio"] == same.metrics["top1_agreement"] == 1
    assert "top1_agreement" in str(found) and json.loads(found.to_json())["samples"] == 93


def test_any_module_and_its_layers():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)).eval()
    model = copy.deepcopy(base)
    rpq.convert(model, bits=4)
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    done = []
    found = rpq.evaluate(base, model, data, progress=done.append)
    with torch.no_grad():
        a, b = (torch.cat([m(x) for x in data]) for m in (base, model))
    assert found.metrics["cosine"] == pytest.approx(float(F.cosine_similarity(a, b).mean()), rel=1e-5)
    assert found.metrics["relative_error"] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-4)
    assert found.samples == 12 and done == [1, 2, 3]
    errors = layer_errors(base, model, data)
    with torch.no_grad():  # the head alone, on the base's features
        features = torch.cat([base[:3](x) for x in data])
        wanted, head = base[3](features), model[3](features)
    assert errors["3.weight"] == pytest.approx(float((head - wanted).square().sum() / wanted.square().sum()), rel=1e-4)
    assert set(errors) == {"0.weight", "3.weight"} and not base[0]._forward_hooks


def test_what_cannot_be_compared(pair):
    base, model = pair
    with pytest.raises(EvaluateError, match="nothing to predict"):
        rpq.evaluate(base, model, torch.tensor([3]))
    with pytest.raises(EvaluateError, match="no data"):
        rpq.evaluate(base, model, [])
    with pytest.raises(EvaluateError, match="no RPQ layer"):
        layer_errors(base, base, [])
    with pytest.raises(EvaluateError, match=r"\[2, 3\], the model's \[2, 4\]"):
        rpq.evaluate(nn.Linear(5, 3), nn.Linear(5, 4), [torch.randn(2, 5)])


def test_padding_does_not_count():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    base = tf.BertModel(config).eval()
    model = copy.deepcopy(base)
    rpq.convert(model, bits=4, grow=True)
    ids = torch.randint(90, (2, 8))
    short = {"input_ids": ids[:1, :5], "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    long = {"input_ids": ids[1:], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 5:] = 0
    both = {"input_ids": ids, "attention_mask": mask}
    apart, together = (rpq.evaluate(base, model, data) for data in ([short, long], [both]))
    assert apart.samples == together.samples == 13
    for name, value in apart.metrics.items():
        assert together.metrics[name] == pytest.approx(value, rel=1e-3), name
    apart, together = (layer_errors(base, model, data) for data in ([short, long], [both]))
    path = "encoder.layer.1.output.dense.weight"
    assert together[path] == pytest.approx(apart[path], rel=1e-3)
