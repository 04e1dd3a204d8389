"""Converted models inside transformers: every Auto class, sharded or not, other dtypes, tied weights, training, failures."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, inputs, outputs

import rpq_convert as rpq

AGAIN = """
import sys, torch
import rpq_convert  # nothing else: importing it is enough
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(12)[None]).logits, sys.argv[2])
"""
UNAWARE = """
import sys, torch

library = torch.library.Library("torchvision", "FRAGMENT")  # a CUDA torchvision beside a CPU-only torch
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from transformers import AutoModelForCausalLM

AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def same(a, b):
    """Return whether two models hold the same tensors; outputs may differ in rounding where torch's memory is aligned otherwise."""
    x, y = a.state_dict(), b.state_dict()
    equal = x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    return equal and torch.allclose(outputs(a), outputs(b), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (source folder, converted folder), made on first use."""
    made = {}

    def folder(name):
        if name not in made:
            root = tmp_path_factory.mktemp("pretrained")
            torch.manual_seed(0)
            ARCHITECTURES[name](64).eval().save_pretrained(root / "source")
            rpq.convert_checkpoint(root / "source", root / "out", bits=4, grow=True, max_shard_size="150KB")
            made[name] = (root / "source", root / "out")
        return made[name]

    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_pretrained_and_save_pretrained(name, folders, tmp_path):
    _, out = folders(name)
    expected = rpq.load(out)
    kind = type(expected)
    model, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert same(model.eval(), expected) and model.dtype == torch.float32
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert same(kind.from_pretrained(tmp_path / "again").eval(), expected)
    assert same(rpq.load(tmp_path / "again"), expected)


def test_a_fresh_process_needs_the_import_alone(folders, tmp_path):
    _, out = folders("OPT")
    subprocess.run([sys.executable, "-c", AGAIN, out, tmp_path / "logits.pt"], check=True, capture_output=True)
    with torch.no_grad():
        expected = rpq.load(out)(torch.arange(12)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    unaware = subprocess.run([sys.executable, "-c", UNAWARE, out], capture_output=True, text=True)
    assert unaware.returncode != 0, "random weights would be the result"
    assert "Unknown quantization type, got rpq" in unaware.stderr and "embed_tokens.weight" in unaware.stderr


def test_a_base_model_and_a_headed_one_share_checkpoints(folders, tmp_path):
    _, out = folders("Llama")
    base = tf.AutoModel.from_pretrained(out)
    whole = rpq.load(out)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(base(ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    headed, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    with torch.no_grad():
        assert torch.equal(headed.model(ids).last_hidden_state, expected)


def test_tied_weights_stay_one(folders):
    _, out = folders("GPT-2")
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight_rpq is model.transformer.wte.weight_rpq or (
        model.lm_head.weight_rpq.codes is model.transformer.wte.weight_rpq.codes
    )


def test_other_dtypes_and_a_device_map(folders):
    _, out = folders("OPT")
    half = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model.decoder.layers[0].fc1.weight.dtype == torch.bfloat16
    expected = rpq.load(out)
    with torch.no_grad():
        logits = half.eval()(torch.arange(12)[None]).logits
        wanted = expected(torch.arange(12)[None]).logits
    assert logits.dtype == torch.bfloat16 and (logits - wanted).norm() < 0.05 * wanted.norm()
    mapped = tf.AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"}).eval()
    assert same(mapped, expected)


def test_conversion_on_load_equals_conversion(folders):
    source, _ = folders("BERT")
    loaded = tf.AutoModel.from_pretrained(source, quantization_config=rpq.RPQConfig(bits=4, grow=True)).eval()
    converted = tf.AutoModel.from_pretrained(source).eval()
    rpq.convert(converted, bits=4, grow=True)
    assert same(loaded, converted)
    assert loaded.config.quantization_config.to_dict() == converted.config.quantization_config.to_dict()


def test_converted_in_memory_trained_saved_and_loaded(folders, tmp_path):
    source, _ = folders("OPT")
    model = tf.AutoModelForCausalLM.from_pretrained(source)
    rpq.convert(model, bits=4, grow=True)
    before = json.loads(json.dumps(model.config.to_dict(), default=str))
    assert before["quantization_config"]["quant_method"] == "rpq" and model.is_quantized
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 250, (2, 16))
    first = model(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert model(ids, labels=ids).loss < first
    model.eval().save_pretrained(tmp_path / "trained")
    assert same(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval(), model)


def test_generate_cache_beams_and_gradient_checkpointing(folders):
    _, out = folders("Llama")
    model = tf.AutoModelForCausalLM.from_pretrained(out).eval()
    dense = rpq.restore(tf.AutoModelForCausalLM.from_pretrained(out)).eval()
    ids = torch.arange(2, 8)[None]
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
    model.train()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight_rpq.codebooks.grad is not None


def test_dequantize_and_restore_give_plain_models(folders, tmp_path):
    _, out = folders("OPT")
    expected = rpq.load(out)
    dense = tf.AutoModelForCausalLM.from_pretrained(out).eval().dequantize()
    assert type(dense.model.decoder.layers[0].fc1) is torch.nn.Linear
    assert (outputs(dense) - outputs(expected)).abs().max() < 1e-4
    assert not hasattr(dense.config, "quantization_config") and not dense.is_quantized
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert same(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval(), dense)


def test_trainer(folders, tmp_path):
    _, out = folders("BERT")
    model = tf.AutoModelForSequenceClassification.from_pretrained(out, num_labels=2)
    data = [{"input_ids": torch.randint(2, 250, (8,)), "labels": i % 2} for i in range(16)]
    arguments = tf.TrainingArguments(
        tmp_path / "run", num_train_epochs=1, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    before = model.bert.encoder.layer[0].output.dense.weight_rpq.codebooks.detach().clone()
    tf.Trainer(model=model, args=arguments, train_dataset=data).train()
    after = model.bert.encoder.layer[0].output.dense.weight_rpq.codebooks
    assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_failures_name_what_is_wrong(folders, tmp_path):
    _, out = folders("BERT")
    config = json.loads((out / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in out.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config["quantization_config"]["format_version"] = 99
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(rpq.SourceError, match="format version 99"):
        tf.AutoModel.from_pretrained(other)
    config["quantization_config"]["format_version"] = 1
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(rpq.SourceError, match="the checkpoint describes"):
        tf.AutoModel.from_pretrained(other)
    assert inputs(rpq.load(out))
