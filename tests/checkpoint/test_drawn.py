"""A model of which only config.json is there: random codes need no weights, and everything else is drawn."""

import json

import pytest
import torch
import transformers as tf

import rpq_convert as rpq
from rpq_convert.checkpoint.drawn import Drawn
from rpq_convert.checkpoint.opening import open_checkpoint
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.sources import is_drawn

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "ffn_dim": 128,
    "word_embed_proj_dim": 64, "max_position_embeddings": 32, "init_std": 0.03, "dtype": "float16",
}  # fmt: skip
HOW = {"bits": 4, "fit": "random", "grow": True, "progress": False}


def config_of(kind, folder, **fields):
    folder.mkdir()
    config = kind(**fields)
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = config_of(
        tf.OPTConfig, tmp_path_factory.mktemp("drawn") / "opt", architectures=["OPTForCausalLM"], **SIZES
    )
    (folder / "vocab.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def report(alone):
    return rpq.convert_checkpoint(alone, alone.parent / "out", seed=3, **HOW)


def test_result_is_whole_and_says_that_it_is_random(alone, report):
    out = alone.parent / "out"
    assert any("all weights are random" in w and "seed 3" in w for w in report.warnings)
    assert any("all weights are random" in w for w in json.loads((out / "rpq_plan.json").read_text())["warnings"])
    rpq.verify(out)
    assert (out / "vocab.json").is_file()
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_spread_is_that_of_the_config_and_the_rest_that_of_the_class(alone, report):
    model = rpq.load(alone.parent / "out")
    decoder = model.model.decoder
    assert decoder.layers[0].fc1.weight.float().std().item() == pytest.approx(SIZES["init_std"], rel=0.1)
    assert decoder.embed_tokens.weight.float().std().item() == pytest.approx(SIZES["init_std"], rel=0.1)
    assert torch.equal(decoder.layers[1].final_layer_norm.weight, torch.ones(64, dtype=torch.float16))
    assert not decoder.layers[1].fc1.bias.any()


def test_codes_are_those_that_weights_would_get(alone, report, tmp_path):
    torch.manual_seed(0)
    tf.OPTForCausalLM(tf.OPTConfig(**SIZES)).half().save_pretrained(tmp_path / "dense")
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", seed=3, **HOW)
    ours, theirs = (rpq.load(f).state_dict() for f in (alone.parent / "out", tmp_path / "out"))
    codes = [name for name in ours if name.endswith("codes")]
    assert codes and all(torch.equal(ours[name], theirs[name]) for name in codes)


def test_same_seed_same_bytes_whatever_the_executor(alone, report, tmp_path):
    rpq.convert_checkpoint(alone, tmp_path / "again", seed=3, executor="threads", workers=2, **HOW)
    rpq.convert_checkpoint(alone, tmp_path / "other", seed=4, **HOW)
    first, again, other = (
        (f / "model.safetensors").read_bytes() for f in (alone.parent / "out", tmp_path / "again", tmp_path / "other")
    )
    assert first == again != other


def test_a_killed_run_goes_on(alone, report, tmp_path):
    def stop(job, encoded):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rpq.convert_checkpoint(alone, tmp_path / "out", seed=3, **{**HOW, "progress": stop})
    done = []
    rpq.convert_checkpoint(
        alone, tmp_path / "out", seed=3, **{**HOW, "progress": lambda job, encoded: done.append(encoded is None)}
    )
    assert done[0] and not done[-1]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (alone.parent / "out/model.safetensors").read_bytes()


def test_what_is_drawn_has_numbers_of_its_own(alone):
    """Two norms are alike, since their class says so; two tables that stay dense are not, nor are those of two seeds."""
    source = open_checkpoint(alone, draw=0).source
    assert isinstance(source, Drawn)
    first, second = (source[f"model.decoder.layers.{i}.fc1.weight"] for i in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first, source["model.decoder.layers.0.fc1.weight"])
    other = open_checkpoint(alone, draw=1).source
    assert not torch.equal(first, other["model.decoder.layers.0.fc1.weight"])


SMALL = {
    "ViTModel": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16},
    "SwinModel": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4},
    "MixtralForCausalLM": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 64, "num_local_experts": 2,
    },
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_other_kinds(name, tmp_path):
    """A raw class token, buffers that a class computes, fused experts, an encoder with a decoder."""
    folder = config_of(getattr(tf, name).config_class, tmp_path / "src", architectures=[name], **SMALL[name])
    rpq.convert_checkpoint(folder, tmp_path / "out", **HOW)
    assert all(torch.isfinite(p).all() for p in rpq.load(tmp_path / "out").parameters())


def test_fits_need_weights(alone, tmp_path):
    with pytest.raises(rpq.SourceError, match="has no weights"):
        rpq.convert_checkpoint(alone, tmp_path / "out", bits=4)
    assert not (tmp_path / "out.partial").exists()


def test_weights_that_are_there_are_read(alone, tmp_path):
    options = SourceOptions()
    assert is_drawn(alone, options, "random") and not is_drawn(alone, options, None)
    assert is_drawn("facebook/opt-66b", options, "random") and not is_drawn("facebook/opt-66b", options, "kmeans")
    assert not is_drawn(alone, SourceOptions(factory="some:thing"), "random")
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        folder = config_of(tf.OPTConfig, tmp_path / name, **SIZES)
        (folder / name).write_bytes(b"damaged")
        assert not is_drawn(folder, options, "random")
        with pytest.raises(rpq.SourceError):
            rpq.convert_checkpoint(folder, tmp_path / "out", **HOW)


def test_a_plan_needs_no_weights_and_makes_the_same(alone, report, tmp_path):
    plan = rpq.plan(alone, seed=3, bits=4, fit="random", grow=True)
    assert any("all weights are random" in w for w in plan.warnings)
    assert plan.file_bytes == (alone.parent / "out/model.safetensors").stat().st_size
    rpq.convert_checkpoint(alone, tmp_path / "planned", plan=plan, progress=False)
    a, b = ((f / "model.safetensors").read_bytes() for f in (alone.parent / "out", tmp_path / "planned"))
    assert a == b
