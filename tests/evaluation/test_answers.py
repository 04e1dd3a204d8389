"""Answers side by side: which kind of model says what."""

import copy

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import rpq_convert as rpq
from rpq_convert.core.results import Answer, Evaluation
from rpq_convert.evaluation.answers import batch_answers, nearest_answers, text_answers
from rpq_convert.evaluation.pooling import Pooled, gives_vectors

SIZE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LINES = ["w1 w2 w3 w4 w5", "", "w7 w8 w9", "w1 w2 w3 w5 w4", "w20 w21 w22 w23"]


@pytest.fixture(scope="module")
def words():
    known = {f"w{i}": i for i in range(57)} | {"[UNK]": 57, "[PAD]": 58, "[MASK]": 59}
    plain = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]", model_max_length=32
    )


def pair(model):
    dense = model.eval()
    converted = copy.deepcopy(dense)
    rpq.convert(converted, bits=1, grow=True)
    return dense, converted


def test_a_language_model_goes_on(words):
    torch.manual_seed(0)
    dense, converted = (tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, max_position_embeddings=32)) for _ in range(2))
    found = text_answers(dense, converted, LINES, words, 2)
    assert [a.question for a in found] == ["w1 w2 w3 w4 w5 …", "w7 w8 w9 …"]
    ids = words(LINES[0], return_tensors="pt").input_ids
    for model, said in ((dense, found[0].base), (converted, found[0].converted)):
        made = model.generate(ids, max_new_tokens=27, do_sample=False, pad_token_id=58)[0, 5:]
        assert said == words.decode(made, skip_special_tokens=True) and said
    assert found[0].base != found[0].converted
    assert text_answers(dense, dense, LINES, words, 9)[3] == Answer(
        "w20 w21 w22 w23 …", *[text_answers(dense, dense, LINES[4:], words, 1)[0].base] * 2
    )


def test_an_encoder_decoder_answers_the_whole_line(words):
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=60, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=58
    )
    dense, converted = pair(tf.T5ForConditionalGeneration(config))
    (found,) = text_answers(dense, converted, LINES, words, 1)
    assert found.question.startswith("w1 w2") and isinstance(found.base, str)


def test_a_masked_model_fills_in_and_a_classifier_chooses(words):
    torch.manual_seed(0)
    masked, coded = pair(tf.BertForMaskedLM(tf.BertConfig(**SIZE)))
    (found,) = text_answers(masked, coded, LINES, words, 1)
    assert found.question == "w1 w2 [MASK] w4 w5 (it was 'w3')" and found.base.count(",") == 2
    classes, coded = pair(tf.BertForSequenceClassification(tf.BertConfig(**SIZE, id2label={0: "cat", 1: "dog"})))
    (found, other) = text_answers(classes, coded, LINES, words, 2)
    with torch.no_grad():
        shares = classes(**words(LINES[0], return_tensors="pt")).logits.softmax(-1)[0]
    assert f"cat {shares[0]:.2f}" in found.base and "dog" in found.converted and other.question == "w7 w8 w9"


def test_an_encoder_finds_the_nearest_line(words):
    torch.manual_seed(0)
    dense, _ = pair(tf.BertModel(tf.BertConfig(**SIZE, initializer_range=0.3)))
    assert gives_vectors(dense, words(LINES[:1], return_tensors="pt"))
    found = nearest_answers(Pooled(dense), Pooled(dense), LINES, words, 2)
    assert found[0].question == LINES[0] and found[0].base.startswith(LINES[3]) and found[0].base == found[0].converted
    with pytest.raises(rpq.EvaluateError, match="at least three lines"):
        nearest_answers(Pooled(dense), Pooled(dense), LINES[:2], words, 2)


def test_tensors_are_answered_by_classes_or_numbers():
    torch.manual_seed(0)
    dense, converted = pair(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)))
    batches = [(torch.randn(3, 32),), (torch.randn(3, 32),)]
    found = batch_answers(dense, converted, batches, 4)
    best = [f"class {int(row.argmax())} " for b in batches for row in dense(*b)]
    assert [a.question for a in found] == [f"sample {i}" for i in (1, 2, 3, 4)]
    assert all(a.base.startswith(b) for a, b in zip(found, best))
    one, coded = pair(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)))
    found = batch_answers(one, coded, batches, 2)
    assert [a.base for a in found] == [f"{float(x):.4g}" for x in one(*batches[0]).detach()[:2, 0]]
    picture, coded = pair(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 3, 3)))
    with pytest.raises(rpq.EvaluateError, match="leave out --samples"):
        batch_answers(picture, coded, [(torch.randn(1, 3, 8, 8),)], 1)


def test_answers_are_shown_short_and_kept_whole():
    found = Evaluation("outputs", {"cosine": 1.0}, 2, answers=(Answer("q", "word " * 100, "b"),))
    assert all(len(line) < 260 for line in str(found).splitlines()) and "1  q" in str(found)
    assert "word " * 100 in found.to_json() and "answers" not in Evaluation("outputs", {"cosine": 1.0}, 2).to_json()
