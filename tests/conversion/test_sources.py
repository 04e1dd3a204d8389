"""Sources: what a transformers folder holds is what transformers takes, nothing is dropped without a word, and what is quantized is refused."""

import copy
import json
import shutil

import pytest
import torch
import transformers as tf
from often import often
from safetensors.torch import load_file, save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import SourceError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
OPTIONS = {"bits": 8, "grow": True}
IDS = torch.arange(5, 13)[None]


def llama(seed=0, **more):
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **more)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "source")


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def put(folder, tensors):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def configured(folder, **more):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def near(a, b, most=0.05):
    return float((a - b).detach().norm() / b.detach().norm()) < most


# ---- quantized ---------------------------------------------------------------------------------------------------------


def per_projection(tensors, change):
    """Return a checkpoint in which every projection's weight is what `change` makes of it."""
    found = {}
    for name, tensor in tensors.items():
        found |= change(name, tensor) if "proj" in name else {name: tensor}
    return found


def halves(v):
    return torch.randint(0, 255, (v.shape[0], v.shape[1] // 2), dtype=torch.uint8)


def words(*shape):
    return torch.ones(*shape, dtype=torch.int32)


FORMS = {
    "fp8, scale_inv": lambda k, v: {k: v.to(torch.float8_e4m3fn), k + "_scale_inv": torch.ones(1)},
    "fp8, weight_scale and input_scale": lambda k, v: {
        k: v.to(torch.float8_e4m3fn), k + "_scale": torch.ones(1), k.replace("weight", "input_scale"): torch.ones(1),
    },
    "fp8, a name of its own": lambda k, v: {k: v.to(torch.float8_e4m3fn), "scales." + k.replace(".", "_") + "_scale": torch.ones(1)},
    "fp8, modelopt amax": lambda k, v: {k: v, k.replace("weight", "weight_quantizer._amax"): torch.ones(1)},
    "int8 alone": lambda k, v: {k: (v * 100).to(torch.int8)},
    "int8, SCB": lambda k, v: {k: (v * 100).to(torch.int8), k.replace("weight", "SCB"): torch.ones(v.shape[0])},
    "bitsandbytes": lambda k, v: {k: halves(v), k + ".absmax": torch.ones(4), k + ".quant_map": torch.ones(16)},
    "awq": lambda k, v: {
        k.replace("weight", "qweight"): words(v.shape[1], v.shape[0] // 8), k.replace("weight", "scales"): torch.ones(1, v.shape[0]),
        k.replace("weight", "qzeros"): words(1, v.shape[0] // 8),
    },
    "gptq": lambda k, v: {k.replace("weight", "qweight"): words(v.shape[1] // 8, v.shape[0]), k.replace("weight", "g_idx"): words(v.shape[1])},
    "packed in int32": lambda k, v: {k + "_packed": words(v.shape[0], v.shape[1] // 8), k + "_shape": torch.tensor(v.shape)},
    "mxfp4": lambda k, v: {k.replace("weight", "weight_blocks"): halves(v), k.replace("weight", "weight_scales"): halves(v)},
    "mlx": lambda k, v: {
        k: words(v.shape[0], v.shape[1] // 8).to(torch.uint32), k.replace("weight", "scales"): torch.ones(v.shape[0], 2),
        k.replace("weight", "biases"): torch.ones(v.shape[0], 2),
    },
    "quanto": lambda k, v: {k + "._data": v.to(torch.int8), k + "._scale": torch.ones(v.shape[0], 1)},
    "dense with a scale left over": lambda k, v: {k: v, k + "_scale": torch.ones(v.shape[0])},
    "unmerged adapter": lambda k, v: {k: v, k.replace("weight", "lora_A.weight"): torch.ones(4, v.shape[1])},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_scales_zero_points_and_packed_weights_are_refused_before_the_first_fit(folder, tmp_path, form):
    put(folder, per_projection(tensors_of(folder), FORMS[form]))
    started = []
    for act in (
        lambda: rpq.convert_checkpoint(folder, tmp_path / "out", progress=lambda *a: started.append(a), **OPTIONS),
        lambda: rpq.plan(folder, **OPTIONS),
        lambda: (
            tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=rpq.RPQConfig(**OPTIONS))
            if form not in ("awq", "gptq")
            else rpq.plan(folder, **OPTIONS)
        ),
    ):
        with pytest.raises(SourceError, match="quantized already") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not started and not list(tmp_path.glob("out*"))


def plain_layer():
    return nn.Sequential(nn.Linear(32, 64))


@pytest.mark.parametrize("form", ["fp8, scale_inv", "int8, SCB", "awq", "bitsandbytes"])
def test_the_same_with_a_factory(tmp_path, form):
    weights = FORMS[form]("0.weight", torch.randn(64, 32)) | {"0.bias": torch.ones(64)}
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="quantized already"):
        rpq.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", factory=plain_layer, **OPTIONS)


ANNOUNCED = (
    {"quantization_config": {"load_in_8bit": True}}, {"quantization_config": {"quant_method": "fp8"}}, {"load_in_4bit": True},
    {"compression_config": {"format": "pack-quantized"}}, {"quantization": {"bits": 4, "group_size": 64}},
    {"text_config": {"quantization_config": {"bits": 4}}},
)  # fmt: skip


@pytest.mark.parametrize("more", ANNOUNCED, ids=lambda m: next(iter(m)))
def test_what_a_config_announces_is_refused(folder, tmp_path, more):
    configured(folder, **more)
    with pytest.raises(SourceError, match="is quantized already"):
        rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    "file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json"]
)
def test_records_of_other_tools_are_refused(folder, tmp_path, file):
    (folder / file).write_text("{}")
    with pytest.raises(SourceError, match=f"{file} says so"):
        rpq.plan(folder, **OPTIONS)


def test_empty_announcements_and_plain_fp8_are_no_reason(folder, tmp_path):
    configured(folder, quantization_config=None, compression_config={})
    put(folder, per_projection(tensors_of(folder), lambda k, v: {k: v.to(torch.float8_e4m3fn)}))
    rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)
    assert near(rpq.load(tmp_path / "out")(IDS).logits, tf.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits)


# ---- accounts ----------------------------------------------------------------------------------------------------------


def test_parts_that_the_class_does_not_build_are_kept_and_named(folder, tmp_path):
    head = torch.randn(32, 32)
    put(folder, tensors_of(folder) | {"mtp.layers.0.weight": head, "model.layers.7.mlp.up_proj.weight": head})
    plan = rpq.plan(folder, **OPTIONS)
    report = rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)
    assert any("mtp.layers.0.weight" in w for w in report.warnings) and plan.warnings == report.warnings
    assert report.weight_file_bytes == report.predicted_bytes == plan.file_bytes
    assert torch.equal(tensors_of(tmp_path / "out")["mtp.layers.0.weight"], head)
    for model in (rpq.load(tmp_path / "out"), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert near(model(IDS).logits, llama()(IDS).logits)
    rpq.verify(tmp_path / "out")
    rpq.save(copy.deepcopy(rpq.load(tmp_path / "out")), tmp_path / "again")
    rpq.verify(tmp_path / "again")
    assert torch.equal(tensors_of(tmp_path / "again")["mtp.layers.0.weight"], head)
    rpq.restore_checkpoint(tmp_path / "again", tmp_path / "dense")
    assert torch.equal(tensors_of(tmp_path / "dense")["model.layers.7.mlp.up_proj.weight"], head)


def test_leftovers_of_modules_are_left_out_and_listed(folder, tmp_path):
    put(
        folder,
        tensors_of(folder)
        | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.layers.0.self_attn.masked_bias": torch.ones(1),
        },
    )
    report = rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)
    assert [d.name for d in report.dropped] == ["model.layers.0.self_attn.masked_bias"]
    shown = (
        str(report),
        report.to_markdown(),
        report.to_html(),
        report.to_json(),
        (tmp_path / "out/README.md").read_text(),
    )
    assert all("masked_bias" in text for text in shown)
    assert rpq.audit(tmp_path / "out").dropped == report.dropped
    assert "dropped" not in json.loads(rpq.plan(llama(), bits=8).to_json())


@pytest.mark.parametrize(
    "name, value",
    [
        ("model.norm.weight", torch.ones(31)), ("model.norm.weight", torch.ones(32, dtype=torch.int64)),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(64, 31)), ("model.embed_tokens.weight", torch.ones(99, 32)),
    ],
)  # fmt: skip
def test_shapes_and_kinds_are_compared_before_the_first_fit(folder, tmp_path, name, value):
    put(folder, tensors_of(folder) | {name: value})
    started = []
    with pytest.raises(SourceError, match=name):
        rpq.convert_checkpoint(folder, tmp_path / "out", progress=lambda *a: started.append(a), **OPTIONS)
    assert not started


def test_the_same_of_a_factorys_source(tmp_path):
    save_file({"0.weight": torch.ones(64, 32), "0.bias": torch.ones(63)}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"0\.bias"):
        rpq.plan(tmp_path / "x.safetensors", factory=plain_layer, **OPTIONS)


# ---- which weights -----------------------------------------------------------------------------------------------------


def test_a_new_file_beside_a_stale_index_is_taken(tmp_path):
    llama().save_pretrained(tmp_path / "s", max_shard_size="20KB")
    assert (tmp_path / "s/model.safetensors.index.json").is_file()
    new = llama(seed=1)
    put(tmp_path / "s", new.state_dict())
    rpq.convert_checkpoint(tmp_path / "s", tmp_path / "out", **OPTIONS)
    assert near(rpq.load(tmp_path / "out")(IDS).logits, new(IDS).logits)


def test_the_file_that_the_config_names_is_taken_as_transformers_takes_it(folder, tmp_path):
    new = llama(seed=1)
    save_file({k: v.contiguous() for k, v in new.state_dict().items()}, folder / "ema.safetensors", {"format": "pt"})
    configured(folder, transformers_weights="ema.safetensors")
    assert near(tf.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, new(IDS).logits, 1e-5)
    rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)
    for model in (rpq.load(tmp_path / "out"), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert near(model(IDS).logits, new(IDS).logits)


def test_an_adapter_beside_a_model_is_refused(folder, tmp_path):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"adapter_config\.json"):
        rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("kept", [(), ("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens")])
def test_a_head_of_its_own_under_a_tied_config_is_its_own(folder, tmp_path, kept):
    configured(folder, tie_word_embeddings=True)
    dense = tf.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert torch.equal(dense, llama()(IDS).logits)
    report = rpq.convert_checkpoint(folder, tmp_path / "out", exclude=list(kept), **OPTIONS)
    assert any("lm_head.weight" in w for w in report.warnings)
    on_load = rpq.RPQConfig(bits=8, grow=True, exclude=list(kept))
    models = [
        rpq.load(tmp_path / "out"), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=on_load),
    ]  # fmt: skip
    assert all(near(m(IDS).logits, dense) for m in models)


