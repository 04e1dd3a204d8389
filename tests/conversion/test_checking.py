"""The check after a conversion to a folder: what it finds is kept, what prevents it is said, and weights stay as they are."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.checkpoint.described import evaluations_of
from rpq_convert.checkpoint.opening import open_checkpoint
from rpq_convert.conversion import checking
from rpq_convert.conversion.checking import check_folder, judged_on
from rpq_convert.core.results import Evaluation
from rpq_convert.evaluation.check import quick_check
from rpq_convert.storage.options import SourceOptions

RENEWED = {"rpq_report.json", "README.md", "rpq_manifest.json"}


def net():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval()


@pytest.fixture
def made(tmp_path):
    """A checkpoint, what was converted from it, and data."""
    torch.manual_seed(0)
    save_file(net().state_dict(), tmp_path / "net.safetensors")
    save_file({"input": torch.randn(200, 64)}, tmp_path / "data.safetensors")
    opened = open_checkpoint(tmp_path / "net.safetensors", SourceOptions(factory=net))
    report = rpq.convert_checkpoint(tmp_path / "net.safetensors", tmp_path / "out", bits=4, factory=net)
    return opened, tmp_path / "out", report


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in RENEWED}


def test_what_is_found_is_kept_and_weights_stay(made, tmp_path):
    opened, folder, report = made
    before, told = contents(folder), []
    data = str(tmp_path / "data.safetensors")
    judged, why = check_folder(
        opened, folder, report, seconds=60, judge=lambda: judged_on(opened, data), told=told.append
    )
    assert why == "" and told == ["data.safetensors"] and contents(folder) == before
    (entry,) = judged.evaluations
    assert entry["on"] == "data.safetensors" and 0.9 < entry["metrics"]["cosine"] <= 1
    assert rpq.audit(folder).evaluations == judged.evaluations
    assert "the first choice is the base's" in (folder / "README.md").read_text()
    assert rpq.verify(folder)


@pytest.mark.parametrize(
    ("samples", "on"), [(None, "data.safetensors (held out)"), (200, "data.safetensors (seen by the fit)")]
)
def test_what_calibration_has_left_over_is_judged_on(made, tmp_path, samples, on):
    found, measure = judged_on(made[0], seen=str(tmp_path / "data.safetensors"), samples=samples)
    assert found == on
    assert len(measure.keywords["data"][0]["input"]) == 16


def test_pairs_are_told_from_texts(made, tmp_path):
    (tmp_path / "pairs.csv").write_text("a b,a c,0.5\nd,e,0.1\n")
    name, measure = judged_on(made[0], str(tmp_path / "pairs.csv"))
    assert name == "pairs.csv" and not isinstance(measure, partial)


def raises(error, *_, **__):
    raise error


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (None, "synthetic inputs of Sequential cannot be made"),
        (lambda: ("x", partial(raises, RuntimeError("boom\nmore"))), "boom"),
        (lambda: ("x", partial(raises, KeyboardInterrupt())), "interrupted"),
        (lambda: raises(ValueError("no tokenizer")), "no tokenizer"),
    ],
)
def test_what_prevents_a_check_is_said_and_the_folder_stays(made, judge, says):
    opened, folder, report = made
    manifest = (folder / "rpq_manifest.json").read_text()
    same, why = check_folder(opened, folder, report, seconds=60, **({} if judge is None else {"judge": judge}))
    assert same is report and says in why and "\n" not in why
    assert (folder / "rpq_manifest.json").read_text() == manifest and rpq.verify(folder)


def test_no_memory_no_time_and_random_codes_are_said(made, monkeypatch, tmp_path):
    opened, folder, report = made
    assert "took" in check_folder(opened, folder, report, seconds=0)[1]
    random = rpq.convert_checkpoint(tmp_path / "net.safetensors", tmp_path / "r", bits=4, fit="random", factory=net)
    assert check_folder(opened, tmp_path / "r", random, seconds=9)[1] == "codes are random"
    monkeypatch.setattr(checking, "available", lambda: 1000)
    assert "of memory" in check_folder(opened, folder, report, seconds=9)[1]


def test_figures_that_are_not_finite_are_said_in_words(made):
    opened, folder, report = made
    broken = Evaluation("outputs", {"cosine": math.nan, "relative_error": math.inf}, 3)
    judged, _ = check_folder(opened, folder, report, seconds=9, judge=lambda: ("x", lambda a, b, seconds: broken))
    assert "outputs are not finite on x" in str(judged)
    assert (
        json.loads((folder / "rpq_report.json").read_text())["evaluations"][0]["metrics"]["relative_error"] == math.inf
    )
    assert "not finite" in (folder / "README.md").read_text()


def test_a_budget_decides_how_much_is_compared():
    torch.manual_seed(0)
    base = net()
    rpq.convert(model := net(), bits=8)
    data = [torch.randn(4, 64) for _ in range(5)]
    assert quick_check(base, model, data, seconds=60).samples == 20
    assert quick_check(base, model, data, seconds=0).samples == 4
    assert not model.training


def test_a_model_in_memory_is_compared_with_what_it_was():
    torch.manual_seed(0)
    data = [torch.randn(4, 64) for _ in range(5)]
    report = rpq.convert(net(), bits=2, calibration=data[:4], check=data)
    (entry,) = report.evaluations
    assert entry["on"] == "given inputs" and entry["samples"] == 20 and "quality: " in str(report)
    without = rpq.convert(net(), bits=4, check=True)
    assert not without.evaluations and any("not checked: synthetic inputs" in w for w in without.all_warnings)


def test_what_a_check_found_is_saved_while_the_weights_stay(tmp_path):
    torch.manual_seed(0)
    base, data = net().append(nn.BatchNorm1d(net()[-1].out_features)).eval(), [torch.randn(4, 64) for _ in range(4)]

    def saved(model):
        report = rpq.save(model, tmp_path / "out", overwrite=True)
        assert report.evaluations == rpq.audit(tmp_path / "out").evaluations
        assert ("## Quality" in (tmp_path / "out/README.md").read_text()) == bool(report.evaluations)
        return report.evaluations

    report = rpq.convert(model := copy.deepcopy(base), bits=4, grow=True, check=data)
    assert report.evaluations and saved(model) == report.evaluations == evaluations_of(copy.deepcopy(model))
    assert saved(torch.compile(model)) == report.evaluations
    loaded = rpq.load(tmp_path / "out", factory=lambda: copy.deepcopy(base))
    assert evaluations_of(loaded) == evaluations_of(copy.deepcopy(loaded)) == report.evaluations
    assert saved(loaded) == report.evaluations
    changes = {
        "tuned": lambda m: rpq.tune(m, base, data, held_out=data, steps=20, every=10),
        "an update of codes": lambda m: m[0].weight_rpq.codes.plain.view(-1)[:1].add_(1),
        "a norm": lambda m: m[-1].bias.data.add_(1),
        "a statistic": lambda m: m[-1].running_mean.add_(1),
        "a layer restored": lambda m: m.__setitem__(0, rpq.restore(m[0])),
        "in half": lambda m: m.half(),
    }
    for what, change in changes.items():
        change(changed := copy.deepcopy(model))
        assert evaluations_of(changed) == (), what
    assert saved(changed) == ()


def test_transformers_saves_what_a_check_found(tmp_path):
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=64, max_position_embeddings=64, **size))
    report = rpq.convert(model, bits=4, grow=True, check=True)
    model.save_pretrained(tmp_path)
    assert rpq.audit(tmp_path).evaluations == report.evaluations != ()
    assert "on synthetic inputs" in (tmp_path / "README.md").read_text()
    model = BertModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert rpq.audit(tmp_path).evaluations == report.evaluations
    model.embeddings.LayerNorm.bias.data += 1
    model.save_pretrained(tmp_path)
    assert rpq.audit(tmp_path).evaluations == () and "## Quality" not in (tmp_path / "README.md").read_text()


def test_efforts_in_python():
    from transformers import BertConfig, BertModel

    def bert():
        torch.manual_seed(0)
        size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return BertModel(BertConfig(vocab_size=64, max_position_embeddings=64, **size))

    assert rpq.convert(bert(), bits=4, grow=True).output_error is None
    assert rpq.convert(bert(), bits=4, grow=True, effort="good").output_error is not None
    with pytest.raises(rpq.PlanError, match="best tunes against the dense model"):
        rpq.convert(bert(), bits=4, effort="best")
    with pytest.raises(rpq.PlanError, match="effort must be"):
        rpq.convert(bert(), bits=4, effort="hasty")
    with pytest.raises(rpq.CalibrationError, match="synthetic inputs of Sequential"):
        rpq.convert(net(), bits=4, effort="good")
