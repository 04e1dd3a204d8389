"""What users of transformers do to a converted model or folder: other heads, dtypes, sizes; a folder that is written again."""

import itertools
import json

import pytest
import torch
import transformers as tf
from architectures import wide
from often import often
from safetensors.torch import load_file

import rpq_convert as rpq
from rpq_convert.errors import SourceError
from rpq_convert.layers.surgery import layers_of

IDS = torch.arange(7, 15)[None]
HOW = {"bits": 8, "grow": True}


def llama(**more):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**wide(64), **more)).eval()


def bert(**more):
    return tf.BertConfig(**wide(64), max_position_embeddings=64, **more)


def without_dtype(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_head_of_another_size(tmp_path):
    tf.BertForSequenceClassification(bert(num_labels=3)).save_pretrained(tmp_path / "s")
    rpq.convert_checkpoint(tmp_path / "s", tmp_path / "o", **HOW)
    kind = tf.AutoModelForSequenceClassification
    with pytest.raises(rpq.SourceError, match=r"classifier.weight: the checkpoint describes \[3, 64\], .* \[5, 64\]"):
        kind.from_pretrained(tmp_path / "o", num_labels=5)
    model = kind.from_pretrained(tmp_path / "o", num_labels=5, ignore_mismatched_sizes=True)
    assert type(model.classifier) is torch.nn.Linear and model(IDS).logits.shape == (1, 5)
    assert torch.isfinite(model(IDS).logits).all() and "bert.pooler.dense.weight" in layers_of(model)
    model.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-6)


def test_t5_keeps_its_range(tmp_path):
    """`wo` is float32 in a float16 model, however it was converted."""
    torch.manual_seed(0)
    config = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    dense = tf.T5ForConditionalGeneration(tf.T5Config(**config, decoder_start_token_id=0)).half()
    dense.save_pretrained(tmp_path / "s")
    without_dtype(tmp_path / "s")
    kind = tf.AutoModelForSeq2SeqLM
    dense = kind.from_pretrained(tmp_path / "s")
    rpq.convert_checkpoint(tmp_path / "s", tmp_path / "o", **HOW)
    bytes_of = sum(p.numel() * p.element_size() for p in dense.parameters())
    assert rpq.plan(tmp_path / "s", **HOW).report().dense_bytes == bytes_of
    found = [
        rpq.load(tmp_path / "o"),
        kind.from_pretrained(tmp_path / "o"),
        kind.from_pretrained(tmp_path / "s", quantization_config=rpq.RPQConfig(**HOW)),
        dense,
    ]
    rpq.convert(dense, **HOW)
    for model in found:
        layer = model.encoder.block[0].layer[1].DenseReluDense
        assert (layer.wo.weight.dtype, layer.wi.weight.dtype, model.dtype) == (
            torch.float32,
            torch.float16,
            torch.float16,
        )
        assert torch.isfinite(model(input_ids=IDS, decoder_input_ids=IDS).logits).all()
    as_bfloat16 = kind.from_pretrained(tmp_path / "o", dtype=torch.bfloat16)
    assert as_bfloat16.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", often([torch.float16, torch.bfloat16, torch.float32], (torch.float16,)))
def test_a_config_without_a_dtype_means_that_of_the_files(dtype, tmp_path):
    tf.BertModel(bert()).to(dtype).save_pretrained(tmp_path / "s")
    without_dtype(tmp_path / "s")
    rpq.convert_checkpoint(tmp_path / "s", tmp_path / "o", **HOW)
    dense = tf.AutoModel.from_pretrained(tmp_path / "s")
    for model in (tf.AutoModel.from_pretrained(tmp_path / "o"), rpq.load(tmp_path / "o")):
        assert model.dtype == dense.dtype == dtype and model.pooler.dense.weight.dtype == dtype
    assert rpq.plan(tmp_path / "s", **HOW).report().dense_bytes == sum(
        p.numel() * p.element_size() for p in dense.parameters()
    )


