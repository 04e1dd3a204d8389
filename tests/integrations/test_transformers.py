"""Converted models inside transformers: every Auto class, sharded or not, other dtypes, tied weights, training, failures."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, inputs, outputs
from often import often
from PIL import Image

import rpq_convert as rpq
from rpq_convert.layers.surgery import layers_of

AGAIN = """
import sys, torch
from rpq_convert.hf import torchvision
torchvision.fix()  # transformers needs one that works
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


SAVED = ("BERT", "gpt-oss", "Mamba 2", "T5", "CLIP")  # the others of each kind: test_architectures


@pytest.mark.parametrize("name", often(ARCHITECTURES, SAVED))
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


@pytest.mark.slow
def test_without_the_import_nothing_is_loaded(folders):
    _, out = folders("OPT")
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


KINDS = {
    "BERT": ("", "ForMaskedLM", "ForCausalLM", "ForPreTraining", "ForSequenceClassification", "ForMultipleChoice"),
    "Llama": ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"),
    "T5": ("", "ForSeq2SeqLM", "ForSequenceClassification", "ForTokenClassification"),
    "BART": ("", "ForSeq2SeqLM", "ForCausalLM", "ForSequenceClassification"),
    "Whisper": ("", "ForSpeechSeq2Seq", "ForCausalLM", "ForAudioClassification"),
    "Wav2Vec2": ("", "ForCTC", "ForAudioClassification", "ForAudioXVector"),
    "ViT": ("", "ForImageClassification", "ForMaskedImageModeling"),
    "CLIP": ("", "ForZeroShotImageClassification", "ForImageClassification"),
}


@pytest.mark.parametrize("name", often(KINDS, ("BERT", "T5", "CLIP")))
def test_every_auto_class_finds_what_it_finds_in_the_dense_checkpoint(name, folders):
    kinds = KINDS[name]
    source, out = folders(name)
    whole = layers_of(rpq.load(out))
    table = {
        "lm_head.weight",
        "model.decoder.embed_tokens.weight",
    }  # stored as `model.shared.weight`, which this class lacks
    found_too = {("BART", "ForCausalLM"): table}  # by its other names, where transformers draws a random one
    for kind in kinds:
        auto = getattr(tf, f"AutoModel{kind}")
        dense, wanted = auto.from_pretrained(source, output_loading_info=True)
        model, found = auto.from_pretrained(out, output_loading_info=True)
        more = found_too.get((name, kind), set())
        assert type(model) is type(dense) and found["missing_keys"] | more == wanted["missing_keys"], kind
        assert not found["missing_keys"] & more
        held = layers_of(model)
        assert len(held) > 5 and not any(p.is_meta for p in model.parameters())
        for path, weight in held.items():
            assert any(w.shape == weight.shape and torch.equal(w(), weight()) for w in whole.values()), (kind, path)


def test_a_restored_head_is_its_own_although_the_config_ties_it(folders, tmp_path):
    source, _ = folders("GPT-2")
    model = tf.AutoModelForCausalLM.from_pretrained(source).eval()
    rpq.convert(model, bits=4, grow=True)
    rpq.restore(model.lm_head)
    model.lm_head.weight.data.add_(1)
    model.save_pretrained(tmp_path / "own")
    assert same(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "own").eval(), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, "auto"])
def test_any_dtype_gives_the_weights_that_load_gives(dtype, folders):
    for name in ("OPT", "Mixtral"):
        _, out = folders(name)
        model = tf.AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        expected = rpq.load(out).to(torch.float32 if dtype == "auto" else dtype)
        assert model.dtype == expected.dtype
        for path, weight in layers_of(expected).items():
            found = layers_of(model)[path]()
            assert found.dtype == weight().dtype and torch.equal(found, weight()), path


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


@pytest.mark.parametrize("name", often(["BERT", "Llama", "GPT-2", "Mixtral", "T5"], ("Llama", "T5")))
def test_conversion_on_load_equals_conversion(name, folders, tmp_path):
    source, _ = folders(name)
    kind = type(rpq.load(folders(name)[1]))
    how = rpq.RPQConfig(bits=4, grow=True)
    loaded = kind.from_pretrained(source, quantization_config=how).eval()
    converted = kind.from_pretrained(source).eval()
    rpq.convert(converted, bits=4, grow=True)
    assert same(loaded, converted)
    assert loaded.config.quantization_config.to_dict() == converted.config.quantization_config.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert same(kind.from_pretrained(tmp_path / "again").eval(), converted)


