"""Entropy-coded weights share their bits by sensitivities that are measured, where that is asked for."""

import pytest
import torch
from rpq_convert.cli import group
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.errors import NothingToRun, TimeLimitReached

WORDS = [{"input_ids": torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes, tie_word_embeddings=True)).eval()


def rates_of(plan):
    return {j.name: j.spec.rate for j in plan.jobs}


def test_measured_where_it_is_asked_for():
    plan = rpq.plan(llama(), bits=4, sensitivity="measured")
    by_shape, given = (
        rpq.plan(llama(), bits=4, sensitivity=s) for s in ("shape", rpq.sensitivities(llama(), storage="rans"))
    )
    assert rates_of(plan) == rates_of(given) != rates_of(by_shape)
    assert [p.options.get("sensitivity") for p in (plan, by_shape, given)] == ["measured", "by shape", "given"]
    assert len(set(rates_of(plan).values())) > 4 and abs(plan.file_bytes - by_shape.file_bytes) < 100
    report = rpq.convert(llama(), bits=4, sensitivity="measured")
    assert report.bytes == rpq.convert(llama(), plan=plan).bytes
    with torch.device("meta"), pytest.raises(NothingToRun, match="leave sensitivity out"):
        rpq.plan(llama(), bits=4, sensitivity="measured")


def test_both_conversions_agree(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    options = {"bits": 4, "sensitivity": "measured", "calibration": WORDS}
    report = rpq.convert(model, **options)
    rpq.save(model, tmp_path / "memory")
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "stream", **options)
    a, b = (rpq.load(tmp_path / name).state_dict() for name in ("memory", "stream"))
    assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    rates = {r.name: r.spec for r in report.rows if r.decision == "rpq"}
    assert len(set(rates.values())) > 4
    equal = rpq.convert(llama(), bits=4, calibration=WORDS, rules="*:bits=4")
    assert {r.spec for r in equal.rows if r.decision == "rpq"}.isdisjoint(rates.values())


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    options = {"bits": 4, "sensitivity": "measured", "calibration": WORDS, "progress": False}
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "whole", **options)
    with pytest.raises(TimeLimitReached):
        rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", **options, time_limit=1e-3)
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", **options)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_calibrated_head_has_no_more_bits_than_layers():
    alone, fed = rpq.convert(llama(), bits=4), rpq.convert(llama(), bits=4, calibration=WORDS)
    rates = [{r.name: r.spec for r in report.rows if r.decision == "rpq"} for report in (alone, fed)]
    assert all("in 4 bits" in spec for spec in rates[1].values())
    assert {n for n, spec in rates[0].items() if "in 4." in spec} == {"model.embed_tokens.weight"}


@pytest.mark.slow
def test_the_command_shares_them_as_its_effort_does(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    for effort, many in (("good", False), ("fast", True)):
        arguments = [
            tmp_path / "dense",
            "--bits",
            4,
            "--effort",
            effort,
            "--out",
            tmp_path / effort,
            "--no-check",
            "-q",
        ]
        assert CliRunner().invoke(group, ["convert", *map(str, arguments)]).exit_code == 0
        found = {r.spec.split("entropy-coded")[1] for r in rpq.audit(tmp_path / effort).rows if r.decision == "rpq"}
        assert (len(found) > 1) is many


def test_a_curve_is_measured_where_that_is_asked_for():
    asked, default, shape = (rpq.sweep(llama(), points=3, sensitivity=s) for s in ("measured", None, "shape"))
    assert asked == default != shape
