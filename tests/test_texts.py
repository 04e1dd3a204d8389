"""Texts through the command line: `rpq eval` and `rpq convert --calibrate`, with a real tokenizer."""

import json

import pytest
import torch
import transformers as tf
from rpq_convert.cli import group
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import rpq_convert as rpq

SIZE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "language model": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, max_position_embeddings=100)),
    "outputs": lambda: tf.BertModel(tf.BertConfig(**SIZE, initializer_range=0.3)),
    "encoder-decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def spoken(request, tmp_path_factory):
    """A dense checkpoint with a tokenizer, and a text: (kind, folder, file)."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(folder / "base")
    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i + 2 for i in range(200)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder / "base")
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(f"w{(7 * i + j) % 200}" for j in range(20 + i)) for i in range(40)))
    return request.param, folder / "base", text


def run(*arguments, code=0):
    done = CliRunner().invoke(group, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_calibrate_then_eval(spoken, tmp_path):
    kind, base, text = spoken
    run("convert", base, "--out", tmp_path / "plain", "--bits", 2, "--grow", "-q")
    told = run(
        "convert",
        base,
        "--out",
        tmp_path / "fed",
        "--bits",
        2,
        "--grow",
        "--calibrate",
        text,
        "--samples",
        30,
        "--json",
    )
    report = json.loads(told.stdout)
    assert report["options"]["calibration"]["items"] > 1
    seen = {row["name"]: row["inputs"] for row in report["rows"] if row["decision"] == "rpq"}
    assert sum(n is not None for n in seen.values()) >= len(seen) - 3  # tables that are looked up, a pooler
    if kind == "language model":  # windows no longer than the model's positions
        assert set(filter(None, seen.values())) == {15 * 100}
    if kind == "encoder-decoder":
        return
    found = {
        name: json.loads(run("eval", base, tmp_path / name, "--text", text, "--window", 64, "--json").stdout)
        for name in ("plain", "fed")
    }
    assert all(f["kind"] == kind and f["samples"] > 10 for f in found.values())
    metric = {"language model": "kl", "outputs": "cosine"}[kind]
    plain, fed = (f["metrics"][metric] for f in found.values())
    assert fed < plain if metric == "kl" else fed > plain


def test_calibrate_on_its_own_text(spoken, tmp_path):
    kind, base, _ = spoken
    asked = (
        "convert",
        base,
        "--out",
        tmp_path / "own",
        "--bits",
        2,
        "--grow",
        "--calibrate",
        "self",
        "--samples",
        8,
        "--json",
    )
    if kind != "language model":
        assert "no text of its own" in run(*asked, code=4).stderr
        return
    before = torch.random.get_rng_state()
    report = json.loads(run(*asked).stdout)
    assert {row["inputs"] for row in report["rows"] if row["layer"] == "Linear"} == {8 * 128}
    assert torch.equal(torch.random.get_rng_state(), before)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    again = rpq.convert(model, bits=2, grow=True, calibration=lambda m: rpq.own_inputs(m, samples=8))
    assert again.options["calibration"] == report["options"]["calibration"]


def test_what_cannot_be_calibrated_is_told(spoken, tmp_path):
    _, base, text = spoken
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    asked = ("convert", base, "--out", tmp_path / "out", "--bits", 2, "--grow")
    assert "empty" in run(*asked, "--calibrate", empty, code=4).stderr
    assert "no.txt" in run(*asked, "--calibrate", tmp_path / "no.txt", code=4).stderr
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)))
    assert "binary.txt" in run(*asked, "--calibrate", binary, code=4).stderr
    run("eval", base, "no", "--text", text, code=4)
    assert not (tmp_path / "out").exists()


def test_tune(spoken, tmp_path):
    kind, base, text = spoken
    if kind == "encoder-decoder":
        return
    run("convert", base, "--out", tmp_path / "small", "--bits", 1, "--grow", "-q")
    asked = ("tune", base, tmp_path / "small", "--text", text, "--window", 40, "--steps", 8, "--out")
    found = json.loads(run(*asked, tmp_path / "tuned", "--json").stdout)
    assert found["after"] <= found["before"] and found["history"][0] == [0, found["before"]]
    run("verify", tmp_path / "tuned")
    assert (tmp_path / "tuned" / "tokenizer.json").is_file() and not list(tmp_path.glob("*.tuning*"))
    old, new = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("small", "tuned"))
    assert old == new
    assert "exists" in run(*asked, tmp_path / "tuned", code=4).stderr