def test_a_tied_head_that_is_stored_twice_stays_tied(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "s")
    found = tensors_of(tmp_path / "s")
    put(tmp_path / "s", found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()})
    report = rpq.convert_checkpoint(tmp_path / "s", tmp_path / "out", **OPTIONS)
    assert not any("not tied" in w for w in report.warnings)
    assert not [k for k in tensors_of(tmp_path / "out") if k.startswith("lm_head.weight_rpq")]


# ---- what transformers fills -------------------------------------------------------------------------------------------

SEQ2SEQ = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("kind", often(["Marian", "Bart", "MBart", "Pegasus", "Blenderbot"], ("Marian", "Bart")))
def test_keys_that_transformers_fills_need_not_be_there(tmp_path, kind):
    torch.manual_seed(0)
    name = "MarianMTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration"
    model = getattr(tf, name)(getattr(tf, f"{kind}Config")(**SEQ2SEQ)).eval()
    model.save_pretrained(tmp_path / "s")
    put(tmp_path / "s", {k: v for k, v in tensors_of(tmp_path / "s").items() if k != "final_logits_bias"})
    rpq.convert_checkpoint(tmp_path / "s", tmp_path / "out", **OPTIONS)
    x = {"input_ids": IDS, "decoder_input_ids": IDS}
    dense = getattr(tf, name).from_pretrained(tmp_path / "s")(**x).logits
    for found in (rpq.load(tmp_path / "out"), getattr(tf, name).from_pretrained(tmp_path / "out")):
        assert near(found(**x).logits, dense)
    rpq.convert(model, bits=8, grow=True)
    model.save_pretrained(tmp_path / "again")  # without the keys that its class does not save
    assert near(rpq.load(tmp_path / "again")(**x).logits, dense)


def test_an_encoder_without_its_pooler(tmp_path):
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "s")
    put(tmp_path / "s", {k: v for k, v in tensors_of(tmp_path / "s").items() if "pooler" not in k})
    report = rpq.convert_checkpoint(tmp_path / "s", tmp_path / "out", **OPTIONS)
    assert any("pooler.dense.weight" in w and "random" in w for w in report.warnings)
    assert next(r for r in report.rows if r.name == "pooler.dense.weight").decision == "dense"
    assert near(rpq.load(tmp_path / "out")(IDS)[0], model(IDS)[0])


def test_a_head_that_is_not_there_is_still_refused(folder, tmp_path):
    put(folder, {k: v for k, v in tensors_of(folder).items() if k != "lm_head.weight"})
    with pytest.raises(SourceError, match=r"lm_head\.weight"):
        rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)
