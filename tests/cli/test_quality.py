"""Effort and verdict on the command line: what is chosen, what it costs, what was lost."""

import json

import pytest
import torch
import transformers as tf
from rpq_convert.cli import group
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import rpq_convert as rpq

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(*args, code=0):
    done = CliRunner().invoke(group, [*map(str, args)], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.exit_code == code, done.output
    return done


def net():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=300, **SIZE))
    for p in model.parameters():  # sure of its words, so that codes can ruin it
        p.data *= 6 if p.ndim > 1 else 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    """What the command writes and says by default, below six bits."""
    out = tmp_path_factory.mktemp("out") / "x"
    return out, run("convert", llama, "--out", out, "--bits", 2, "--grow", "--samples", 8, "--calibrate", "self")


def files(folder):
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.name not in ("rpq_report.json", "README.md", "rpq_manifest.json")
    }


def test_a_verdict_follows_every_conversion_and_weights_stay(llama, made, tmp_path):
    out, done = made
    assert "comparing the result with its base on synthetic inputs, for at most 60 s" in done.stderr
    report = json.loads((out / "rpq_report.json").read_text())
    (found,) = report["evaluations"]
    assert found["on"] == "synthetic inputs" and found["metrics"]["ratio"] > 1
    assert "the base's on synthetic inputs" in " ".join(done.stdout.split())
    assert "the base's on synthetic inputs" in (out / "README.md").read_text()
    run("verify", out)
    how = ("--bits", 2, "--grow", "--samples", 8, "--calibrate", "self", "--no-check", "-q")
    plain = run("convert", llama, "--out", tmp_path / "plain", *how)
    assert "comparing" not in plain.stderr and "quality" not in plain.stdout
    assert files(tmp_path / "plain") == files(out)


def test_below_six_bits_the_default_calibrates_and_says_what_it_costs(tmp_path):
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(vocab_size=300, **{**SIZE, "num_hidden_layers": 1})).save_pretrained(tmp_path / "bert")
    how = ("--grow", "--no-check")
    low = run("convert", tmp_path / "bert", "--out", tmp_path / "low", "--bits", 3, *how)
    assert (
        "effort good: calibrated on synthetic inputs, about" in low.stderr and "--effort fast takes about" in low.stderr
    )
    rows = json.loads(run("audit", tmp_path / "low", "--json").stdout)["rows"]
    assert any(r["output_error"] is not None for r in rows)
    high = run("convert", tmp_path / "bert", "--out", tmp_path / "high", "--bits", 8, *how)
    assert "effort fast: weights alone, about" in high.stderr


@pytest.mark.slow
def test_the_best_effort_calibrates_and_tunes(llama, tmp_path):
    save_file({"input_ids": torch.randint(300, (64, 8))}, tmp_path / "ids.safetensors")
    how = ("--bits", 4, "--effort", "best", "--calibrate", tmp_path / "ids.safetensors", "--grow", "--no-check")
    done = run("convert", llama, "--out", tmp_path / "best", *how)
    assert "effort best: calibrated on" in done.stderr and "and tuned, about" in done.stderr
    tuning = json.loads(run("audit", tmp_path / "best", "--json").stdout)["options"]["tuning"]
    assert tuning["after"] <= tuning["before"]
    run("verify", tmp_path / "best")


def test_what_has_no_synthetic_inputs_takes_weights_alone(tmp_path):
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    asked = ("convert", tmp_path / "net.safetensors", "--factory", f"{__file__}:net", "--bits", 4)
    done = run(*asked, "--out", tmp_path / "out")
    assert (
        "effort fast: weights alone" in done.stderr and "synthetic inputs of Sequential cannot be made" in done.stderr
    )
    assert "not checked: synthetic inputs of Sequential cannot be made" in done.stderr
    for given in (("--calibrate", "self"), ("--effort", "good", "--calibrate", "self")):
        told = run(*asked, "--out", tmp_path / "no", *given, code=4)
        assert "nothing tells what it takes; give inputs of its own as a .safetensors file" in told.stderr
    for command in ("tune", "recalibrate"):
        told = run(command, *asked[1:4], tmp_path / "out", "--data", "self", "--out", tmp_path / "no", code=4)
        assert "synthetic inputs of Sequential cannot be made" in told.stderr
    refused = run(*asked, "--out", tmp_path / "no", "--effort", "good", code=3)
    assert "effort good needs inputs" in refused.stderr and not (tmp_path / "no").exists()


def pictures():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5), torch.nn.Flatten(), torch.nn.Linear(8 * 12 * 12, 10))


def test_a_factorys_model_of_pictures_makes_its_own(tmp_path):
    save_file(pictures().state_dict(), tmp_path / "net.safetensors")
    model = (tmp_path / "net.safetensors", "--factory", f"{__file__}:pictures")
    asked = ("--bits", 4, "--calibrate", "self", "--samples", 8)
    done = run("convert", *model, *asked, "--out", tmp_path / "out")
    assert "synthetic inputs: noise pictures of 1 x 16 x 16" in done.stderr and "on synthetic inputs" in done.stdout
    assert json.loads(run("audit", tmp_path / "out", "--json").stdout)["rows"][0]["output_error"] is not None
    folders = (*model[:1], tmp_path / "out", *model[1:])
    run("recalibrate", *folders, "--data", "self", "--samples", 8, "--out", tmp_path / "fed", "-q")
    run("tune", *folders, "--data", "self", "--samples", 16, "--steps", 2, "--out", tmp_path / "tuned", "-q")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--effort", "fast", "--calibrate", "self"), "effort fast fits to the weights alone"),
        (("--effort", "good", "--fit", "random"), "effort good calibrates"),
        (("--effort", "hasty"), "effort"),
        (("--no-check", "--check-seconds", 5), "would do nothing without a check"),
        (("--no-check", "--check-data", "x.txt"), "would do nothing without a check"),
        (("--check-seconds", 0), "check-seconds"),
        (("--check-data", "missing.txt"), "missing.txt"),
    ],
)
def test_what_contradicts_is_refused(llama, tmp_path, asked, says):
    done = CliRunner().invoke(group, ["convert", str(llama), "--out", str(tmp_path / "no"), *map(str, asked)])
    assert done.exit_code in (2, 3, 4) and says in done.output and not list(tmp_path.iterdir())


def test_presets_say_what_they_keep_and_which_is_the_default():
    text = run("presets").stdout
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "5bit*" in rows and "5.34" in rows["5bit*"] and "* the default" in text
    assert all(word in rows["4bit"] for word in ("7.9x", "1.81x / 1.14x / 1.01x", "0.97 / 0.98", "99 %"))
    assert "5,665x" in rows["2bit"] and "as small in memory as on disk" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("bits", [1, 2, 3, 6, 8, 5.34])
def test_bits_and_the_preset_of_the_same_name_are_the_same(bits):
    preset = f"{bits:.0f}bit" if bits != 5.34 else None
    assert rpq.plan(net(), bits=bits, storage="bytes").jobs == rpq.plan(net(), preset=preset).jobs
