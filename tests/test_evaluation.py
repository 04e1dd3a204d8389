"""Evaluation against figures computed by hand, and the command on real folders."""

import copy
import json
import math

import pytest
import torch
import transformers as tf
from rpq_convert.cli import group
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.evaluation import EvaluateError, layer_errors


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


@pytest.mark.parametrize("kind", ["language model", "outputs"])
def test_command(kind, pair, tmp_path):
    if kind == "language model":
        pair[0].save_pretrained(tmp_path / "base")
    else:
        config = tf.BertConfig(
            vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
        tf.BertModel(config).save_pretrained(tmp_path / "base")
    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i + 2 for i in range(200)}}
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
        tmp_path / "base"
    )
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(7 * i + j) % 200}" for j in range(20)) for i in range(12)))
    rpq.convert_checkpoint(tmp_path / "base", tmp_path / "out", bits=4, grow=True)
    arguments = ["eval", str(tmp_path / "base"), str(tmp_path / "out"), "--text", str(text), "--window", "64"]
    done = CliRunner().invoke(group, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["kind"] == kind and facts["samples"] > 10
    assert 0 < facts["metrics"]["top1_agreement" if kind == "language model" else "cosine"] <= 1
    assert CliRunner().invoke(group, ["eval", str(tmp_path / "base"), "no", "--text", str(text)]).exit_code == 4