def test_half_float_and_a_size_that_stays():
    model = llama()
    rpq.convert(model, **HOW)
    expected = model(IDS).logits
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()
    assert torch.equal(model(IDS).logits, expected)
    model.half()
    assert model.dtype == model.lm_head.weight.dtype == torch.float16
    model.float()
    assert model.dtype == torch.float32 and (model(IDS).logits - expected).norm() < 0.02 * expected.norm()


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path):
    """As an average of a training is; transformers forgets it where a model is quantized."""
    model = llama(tie_word_embeddings=True)
    rpq.convert(model, **HOW)
    kind, given = tf.AutoModelForCausalLM, {k: t.clone() for k, t in model.state_dict().items()}
    for name, tensor in given.items():
        if name.endswith("codebooks"):
            tensor *= 1.5
        elif not name.endswith("codes"):
            tensor *= 0.5
    model.save_pretrained(tmp_path / "o", state_dict=given)
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    key = "model.layers.0.mlp.up_proj.weight_rpq.codes"
    wrong = {k: t for k, t in given.items() if k != key}
    for state, said in (
        (wrong, f"state_dict holds no {key}: pass the whole"),
        (llama().state_dict(), "state_dict holds no model.embed_tokens.weight_rpq.codebooks: pass the whole"),
        (given | {key: given[key] + 0.5}, f"state_dict: {key} holds numbers between codes"),
        (given | {key: given[key][:1]}, f"state_dict: {key.removesuffix('codes')}codes is"),
    ):
        with pytest.raises(rpq.SourceError, match=said):
            model.save_pretrained(tmp_path / "o", state_dict=state)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    model.load_state_dict(given)
    assert torch.allclose(kind.from_pretrained(tmp_path / "o")(IDS).logits, model(IDS).logits, atol=1e-5)


def test_the_config_of_a_model_loads_its_folder(tmp_path):
    model = llama()
    rpq.convert(model, **HOW)
    model.save_pretrained(tmp_path / "o")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "o", config=model.config)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "o", config=loaded.config)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_restored_part(tmp_path):
    for part in ("model", "model.layers.0", "lm_head"):
        model = llama(tie_word_embeddings=part == "lm_head")
        rpq.convert(model, **HOW)
        rpq.restore(model.get_submodule(part))
        assert not layers_of(model.get_submodule(part)) and layers_of(model) and model.is_quantized
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / part)
        assert torch.equal(tf.AutoModelForCausalLM.from_pretrained(tmp_path / part).eval()(IDS).logits, expected)


def test_models_without_a_cache_in_their_outputs_under_a_budget():
    torch.manual_seed(0)
    mamba = tf.Mamba2Config(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=1,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
        chunk_size=8,
    )
    for model in (tf.Mamba2ForCausalLM(mamba), tf.BertModel(bert())):
        assert rpq.plan(model, bits=6.3, grow=True).file_bytes > 0


SHARDS = (("60KB", None), (None, "60KB"), ("60KB", "90KB"))


@pytest.mark.parametrize(
    "before, shards",
    often(
        itertools.product(("converted", "dense", "saved"), SHARDS),
        [*zip(("converted", "dense", "saved"), SHARDS)],
    ),
)
def test_save_pretrained_over_another_model(before, shards, tmp_path):
    """Of the earlier model nothing is left that would be read, and all that is said is said of the new one."""
    first, second = ({} if s is None else {"max_shard_size": s} for s in shards)
    model = llama()
    if before == "converted":
        other = tf.LlamaForCausalLM(tf.LlamaConfig(**{**wide(64), "num_hidden_layers": 3}))
        rpq.convert(other, **HOW)
        rpq.save(other, tmp_path / "out", **first)
    elif before == "dense":
        model.save_pretrained(tmp_path / "out", **first)
    else:
        rpq.convert(model, bits=2, grow=True)
        model.save_pretrained(tmp_path / "out", **first)
        model = llama()
    rpq.convert(model, **HOW)
    (tmp_path / "out" / "model-notes.safetensors").write_bytes(b"mine")
    model.save_pretrained(tmp_path / "out", **second)
    assert (tmp_path / "out" / "model-notes.safetensors").read_bytes() == b"mine"
    for again in (tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), rpq.load(tmp_path / "out")):
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    names = set(rpq.verify(tmp_path / "out"))
    weights = {p.name for p in (tmp_path / "out").glob("*.safetensors*")}
    assert weights <= names and ("model.safetensors" in weights) == (shards[1] is None)
    report = rpq.audit(tmp_path / "out")
    assert {r.name for r in report.rows if r.decision == "rpq"} == set(layers_of(model))
    assert "RPQ" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("shards", [None, "60KB"])
