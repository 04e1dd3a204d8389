"""Data as people have it: every kind becomes inputs, or is refused in one line that names the argument and the item."""

import copy

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rpq_convert as rpq
from rpq_convert.errors import CalibrationError
from rpq_convert.inputs.items import prepare

WORDS = [
    "[PAD]",
    "[UNK]",
    "<eos>",
    "user",
    "assistant",
    ":",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "went",
    "home",
    "again",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on a mat"}]
SIZES = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model and an encoder in folders with a tokenizer."""
    place = tmp_path_factory.mktemp("models")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, max_position_embeddings=16)).save_pretrained(place / "llama")
    tf.BertModel(tf.BertConfig(**SIZES, max_position_embeddings=16)).save_pretrained(place / "bert")
    for name in ("llama", "bert"):
        tokenizer.save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def llama(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder / "llama").eval()


@pytest.fixture(scope="module")
def bert(folder):
    return tf.AutoModel.from_pretrained(folder / "bert").eval()


IDS = torch.tensor([6, 7, 8])
TEXT = "the cat sat"
KINDS = {
    "a text": (TEXT, [[6, 7, 8]]),
    "texts": ([TEXT, "on a mat"], [[6, 7, 8], [9, 10, 11]]),
    "a generator of texts": ((t for t in [TEXT]), [[6, 7, 8]]),
    "a batch of texts": ([[TEXT, "on a"]], [[[6, 7, 8], [9, 10, 2]]]),
    "pairs": ([(TEXT, "on a mat"), (TEXT, "on", 1.0)], [[6, 7, 8, 9, 10, 11], [6, 7, 8, 9]]),
    "texts with labels": ([(TEXT, 1)], [[6, 7, 8]]),
    "a loader of texts with labels": (DataLoader([(TEXT, 1), ("on a mat", 0)], batch_size=2), [[[6, 7, 8], [9, 10, 11]]]),
    "a loader of pairs": (DataLoader([(TEXT, "on", 1), ("on a mat", "a", 0)], batch_size=2), [[[6, 7, 8, 9], [9, 10, 11, 10]]]),
    "rows of pairs": ([{"query": TEXT, "passage": "on a", "score": 1.0}], [[6, 7, 8, 9, 10]]),
    "a data set": (Dataset.from_dict({"text": [TEXT, "on a"], "label": [0, 1]}), [[6, 7, 8], [9, 10]]),
    "a data set of ids": (Dataset.from_dict({"input_ids": [[6, 7], [8, 9]]}).with_format("torch"), [[6, 7], [8, 9]]),
    "a data set as a stream": (Dataset.from_dict({"text": [TEXT]}).to_iterable_dataset(), [[6, 7, 8]]),
    "some rows of a data set": (Dataset.from_dict({"text": [TEXT, "on a mat"], "label": [0, 1]})[:2], [[[6, 7, 8], [9, 10, 11]]]),
    "a chat": (CHAT, [[3, 5, 6, 7, 8, 4, 5, 9, 10, 11]]),
    "chats": ([CHAT, CHAT[:1]], [[3, 5, 6, 7, 8, 4, 5, 9, 10, 11], [3, 5, 6, 7, 8]]),
    "rows of chats": ([{"messages": CHAT, "id": 7}], [[3, 5, 6, 7, 8, 4, 5, 9, 10, 11]]),
    "rows of texts": ([{"text": TEXT, "label": 1}], [[6, 7, 8]]),
    "rows of prompts": ([{"prompt": "the cat ", "completion": "sat"}], [[6, 7, 8]]),
    "rows of chat prompts": ([{"prompt": CHAT[:1], "completion": CHAT[1:]}], [[3, 5, 6, 7, 8, 4, 5, 9, 10, 11]]),
    "one tensor of ids": (IDS, [[6, 7, 8]]),
    "ids": ([IDS, IDS[:2]], [[6, 7, 8], [6, 7]]),
    "a list of numbers": ([6, 7, 8], [[6, 7, 8]]),
    "lists of numbers": ([[6, 7, 8], [9, 10]], [[6, 7, 8], [9, 10]]),
    "arrays": ([np.array([6, 7, 8])], [[6, 7, 8]]),
    "a dict": ({"input_ids": IDS[None]}, [[6, 7, 8]]),
    "a row of lists": ([{"input_ids": [6, 7, 8], "attention_mask": [1, 1, 1], "idx": 3}], [[6, 7, 8]]),
    "batches": (DataLoader(TensorDataset(IDS[None].expand(2, 3)), batch_size=2), [[[6, 7, 8], [6, 7, 8]]]),
    "a function of the model": (lambda model: [IDS], [[6, 7, 8]]),
}  # fmt: skip


def ids_of(item):
    item = item["input_ids"] if hasattr(item, "keys") else item[0] if isinstance(item, (tuple, list)) else item
    assert isinstance(item, torch.Tensor) and item.ndim == 2
    return item.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_data_becomes_token_ids(name, llama):
    data, wanted = KINDS[name]
    found = prepare(list(data) if name == "a generator of texts" else data, llama, "calibration")
    assert [ids_of(item) for item in found] == [w if isinstance(w[0], list) else [w] for w in wanted]
    with torch.no_grad():
        for item in found:
            llama(**item) if hasattr(item, "keys") else llama(*item) if isinstance(item, (tuple, list)) else llama(item)


def test_a_batch_of_a_tokenizer_and_what_it_holds_besides(bert, folder):
    words = tf.AutoTokenizer.from_pretrained(folder / "bert")
    (found,) = prepare(words(TEXT, return_tensors="pt"), bert, "calibration")
    assert type(found) is dict and found["input_ids"].tolist() == [[6, 7, 8]]
    (found,) = prepare([{**words(TEXT), "text": TEXT, "special_tokens_mask": [0, 0, 0]}], bert, "calibration")
    assert found["input_ids"].tolist() == [[6, 7, 8]] and set(found) <= {
        "input_ids",
        "attention_mask",
        "token_type_ids",
    }


def test_a_tokenizer_that_is_given_is_the_one(folder):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    words = tf.AutoTokenizer.from_pretrained(folder / "llama")
    assert prepare([TEXT], model, "data", tokenizer=words)[0]["input_ids"].tolist() == [[6, 7, 8]]
    with pytest.raises(CalibrationError, match=r"data\[0\] needs a tokenizer .* give tokenizer="):
        prepare([TEXT], model, "data")


def test_arrays_take_the_dtype_of_a_module():
    (found,) = prepare(np.ones((2, 3)), nn.Linear(3, 2), "data")
    assert found.dtype == torch.float32 and found.shape == (2, 3)
    (found,) = prepare([[1.0, 2.0, 3.0]], nn.Linear(3, 2), "data")
    assert found.tolist() == [1, 2, 3]
    (found,) = prepare([(np.ones((1, 3)), torch.ones(2))], nn.Bilinear(3, 2, 1), "data")
    assert [type(x) for x in found] == [torch.Tensor] * 2


def test_labels_of_a_loader_are_no_arguments():
    loader = DataLoader(TensorDataset(torch.ones(4, 3), torch.zeros(4)), batch_size=2)
    model = nn.Linear(3, 2)
    assert rpq.convert(model, bits=8, grow=True, calibration=loader).rows[0].inputs == 4


def test_pictures_go_through_a_processor(tmp_path):
    from PIL import Image

    config = tf.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    tf.ViTModel(config).save_pretrained(tmp_path)
    tf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model = tf.AutoModel.from_pretrained(tmp_path).eval()
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    for data in (picture, [picture], [[picture, picture]], [{"image": picture, "label": 2}]):
        (found,) = prepare(data, model, "data")
        assert set(found) == {"pixel_values"} and found["pixel_values"].shape[1:] == (3, 16, 16)


WRONG = {
    "an id too high": ([IDS, torch.tensor([1, 99])], r"calibration\[1\] holds the id 99; LlamaForCausalLM has entries 0 to 19"),
    "an id below zero": ([{"input_ids": torch.tensor([[-100, 3]])}], r"calibration\[0\]\['input_ids'\] holds the id -100"),
    "ids that are floating": ([torch.ones(1, 4)], r"calibration\[0\] is float32; token ids are int64"),
    "another name": ([{"inputs": IDS}], r"calibration\[0\]: LlamaForCausalLM takes no argument 'inputs'; it takes input_ids, "),
    "nothing": ([], "calibration data is empty"),
    "an empty text": ([TEXT, " "], r"calibration\[1\] is an empty text"),
    "no tokens": ([torch.empty(1, 0, dtype=torch.int64)], r"calibration\[0\] is empty: \[1, 0\]"),
    "an object": ([object()], r"calibration\[0\] is object; give a tensor"),
    "no data": (7, "calibration: int is no data; give a list of inputs, texts or chats"),
    "all splits": (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), r"calibration holds the splits train; choose one: data\['train'\]"),
    "NaN": ([{"inputs_embeds": torch.full((1, 2, 32), torch.nan)}], r"calibration\[0\]\['inputs_embeds'\] holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_an_input_is_said_in_one_line(name, llama):
    data, said = WRONG[name]
    model = copy.deepcopy(llama)
    with pytest.raises(CalibrationError, match=said) as caught:
        rpq.convert(model, bits=4, grow=True, calibration=data)
    assert "\n" not in str(caught.value) and type(model.lm_head) is nn.Linear


def test_more_tokens_than_positions(bert):
    with pytest.raises(CalibrationError, match=r"data\[0\] has 17 tokens; BertModel takes 16"):
        prepare([torch.ones(17, dtype=torch.int64)], bert, "data")


def test_every_entry_takes_the_same_data(llama):
    model = copy.deepcopy(llama)
    assert rpq.convert(model, bits=4, grow=True, calibration=[TEXT, "on a mat"]).rows[1].inputs == 6
    assert rpq.evaluate(llama, model, [TEXT, CHAT]).samples == 3 + 10
    assert rpq.recalibrate(model, llama, [TEXT]).rows[1].inputs == 3
    assert rpq.tune(model, llama, [TEXT, CHAT], steps=1).steps == 1
    assert rpq.sensitivities(llama, [CHAT], grow=True)
    assert rpq.layer_errors(llama, model, [TEXT])


def test_a_dual_encoder_takes_pictures_with_texts():
    """transformers finds no embeddings in CLIP: its config says how many tokens it knows."""
    text = {"vocab_size": 50, "max_position_embeddings": 16}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.CLIPConfig(
        text_config=size | text, vision_config=size | {"image_size": 16, "patch_size": 8}, projection_dim=16
    )
    model = tf.CLIPModel(config).eval()
    rows = [{"input_ids": torch.randint(50, (1, 8)), "pixel_values": torch.randn(1, 3, 16, 16)} for _ in range(2)]
    assert len(prepare(rows, model, "data")) == 2
    with pytest.raises(
        CalibrationError, match=r"data\[0\]\['input_ids'\] holds the id 50; CLIPModel has entries 0 to 49"
    ):
        prepare([rows[0] | {"input_ids": torch.full((1, 8), 50)}], model, "data")
    with pytest.raises(CalibrationError, match="synthetic inputs of CLIPModel cannot be made"):
        prepare("self", model, "data")


def test_self_means_synthetic_inputs_as_on_the_command_line(llama):
    made, wanted = prepare("self", llama, "data"), rpq.own_inputs(llama)
    assert len(made) == len(wanted) and all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, wanted))
