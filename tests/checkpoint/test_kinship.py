"""Whether a dense checkpoint can be what a converted folder was made from."""

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.checkpoint.kinship import check_base
from rpq_convert.errors import SourceError

SIZE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def saved(model, place):
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, its conversions to 8 bits, 1 bit and random codes, and other models beside it."""
    place = tmp_path_factory.mktemp("kin")
    torch.manual_seed(0)
    bert = tf.BertForMaskedLM(tf.BertConfig(**SIZE))
    saved(bert, place / "base")
    for name, how in {"8": {"bits": 8}, "1": {"bits": 1}, "random": {"bits": 2, "fit": "random"}}.items():
        rpq.convert_checkpoint(place / "base", place / name, grow=True, **how)
    part = tf.BertModel.from_pretrained(place / "base")
    rpq.convert(part, bits=4, grow=True)
    rpq.save(part, place / "part")
    saved(tf.BertForMaskedLM(tf.BertConfig(**SIZE)), place / "stranger")
    saved(tf.BertForMaskedLM(tf.BertConfig(**{**SIZE, "hidden_size": 32})), place / "narrow")
    saved(tf.BertForMaskedLM(tf.BertConfig(**{**SIZE, "vocab_size": 200})), place / "words")
    saved(tf.BertForMaskedLM(tf.BertConfig(**{**SIZE, "num_hidden_layers": 2})), place / "deep")
    saved(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE)), place / "llama")
    saved(tf.BertModel(tf.BertConfig(**SIZE)), place / "headless")
    return place


@pytest.mark.parametrize("folder", ["8", "1", "part"])
def test_the_base_is_known_by_its_weights(folders, folder):
    assert check_base(folders / "base", folders / folder) == ""


@pytest.mark.parametrize("folder", ["8", "1", "part"])
def test_a_stranger_of_the_same_class_is_told(folders, folder):
    said = check_base(folders / "stranger", folders / folder)
    assert "stranger is not what" in said and "do not correlate (cosine" in said


def test_random_codes_come_from_no_base(folders):
    assert "do not correlate" in check_base(folders / "base", folders / "random")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("llama", "it is a LlamaForCausalLM, and .*8 a BertForMaskedLM"),
        ("narrow", r"cannot be the base of .*: \S+ is \[\d+, 32\] there, and \[\d+, 64\] in"),
        ("words", r"word_embeddings.weight is \[200, 64\] there, and \[300, 64\] in"),
        ("headless", "headless is a BertModel and .*8 a BertForMaskedLM"),
    ],
)
def test_another_class_or_shape_is_refused(folders, other, said):
    with pytest.raises(SourceError, match=said):
        check_base(folders / other, folders / "8")


def test_a_layer_more_or_less_is_refused(folders):
    rpq.convert_checkpoint(folders / "deep", folders / "deep-rpq", bits=8, grow=True)
    with pytest.raises(SourceError, match=r"encoder.layer.1\..* is not there"):
        check_base(folders / "base", folders / "deep-rpq")


def test_models_of_factories(tmp_path):
    torch.manual_seed(0)

    def build():
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    for name in ("base", "stranger"):
        save_file(build().state_dict(), tmp_path / f"{name}.safetensors")
    rpq.convert_checkpoint(tmp_path / "base.safetensors", tmp_path / "small", bits=2, factory=build, grow=True)
    assert check_base(tmp_path / "base.safetensors", tmp_path / "small", build) == ""
    assert "do not correlate" in check_base(tmp_path / "stranger.safetensors", tmp_path / "small", build)