def test_a_variant_has_a_folder_of_its_own(shards, tmp_path):
    """All variants in a folder share its config.json, so that one of them alone cannot be in codes."""
    model = llama()
    model.save_pretrained(tmp_path / "out")
    dense = tmp_path.joinpath("out", "config.json").read_bytes()
    rpq.convert(model, **HOW)
    how = {"variant": "fp16"} | ({} if shards is None else {"max_shard_size": shards})
    with pytest.raises(SourceError, match=r"holds model.safetensors, whose .* variant 'fp16' to a folder of its own"):
        model.save_pretrained(tmp_path / "out", **how)
    assert tmp_path.joinpath("out", "config.json").read_bytes() == dense
    for _ in range(2):
        model.save_pretrained(tmp_path / "own", **how)
    assert any(".fp16" in name for name in rpq.verify(tmp_path / "own"))
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "own", variant="fp16").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(SourceError, match=r"holds model\.fp16"):
        model.save_pretrained(tmp_path / "own", variant="bf16")


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = llama()
    rpq.convert(model, **HOW)
    tmp_path.joinpath("README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert tmp_path.joinpath("README.md").read_text() == "# Mine\n"
    rpq.verify(tmp_path)
    tmp_path.joinpath("README.md").write_text("# Changed later\n")
    rpq.verify(tmp_path)


def test_a_model_that_transformers_renames_is_saved_under_its_own_names(tmp_path):
    """A mixture of experts is one tensor per expert in dense files; codes are of the tensors in the model."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(**wide(64), num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    tf.MixtralForCausalLM(config).eval().save_pretrained(tmp_path / "s")
    assert any("experts.0.w1" in k or "experts.0." in k for k in load_file(tmp_path / "s" / "model.safetensors"))
    kind = tf.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "s", quantization_config=rpq.RPQConfig(include=["*experts*"], **HOW)).eval()
    assert layers_of(model)
    model.save_pretrained(tmp_path / "o")
    for again in (kind.from_pretrained(tmp_path / "o").eval(), rpq.load(tmp_path / "o")):
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_state_of_a_converted_model_without_its_description_is_refused(tmp_path):
    model = llama()
    rpq.convert(model, **HOW)
    model.save_pretrained(tmp_path / "o")
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "o" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    part = {"quant_method": "rpq", "format_version": 1}
    (tmp_path / "o" / "config.json").write_text(json.dumps(config | {"quantization_config": part}))
    with pytest.raises(rpq.SourceError, match=r"quantization_config\.modules is missing"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "o")


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_a_model_that_is_offloaded_without_a_device_map_is_saved_by_us(offload, tmp_path):
    accelerate, model = pytest.importorskip("accelerate"), llama(tie_word_embeddings=True)
    rpq.convert(model, **HOW)
    wanted = model(IDS).logits
    getattr(accelerate, offload)(model, *([tmp_path / "off"] if offload == "disk_offload" else []))
    with pytest.raises(rpq.SourceError, match=r"LlamaForCausalLM is offloaded without a device map.*rpq\.save"):
        model.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    rpq.save(model, tmp_path / "ours")
    assert torch.equal(rpq.load(tmp_path / "ours")(IDS).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_on_disk_and_a_conversion_on_load_that_cannot_be_there(tmp_path, tied):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "rpq", **HOW)
    wanted = rpq.load(tmp_path / "rpq")(IDS).logits
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    some = {**places, "model.layers.1": "disk"}
    for device_map in ({"": "disk"}, some):
        away = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "rpq", device_map=device_map, offload_folder=tmp_path / "off"
        )
        assert away.model.layers[1].mlp.up_proj.weight_rpq.codes.is_meta
        assert torch.equal(away(IDS).logits, wanted)
        away.save_pretrained(tmp_path / "again")
        assert torch.equal(rpq.load(tmp_path / "again")(IDS).logits, wanted)
    with pytest.raises(
        rpq.SourceError, match="a device_map with 'disk' does not work while a model is converted on load"
    ):
        tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense",
            device_map=some,
            offload_folder=tmp_path / "off2",
            quantization_config=rpq.RPQConfig(bits=8),
        )
