"""Outliers: the largest weights of every output beside the codes; layers compute as dense ones with the weight that comes back."""

import copy
import json
import math

import pytest
import torch
from rpq_convert.cli import group
from safetensors.torch import load_file, save_file
from test_rotation import MODELS, every, run
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.layers.surgery import layers_of
from rpq_convert.storage.records import sha256

SHARE = 0.05


def heavy(model):
    """Give some weights of every matrix ten times their size."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(torch.where(torch.rand(p.shape, generator=g) < 0.02, 10.0, 1.0))
    return model


def converted(name, **options):
    torch.manual_seed(0)
    build, inputs, _ = MODELS[name]
    dense = heavy(build().eval())
    model = copy.deepcopy(dense)
    report = rpq.convert(model, **{"bits": 4, "outliers": SHARE, "grow": True, **options})
    return dense, model, inputs(), report


@every
@pytest.mark.parametrize("axis", ["out", "in"])
def test_layers_compute_with_what_comes_back(name, axis):
    dense, model, x, report = converted(name, axis=axis)
    rows = [r for r in report.rows if r.decision == "rpq"]
    assert rows and all(r.outlier_bytes for r in rows)
    found = run(model, x)
    with torch.enable_grad():
        kept = {n: r().detach() for n, r in layers_of(model).items()}
    for row in rows:
        weight = dense.get_parameter(row.name).detach()
        error = float((kept[row.name] - weight).square().sum() / weight.square().sum())
        assert math.isclose(error, row.error, rel_tol=1e-3)
    back = copy.deepcopy(model)
    rpq.restore(back)
    assert all(torch.equal(back.get_parameter(n), w) for n, w in kept.items())
    torch.testing.assert_close(found, run(back, x), rtol=1e-4, atol=1e-4)


def test_the_largest_weights_come_back_as_they_were():
    dense, model, _, _ = converted("Linear")
    spec, weight = layers_of(model)["weight"].spec, dense.weight.detach()
    assert spec.outliers == round(SHARE * 48) == 2
    at = weight.abs().topk(2, 1).indices.sort(1).values
    held = layers_of(model)["weight"]
    assert torch.equal(held.positions.long(), at) and held.positions.dtype == torch.int16
    assert torch.equal(held.outliers, weight.gather(1, at).half())


@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_products_and_gradients_equal_those_of_the_expanded_weight(tokens):
    torch.manual_seed(0)
    model = heavy(nn.Linear(192, 256))
    rpq.convert(model, bits=4, outliers=SHARE)
    model.train()
    held = layers_of(model)["weight"]
    x = torch.randn(tokens, 192, requires_grad=True)
    parts = [x, model.bias, held.codebooks, held.scales, held.outliers]
    up = torch.randn(tokens, 256)
    for found, wanted in zip(
        torch.autograd.grad((model(x) * up).sum(), parts),
        torch.autograd.grad((F.linear(x, held(), model.bias) * up).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), F.linear(x, held(), model.bias), rtol=1e-4, atol=1e-4)
        half = copy.deepcopy(model).eval().bfloat16()
        torch.testing.assert_close(half(x.bfloat16()).float(), model(x), rtol=0.05, atol=0.3)


def test_files_are_as_planned_and_come_back(tmp_path):
    dense, model, x, report = converted("tied")
    plan = rpq.plan(dense, bits=4, outliers=SHARE, grow=True)
    assert "1 outlier a row" in plan.explain("table.weight")
    saved = rpq.save(model, tmp_path / "saved")
    assert saved.weight_file_bytes == saved.predicted_bytes == plan.file_bytes
    rpq.verify(tmp_path / "saved")
    again = rpq.load(tmp_path / "saved", factory=MODELS["tied"][0]).eval()
    assert torch.equal(run(again, x), run(model, x))
    assert "outliers" in str(report) and report.total("outlier_bytes") == 320 * 4


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
def test_a_cast_model_is_saved_as_it_is(cast, tmp_path):
    _, model, x, _ = converted("tied")
    model.to(cast)
    rpq.save(model, tmp_path / "saved")
    rpq.verify(tmp_path / "saved")
    again = rpq.load(tmp_path / "saved", factory=MODELS["tied"][0]).eval()
    assert layers_of(again)["table.weight"].outliers.dtype == cast and torch.equal(run(again, x), run(model, x))


def test_rescaling_reaches_them():
    _, model, *_ = converted("Linear")
    with torch.no_grad():
        before = model.weight.clone()
        model.requires_grad_(False).weight.mul_(0.5)
        assert torch.equal(model.weight.clone(), before / 2)


def test_both_conversions_agree(tmp_path):
    import transformers as tf

    torch.manual_seed(0)
    size = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    base = heavy(tf.LlamaForCausalLM(tf.LlamaConfig(**size, tie_word_embeddings=True)))
    base.save_pretrained(tmp_path / "base")
    asked = [
        "convert",
        tmp_path / "base",
        "--out",
        tmp_path / "out",
        "--bits",
        4,
        "--outliers",
        SHARE,
        "--grow",
        "--effort",
        "fast",
    ]
    done = CliRunner().invoke(group, [*map(str, asked)])
    assert done.exit_code == 0, done.output
    streamed = rpq.load(tmp_path / "out")
    rpq.convert(base, bits=4, outliers=SHARE, grow=True)
    ours, theirs = base.state_dict(), streamed.state_dict()
    assert ours.keys() == theirs.keys() and any(k.endswith("_rpq.outliers") for k in ours)
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items())
    ids = torch.arange(60).view(2, 30)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, streamed(ids).logits)


def test_they_pay_where_weights_are_heavy():
    def error(**options):
        return max(r.error for r in converted("Linear", **options)[3].rows if r.error is not None)

    assert error() < 0.5 * error(outliers=0)
    torch.manual_seed(0)
    dense = heavy(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    data = [torch.randn(64, 64) for _ in range(4)]
    errors = []
    for share in (0, SHARE):
        model = copy.deepcopy(dense)
        rpq.convert(model, bits=2, outliers=share, grow=True, calibration=data)
        with torch.no_grad():
            errors.append(float((model(data[0]) - dense(data[0])).norm()))
    assert errors[1] < errors[0]


def test_a_compiler_and_torch_func_get_the_same():
    _, model, x, _ = converted("tied")
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x), rtol=1e-4, atol=1e-4)
    _, linear, x, _ = converted("Linear")
    torch.testing.assert_close(torch.func.vmap(linear)(x), linear(x), rtol=1e-4, atol=1e-4)


def test_tuning_and_codes_that_change_keep_them():
    dense, model, *_ = converted("Linear", bits=2)
    batches = [torch.randn(200, 48, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    before = layers_of(model)["weight"].outliers.detach().clone()
    done = rpq.tune(model, dense, batches, steps=40, recode=0.01, loss="mse")
    assert done.after < done.before and not torch.equal(layers_of(model)["weight"].outliers.float(), before.float())


def test_where_there_are_none():
    model = nn.Linear(64, 64)
    rpq.convert(model, bits=4, outliers=SHARE, fit="random", grow=True)
    assert layers_of(model)["weight"].spec.outliers == 0
    for share in (0.2, -1, "many"):
        with pytest.raises(rpq.PlanError, match=r"share of the weights from 0 to 0\.1"):
            rpq.plan(nn.Linear(64, 64), bits=4, rules=[{"match": "*", "outliers": share}])
    with pytest.raises(rpq.PlanError, match="rotation spreads outliers"):
        rpq.plan(nn.Linear(64, 64), bits=4, outliers=SHARE, rotation=64)
    big = nn.Linear(64, 64)
    big.weight.data[0, 0] = 1e5
    with pytest.raises(rpq.EncodeError, match="overflows float16"):
        rpq.convert(big, bits=4, outliers=SHARE, grow=True)


def test_positions_that_no_input_has_are_refused(tmp_path):
    _, model, x, _ = converted("tied")
    held = layers_of(model)["table.weight"]
    rpq.save(model, tmp_path / "saved")
    held.positions.plain[5, 0] = 24
    with pytest.raises((RuntimeError, IndexError)), torch.no_grad():
        model(x)
    wrong = "positions names inputs 0 to 24, of 24"
    with pytest.raises(rpq.SourceError, match=wrong):
        rpq.save(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    tensors["table.weight_rpq.positions"][5, 0] = 24
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((tmp_path / "saved" / "rpq_manifest.json").read_text())
    manifest["files"][file.name]["sha256"] = sha256(file)
    (tmp_path / "saved" / "rpq_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(rpq.VerifyError, match=wrong):
        rpq.verify(tmp_path / "saved")


def test_budgets_count_them():
    dense = heavy(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)))
    plan = rpq.plan(dense, target_size="70KB", outliers=0.02, sensitivity="shape")
    assert 69_300 <= plan.file_bytes <= 70_000 and all(job.spec.outliers == 5 for job in plan.jobs)
