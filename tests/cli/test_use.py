"""Commands that run a converted model: answers side by side, tasks, a talk."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as tf
from rpq_convert.cli import group
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.inputs.files import tokenizer_of
from rpq_convert.integrations.chat import Talker

SIZE = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def run(*args, code=0, typed=None):
    done = CliRunner().invoke(group, [str(a) for a in args], input=typed, env={"NO_COLOR": "1"})
    assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A language model with a chat template, its conversion, a stranger of its class, another class, and a text."""
    place = tmp_path_factory.mktemp("use")
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(58)} | {"[UNK]": 58, "[PAD]": 59}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = tf.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]")
    words.chat_template = TEMPLATE
    torch.manual_seed(0)
    for name in ("base", "stranger"):
        tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, max_position_embeddings=64)).save_pretrained(place / name)
        words.save_pretrained(place / name)
    tf.BertModel(tf.BertConfig(**SIZE)).save_pretrained(place / "bert")
    rpq.convert_checkpoint(place / "base", place / "small", bits=4, grow=True)
    rpq.convert_checkpoint(place / "bert", place / "encoder", bits=8, grow=True)
    (place / "text.txt").write_text("\n".join(" ".join(f"w{(i * j) % 58}" for j in range(1, 9)) for i in range(1, 20)))
    return place


def test_eval_shows_answers_and_keeps_the_layers(place):
    asked = ("eval", place / "base", place / "small", "--text", place / "text.txt", "--limit", 2, "--window", 32)
    shown = run(*asked, "--samples", 2, "--layers", "--save", "-q")
    assert shown.stderr == ""  # no bars of libraries
    assert "perplexity" in shown.stdout and "\n2  w2 w4" in shown.stdout and shown.stdout.count("   converted  w") == 2
    found = json.loads(run(*asked, "--samples", 3, "--json", "-q").stdout)
    assert [set(a) for a in found["answers"]] == [{"question", "base", "converted"}] * 3
    assert (
        json.loads(run(*asked[:-4], "--windows", 2, "--window", 32, "--json", "-q").stdout)["metrics"]
        == found["metrics"]
    )
    report = rpq.audit(place / "small")
    (kept,) = report.evaluations
    assert set(kept["layers"]) == {r.name for r in report.rows if r.decision == "rpq"}
    assert "largest output errors: " in " ".join(str(report).split())
    run("verify", place / "small", "--quick")


def test_eval_refuses_what_is_not_the_base(place):
    on = ("--text", place / "text.txt", "--limit", 1, "-q")
    said = run("eval", place / "bert", place / "small", *on, code=4)
    assert said.stderr.count("\n") == 1 and "cannot be the base" in said.stderr and said.stdout == ""
    doubted = run("eval", place / "stranger", place / "small", *on)
    assert (
        "warning: " in doubted.stderr
        and "do not correlate (cosine" in doubted.stderr
        and "perplexity" in doubted.stdout
    )
    assert "leave out --save" in run("eval", place / "stranger", place / "small", *on, "--save", code=4).stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tasks", "a", "--text", "x"), "give one of --text, --pairs, --inputs and --tasks"),
        (("--include-path", "x", "--text", "x"), "--include-path"),
        (("--tasks", "a", "--samples", 3), "--samples"),
        (("--tasks", "a", "--layers"), "--layers"),
    ],
)
def test_options_of_eval_that_do_nothing(place, options, said):
    shown = run("eval", place / "base", place / "small", *options, code=2)
    assert said in " ".join(shown.stderr.replace("│", " ").split())


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_say_how_lm_eval_is_installed(place):
    assert (
        'pip install "rpq-convert[tasks]"'
        in run("eval", place / "base", place / "small", "--tasks", "a", code=4).stderr
    )


@pytest.mark.slow  # a minute
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'rpq-convert[tasks]'")
def test_tasks_of_lm_eval(place, tmp_path):
    """In a process of its own: lm-eval sets loggers and data sets of its own up."""
    rows = [{"q": f"w{i} w1", "choices": [" w5", " w7"], "answer": i % 2} for i in range(6)]
    (tmp_path / "tiny.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'tiny.jsonl'}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    command = [
        Path(sys.executable).parent / "rpq",
        "eval",
        place / "base",
        place / "small",
        "--include-path",
        tmp_path,
        "-q",
        "--tasks",
    ]
    found = subprocess.run([*command, "tiny", "--json"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    told = json.loads(found.stdout)
    assert set(told["metrics"]) == {"tiny acc", "base_tiny acc"} and told["samples"] == 6 and found.stderr == ""
    wrong = subprocess.run([*command, "nosuch"], capture_output=True, text=True)
    assert wrong.returncode == 4 and wrong.stderr.strip().endswith(
        "lm-eval has no task 'nosuch'; `lm_eval ls tasks` lists them"
    )


def test_a_talk_streams_and_remembers(place):
    model, words = rpq.load(place / "small"), tokenizer_of(place / "small")
    talker = Talker(model, words, max_tokens=6, temperature=0)
    pieces = []
    said = talker.answer("w1 w2", pieces.append)
    made = model.generate(torch.tensor([[1, 2]]), max_new_tokens=6, do_sample=False, pad_token_id=59)[0, 2:]
    assert said == "".join(pieces) == words.decode(made, skip_special_tokens=True) and len(pieces) > 1
    again = talker.answer("w3", pieces.append)
    ids = words(f"w1 w2 {said} w3", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=59)[0, ids.shape[1] :]
    assert again == words.decode(made, skip_special_tokens=True) and len(talker.said) == 4
    talker.forget()
    assert talker.answer("w1 w2", pieces.append) == said
    with pytest.raises(rpq.EvaluateError, match="has 70 tokens, and the model 64 positions; /new"):
        Talker(model, words).answer("w1 " * 70, pieces.append)
    drawn = [Talker(model, words, seed=seed, temperature=2.0).answer("w1", pieces.append) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    words.chat_template = None
    plain = Talker(model, words, max_tokens=6, temperature=0)
    assert plain.answer("w1 w2", pieces.append) == said and not plain.said


def test_chat_reads_lines_until_it_is_ended(place):
    how = ("--max-tokens", 4, "--temperature", 0)
    told = run("chat", place / "small", *how, typed="w1 w2\n/what\n\n/new\nw1 w2\n/quit\nw9\n")
    first, second = told.stdout.splitlines()
    assert first == second and first.startswith("w") and "no command /what; there are /new and /quit" in told.stderr
    both = run("chat", place / "small", "--base", place / "base", *how, "-q", typed="w1 w2\n")
    assert [line.partition(": ")[0] for line in both.stdout.splitlines()] == ["base", "converted"] and both.stderr == ""
    assert f"converted: {first}" in both.stdout
    assert "generates no text" in run("chat", place / "encoder", typed="w1\n", code=4).stderr


def test_a_path_that_is_missing_is_not_asked_of_the_hub(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where a question would fail otherwise
    (tmp_path / "models").mkdir()
    on = ("--text", place / "text.txt")
    for missing in ("./none", tmp_path / "none", "a/b/none", "models/none", "none/"):
        for command in (("verify", missing), ("restore", missing, "out"), ("audit", missing), ("chat", missing)):
            assert "does not exist" in run(*command, code=4).stderr, command
        assert "does not exist" in run("eval", missing, place / "small", *on, code=4).stderr
        assert "does not exist" in run("eval", place / "base", missing, *on, code=4).stderr
        assert "does not exist" in run("plan", missing, code=4).stderr