def test_conversion_on_load_of_a_new_head_and_to_a_budget(folders):
    source, _ = folders("BERT")
    for config in (rpq.RPQConfig(bits=4, grow=True), rpq.RPQConfig(bits=4.5, grow=True)):
        with pytest.warns(UserWarning, match="classifier.weight left dense: the checkpoint has none"):
            model = tf.AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=70, quantization_config=config
            )
        assert type(model.classifier) is torch.nn.Linear and len(layers_of(model)) > 10
        assert torch.isfinite(model.eval()(torch.arange(2, 9)[None]).logits).all()
    model.classifier.weight.data.normal_()
    before = model.classifier.weight.detach().clone()
    rpq.convert(model, bits=8, grow=True)  # once it is trained
    found = layers_of(model)["classifier.weight"]()
    assert (found - before).norm() < 0.05 * before.norm() and len(layers_of(model)) > 10
    base = tf.AutoModel.from_pretrained(source)
    target = 2 * rpq.plan(base, bits=2, grow=True).file_bytes
    small = tf.AutoModel.from_pretrained(source, quantization_config=rpq.RPQConfig(target_size=target, grow=True))
    rpq.convert(base, target_size=target, grow=True)
    assert same(small.eval(), base.eval())


LOADING = """
import sys, threading, time
from pathlib import Path
import rpq_convert as rpq
from rpq_convert.hf import torchvision
torchvision.fix()
from transformers import AutoModel

def private():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def load(name):
    return AutoModel.from_pretrained(name, quantization_config=rpq.RPQConfig(bits=4))

load(sys.argv[1])  # compiles or loads the kernels
before, peak, done = private(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
load(sys.argv[2])
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow  # minutes on two cores
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_on_load_never_holds_the_dense_model(tmp_path):
    for name, depth in (("small", 1), ("large", 12)):
        config = tf.BertConfig(
            vocab_size=500, hidden_size=768, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=1536
        )
        tf.BertModel(config).save_pretrained(tmp_path / name)
    dense = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LOADING, str(tmp_path / "small"), str(tmp_path / "large")]
    alone = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < dense / 2


def test_disk_offload(folders, tmp_path):
    _, out = folders("Llama")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = tf.AutoModelForCausalLM.from_pretrained(out, device_map=places, offload_folder=tmp_path / "off").eval()
    expected = rpq.load(out)
    assert any(p.is_meta for p in model.model.layers[1].parameters())
    assert torch.allclose(outputs(model), outputs(expected), rtol=1e-5, atol=1e-6)


def test_pipeline_and_sampling(folders):
    _, out = folders("Llama")
    model, dense = rpq.load(out), rpq.restore(rpq.load(out))
    ids = torch.arange(2, 8)[None]
    found = []
    for one in (model, dense):
        torch.manual_seed(3)
        found.append(one.generate(ids, max_new_tokens=8, do_sample=True, top_k=20, pad_token_id=0))
    assert torch.equal(*found)
    _, out = folders("ViT")
    model = rpq.load(out)
    size = model.config.image_size
    processor = tf.ViTImageProcessor(size={"height": size, "width": size}) if model.config.num_channels == 3 else None
    classify = tf.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    image = Image.fromarray(torch.randint(0, 256, (size, size, 3), dtype=torch.uint8).numpy())
    pixels = processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        best = int(model(pixels).logits.argmax())
    assert classify(image)[0]["label"] == model.config.id2label[best]


def test_resized_embeddings(folders):
    _, out = folders("Llama")
    model = rpq.load(out)
    entries = model.config.vocab_size
    with pytest.raises(RuntimeError, match="restore"):
        model.resize_token_embeddings(entries + 7)
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        rpq.restore(module)
    model.resize_token_embeddings(entries + 7)
    assert model(torch.tensor([[entries + 6]])).logits.shape[-1] == entries + 7
    assert layers_of(model)


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
