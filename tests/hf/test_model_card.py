"""The model card: what the hub reads, the picture, and the commands that make the folder again."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
import typer
from huggingface_hub import metadata_load
from PIL import Image
from rpq_convert.cli import group
from transformers import LlamaConfig, LlamaForCausalLM

import rpq_convert as rpq
from rpq_convert.checkpoint.metadata import add_evaluation
from rpq_convert.core.results import Evaluation
from rpq_convert.hf.commands import commands


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return the folder of a small Llama whose weights are pickled."""
    folder = tmp_path_factory.mktemp("cards") / "my-model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def run(*words) -> None:
    with pytest.raises(SystemExit) as ended:
        group([str(w) for w in words])
    assert ended.value.code == 0


def parsed(line: str) -> tuple[str, dict]:
    """Return a command's name and its parameters, as the command line itself reads them."""
    program, name, *words = shlex.split(line)
    assert program == "rpq"
    command = typer.main.get_command(group).commands[name]
    return name, command.make_context(name, words).params


def shown(folder) -> list[str]:
    text = (folder / "README.md").read_text("utf8")
    return re.search(r"## How it was made\n\n```\n(.*?)\n```", text, re.DOTALL)[1].splitlines()


GIVEN = (
    "--bits", "3", "--allow-pickle", "--seed", "7", "--rule", "type:Embedding:bits=8", "--exclude", "*lm_head*", "--calibrate", "self",
    "--samples", "3", "--max-shard-size", "30KB", "--no-check",
)  # fmt: skip


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "small"
    run("convert", base, "--out", folder, *GIVEN, "-q")
    return folder


def test_the_command_has_the_options_of_the_one_that_ran(converted, base):
    (line,) = shown(converted)
    name, params = parsed(line)
    _, asked = parsed(shlex.join(["rpq", "convert", base.name, "--out", "small", *GIVEN, "--check"]))
    differ = {k for k in asked if params[k] != asked[k]}
    assert name == "convert" and not differ - {"check"}, differ
    assert str(base.parent) not in (converted / "README.md").read_text()


def test_recalibration_and_tuning_are_steps_of_their_own(converted, base, tmp_path):
    text = tmp_path / "inputs.safetensors"
    from safetensors.torch import save_file

    save_file({"input_ids": torch.randint(64, (64, 16))}, text)
    dense = tmp_path / "dense"
    LlamaForCausalLM.from_pretrained(base).save_pretrained(dense)
    run("recalibrate", dense, converted, "--data", text, "--out", tmp_path / "fed", "-q")
    run(
        "tune",
        dense,
        tmp_path / "fed",
        "--data",
        text,
        "--out",
        tmp_path / "tuned",
        "--steps",
        1,
        "--rate",
        0.01,
        "--recode",
        0.001,
        "-q",
    )
    lines = shown(tmp_path / "tuned")
    assert [parsed(line)[0] for line in lines] == ["convert", "recalibrate", "tune"]
    first, second, third = (parsed(line)[1] for line in lines)
    assert first["calibrate"] == "self" and first["samples"] == 3 and str(first["out"]) == "small"
    assert str(second["folder"]) == "small" and str(second["out"]) == "fed" == str(third["folder"])
    assert (str(second["data"]), str(third["data"]), str(third["out"])) == (
        "inputs.safetensors",
        "inputs.safetensors",
        "tuned",
    )
    assert (third["steps"], third["rate"], third["recode"]) == (1, 0.01, 0.001)
    assert shown(tmp_path / "fed") == lines[:2]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bits": 4}, "--bits 4"),
        ({"preset": "4bit", "seed": 3}, "--preset 4bit --seed 3"),
        ({"target_size": 50_000_000, "sensitivity": "given"}, "--target-size 50000000"),
        ({"target_size": 50_000_000, "sensitivity": "by shape"}, "--target-size 50000000 --sensitivity shape"),
        ({"bits": 4, "sensitivity": "measured"}, "--bits 4 --sensitivity measured"),
        ({"dim": 8, "stages": 3}, "--rule *:dim=8,stages=3"),
        ({"bits": 2.5, "grow": True, "include": ["a b", "c"]}, "--bits 2.5 --grow --include a b --include c"),
        ({"bits": 4, "asked": {"calibrate": "t.csv", "text_field": "x"}}, "--bits 4 --calibrate t.csv --text-field x"),
        ({"bits": 4, "fit": "random", "codebooks": None, "rules": [{"match": "x", "skip": True}]}, "--bits 4 --fit random --rule x:skip=true"),
    ],
)  # fmt: skip
def test_records_become_flags(options, words):
    asked = options.pop("asked", {})
    (line,) = commands(
        {**options, "source": {"asked": asked, "name": "me/model", "revision": "abc", "factory": "m:f"}}, "out"
    )
    assert " ".join(shlex.split(line)) == f"rpq convert me/model {words} --factory m:f --revision abc --out out"
    parsed(line)


def test_what_cannot_be_made_again_from_a_command_shows_none():
    assert commands({"bits": 4}, "out") == []  # a model in memory
    known = {"source": {"name": "m"}, "bits": 4, "calibration": {"items": 3, "sha256": "0"}}
    assert commands(known, "out") == []  # inputs from Python


def test_the_hub_reads_the_evaluations(converted, tmp_path):
    import shutil

    folder = shutil.copytree(converted, tmp_path / "small")
    metrics = {"perplexity": 32.31, "base_perplexity": 30.087, "top1_agreement": 0.8175, "ratio": float("inf")}
    add_evaluation(folder, "test.txt", Evaluation("language model", metrics, 99))
    add_evaluation(folder, "test.txt", Evaluation("language model", {**metrics, "perplexity": 31.0}, 99))
    data = metadata_load(folder / "README.md")
    (index,) = data["model-index"]
    assert index["name"] and data["tags"][0] == "rpq"
    (result,) = index["results"]
    assert result["task"]["type"] == "text-generation" and result["dataset"]["name"] == "test.txt"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"perplexity": 31.0, "accuracy": 0.8175}
    assert "| test.txt |" in (folder / "README.md").read_text()
    rpq.verify(folder)


def test_the_chart_lies_beside_the_card_and_is_the_same_every_time(converted, base, tmp_path):
    card = (converted / "README.md").read_text()
    assert "](rpq_chart.png)" in card
    with Image.open(converted / "rpq_chart.png") as picture:
        assert picture.format == "PNG" and picture.width > 400
    assert "rpq_chart.png" in rpq.verify(converted)
    assert "rpq_chart.png" in {f.name for f in rpq.audit(converted).files}
    from rpq_convert.report import charts

    assert charts.by_depth(rpq.audit(converted)).png() == (converted / "rpq_chart.png").read_bytes()
    rpq.restore_checkpoint(converted, tmp_path / "dense")
    assert not (tmp_path / "dense/rpq_chart.png").exists()


def test_the_table_has_no_rows_of_biases_and_norms(converted):
    card = (converted / "README.md").read_text()
    assert "one axis: nothing to cut" not in card and "`lm_head.weight`" in card  # excluded, a matrix
    assert re.search(
        r"\d+ dense tensors of one axis or none, such as biases and norms, are not listed: [\d.]+ MB\.", card
    )


def test_a_small_model_has_no_chart(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    rpq.convert(model, bits=4)
    rpq.save(model, tmp_path / "out")
    assert not (tmp_path / "out/rpq_chart.png").exists() and "rpq_chart" not in (tmp_path / "out/README.md").read_text()
