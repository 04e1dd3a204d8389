"""Tied tensors lie in files under the name that transformers expects, whichever is declared first, and are found under any."""

import json

import pytest
import torch
import transformers as tf
from architectures import both, wide
from safetensors.torch import load_file, save_file

import rpq_convert as rpq
from rpq_convert.layers.surgery import layers_of

IDS = torch.arange(7, 15)[None]
KINDS = {
    "XLM-RoBERTa": lambda: tf.XLMRobertaForMaskedLM(tf.XLMRobertaConfig(**wide(64), max_position_embeddings=64)),
    "CamemBERT": lambda: tf.CamembertForMaskedLM(tf.CamembertConfig(**wide(64), max_position_embeddings=64)),
    "XLM-RoBERTa, causal": lambda: tf.XLMRobertaForCausalLM(
        tf.XLMRobertaConfig(**wide(64), max_position_embeddings=64, is_decoder=True)
    ),
    "BART": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**both(64))),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (source folder, converted folder), made on first use."""
    made = {}

    def folder(name):
        if name not in made:
            root = tmp_path_factory.mktemp("tied")
            torch.manual_seed(0)
            KINDS[name]().eval().save_pretrained(root / "source")
            rpq.convert_checkpoint(root / "source", root / "out", bits=8, grow=True)
            made[name] = (root / "source", root / "out")
        return made[name]

    return folder


def near(a, b):
    return (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("name", KINDS)
def test_names_are_those_of_the_dense_files(name, folders):
    source, out = folders(name)
    dense = load_file(source / "model.safetensors")
    converted = {key.partition("_rpq.")[0] for key in load_file(out / "model.safetensors")}
    assert converted == set(dense)


@pytest.mark.parametrize(
    "auto",
    ["", "ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
)
@pytest.mark.parametrize("name", ["XLM-RoBERTa", "CamemBERT"])
def test_every_auto_class_gets_the_table(name, auto, folders):
    source, out = folders(name)
    kind = getattr(tf, f"AutoModel{auto}")
    dense, wanted = kind.from_pretrained(source, output_loading_info=True)
    model, found = kind.from_pretrained(out, output_loading_info=True)
    assert found["missing_keys"] == wanted["missing_keys"]
    table, expected = (m.get_input_embeddings().weight for m in (model, dense))
    assert near(table[:], expected)


@pytest.mark.parametrize("name", KINDS)
def test_saved_again_by_transformers(name, folders, tmp_path):
    _, out = folders(name)
    kind = type(rpq.load(out))
    model = kind.from_pretrained(out).eval()
    given = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "BART" else {})
    expected = model(**given).logits
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(kind.from_pretrained(tmp_path / "again").eval()(**given).logits, expected)
    assert torch.equal(rpq.load(tmp_path / "again")(**given).logits, expected)
    rpq.verify(tmp_path / "again")


def test_converted_on_load_and_in_memory_alike(folders):
    source, out = folders("XLM-RoBERTa")
    loaded = tf.AutoModelForMaskedLM.from_pretrained(source, quantization_config=rpq.RPQConfig(bits=8, grow=True))
    memory = tf.AutoModelForMaskedLM.from_pretrained(source)
    rpq.convert(memory, bits=8, grow=True)
    wanted = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    for model in (loaded, memory):
        assert model.config.quantization_config.stored["modules"].keys() == wanted.keys()
        assert model.lm_head.decoder.weight_rpq is model.get_input_embeddings().weight_rpq


def test_a_folder_that_holds_the_table_under_the_heads_name(folders, tmp_path):
    """As 0.1.0 wrote it; so every alias is tried."""
    source, out = folders("XLM-RoBERTa")
    table, head = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    config = json.loads((out / "config.json").read_text())
    said = config["quantization_config"]
    said["modules"] = {head if name == table else name: what for name, what in said["modules"].items()}
    said |= {"tied": {table: head}, "guard": head}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = {
        k.replace(table, head) if k.startswith(table) else k: t for k, t in load_file(out / "model.safetensors").items()
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    dense = tf.AutoModel.from_pretrained(source).eval()
    assert near(tf.AutoModel.from_pretrained(tmp_path).eval()(IDS)[0], dense(IDS)[0])
    whole = tf.AutoModelForMaskedLM.from_pretrained(source).eval()
    for model in (tf.AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), rpq.load(tmp_path)):
        assert near(model(IDS).logits, whole(IDS).logits) and model.lm_head.decoder.weight_rpq is not None


def test_ties_are_made_again_and_a_head_that_was_restored_stays_its_own(folders, tmp_path):
    _, out = folders("XLM-RoBERTa")
    model = tf.AutoModelForMaskedLM.from_pretrained(out).eval()
    expected = model(IDS).logits
    model.tie_weights()
    assert torch.equal(model(IDS).logits, expected)
    rpq.restore(model.lm_head)
    model.lm_head.decoder.weight.data.add_(1)
    model.save_pretrained(tmp_path / "own")
    again = tf.AutoModelForMaskedLM.from_pretrained(tmp_path / "own").eval()
    assert torch.equal(again.lm_head.decoder.weight, model.lm_head.decoder.weight)
    assert "roberta.embeddings.word_embeddings.weight" in layers_of(again)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
