"""A config of a few bytes cannot take hours or gigabytes: counts are bounded, and an empty model is built within limits."""

import json

import pytest
import torch
import transformers as tf

import rpq_convert as rpq
from rpq_convert.errors import SourceError
from rpq_convert.hf import loading
from rpq_convert.planning.bounds import LEAST, MOST_PARTS, MOST_TENSORS, check_config, tensors_allowed
from rpq_convert.running import meta
from rpq_convert.running.meta import parameters_on_meta


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**8}, {"n_layer": 1e300}, {"depths": [2, 10**8]}, {"text_config": {"num_layers": 10**8}},
        {"num_labels": 10**8}, {"num_local_experts": 10**8}, {"encoder_layers": 10**8}, {"backbone_config": [{"num_stages": 10**9}]},
        {"num_attention_heads": 10**8},
    ],
    ids=str,
)  # fmt: skip
def test_counts_of_parts_are_bounded(config):
    with pytest.raises(SourceError, match=r"there: .* no model has more than 200,000"):
        check_config(config, "there")


def test_sizes_and_what_models_have_are_not():
    check_config({"vocab_size": 10**9, "hidden_size": 10**7, "max_position_embeddings": 10**7, "max_length": 1e20}, "")
    check_config(
        {"vocab_size_per_layer_input": 262_144, "layer_rope_theta": [5e5], "expert_dim": 10**6, "codebook_size": 2**20},
        "",
    )
    check_config(
        {"num_labels": MOST_PARTS, "layer_norm_eps": 1e-5, "layers": None, "seed": 2**63, "experts": "many"}, ""
    )


def test_as_many_tensors_as_weights_have_and_some_more():
    assert tensors_allowed(None) == MOST_TENSORS
    assert tensors_allowed(10) == LEAST and tensors_allowed(10**5) == 8 * 10**5
    assert tensors_allowed(10, 3) == 3


def test_a_config_with_more_layers_than_its_weights(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}
    tf.BertModel(tf.BertConfig(**small, num_hidden_layers=1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 199_999}))
    with pytest.raises(SourceError, match=r"more than 30 tensors, which its weights do not have.*max_tensors"):
        rpq.plan(tmp_path, bits=4, max_tensors=30)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="more than 30 tensors"):
        rpq.convert_checkpoint(tmp_path, tmp_path.with_suffix(".out"), bits=4, fit="random", max_tensors=30)


def test_tables_that_a_model_computes_are_bounded(monkeypatch):
    """A mask of all positions by all positions is refused before it is made; one of usual size is made."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 32}
    loading.build_empty(tf.GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    masks = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    with pytest.raises(SourceError, match=r"computes a table of \[100000, 100000\]"):
        loading.build_empty(tf.GPTNeoConfig(max_position_embeddings=100_000, architectures=["GPTNeoModel"], **masks))
    assert loading.build_empty(tf.GPT2Config(**sizes)) is not None
    monkeypatch.setattr(meta, "TABLES", 1000)
    with pytest.raises(SourceError, match="computes a table"), parameters_on_meta(bounded=True):
        for _ in range(9):
            torch.ones(100)
    with parameters_on_meta():  # as around the code of a factory, which may make parameters of any size
        torch.ones(1000)
    torch.ones(1000)  # outside of it nothing is counted
