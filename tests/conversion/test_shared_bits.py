"""Entropy-coded weights share their bits by sensitivities, where a model is calibrated or it is asked for."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rpq_convert as rpq
from rpq_convert.errors import NothingToRun, TimeLimitReached
from rpq_convert.planning.rates import rates_of

WORDS = [{"input_ids": torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes, tie_word_embeddings=True)).eval()


class Counts(torch.autograd.Function):
    """An operation that cannot run backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()


class OneWay(torch.nn.Sequential):
    def forward(self, x):
        return Counts.apply(super().forward(x))


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


def test_calibration_measures_and_both_conversions_agree(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    report = rpq.convert(model, bits=4, calibration=WORDS)
    rpq.save(model, tmp_path / "memory")
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "stream", bits=4, calibration=WORDS)
    a, b = (rpq.load(tmp_path / name).state_dict() for name in ("memory", "stream"))
    assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    rates = {r.name: r.spec for r in report.rows if r.decision == "rpq"}
    assert len(set(rates.values())) > 4
    equal = rpq.convert(llama(), bits=4, calibration=WORDS, rules="*:bits=4")
    assert {r.spec for r in equal.rows if r.decision == "rpq"}.isdisjoint(rates.values())


def test_a_calibrated_run_that_was_stopped_goes_on(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    options = {"bits": 4, "calibration": WORDS, "progress": False}
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "whole", **options)
    with pytest.raises(TimeLimitReached):
        rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", **options, time_limit=1e-3)
    rpq.convert_checkpoint(tmp_path / "dense", tmp_path / "out", **options)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_model_that_cannot_run_backward_is_calibrated_all_the_same():
    torch.manual_seed(0)
    model = OneWay(torch.nn.Linear(256, 256), torch.nn.Linear(256, 4096))
    report = rpq.convert(model, bits=4, calibration=[torch.randn(8, 256)])
    assert any("could not be measured" in w for w in report.warnings)
    assert all(r.output_error is not None for r in report.rows if r.decision == "rpq")
