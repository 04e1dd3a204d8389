"""Tuning on small real models: it helps, it never harms, it goes on after a kill, and it touches only what it may."""

import copy
import math

import architectures
import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.layers.surgery import layers_of
from rpq_convert.training import code_updates
from rpq_convert.training.code_updates import CodeUpdates


@pytest.fixture(scope="module")
def pair():
    """A small Llama, its 2-bit conversion, and tokens."""
    torch.manual_seed(0)
    dense = architectures.ARCHITECTURES["Llama"](64).eval()
    for p in dense.parameters():  # as initialised it predicts nothing; make its layers matter
        p.data.mul_(4 if p.ndim > 1 else 1)
    model = copy.deepcopy(dense)
    rpq.convert(model, bits=2, grow=True)
    g = torch.Generator().manual_seed(1)
    return dense, model, [{"input_ids": torch.randint(0, 256, (4, 24), generator=g)} for _ in range(20)]


def test_tuning_helps_on_text_that_was_not_seen(pair):
    dense, model, data = pair[0], copy.deepcopy(pair[1]), pair[2]
    codes = {k: t.clone() for k, t in model.state_dict().items() if t.dtype == torch.uint8}
    dtypes = {k: t.dtype for k, t in model.state_dict().items()}
    weights = {k: t.clone() for k, t in dense.state_dict().items()}
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    before = rpq.evaluate(dense, model, data[16:]).metrics["relative_error"]
    done = rpq.tune(model, dense, data[:12], held_out=data[12:16], steps=30, every=10, rate=5e-3)
    assert done.after < 0.9 * done.before and done.best > 0 and done.steps == 30
    assert rpq.evaluate(dense, model, data[16:]).metrics["relative_error"] < before
    state = model.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in codes.items())
    assert {k: t.dtype for k, t in state.items()} == dtypes
    assert all(torch.equal(t, dense.state_dict()[k]) for k, t in weights.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asked


def test_codes_that_follow_the_gradient_help_more_than_codebooks_alone(monkeypatch):
    """From random codes: what codebooks can do about them is little, what codes can do is nearly all."""
    monkeypatch.setattr(code_updates, "RATE", 0.05)  # so that offsets grow long in few steps
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 16))
    data = [torch.randn(64, 48) for _ in range(20)]
    start = copy.deepcopy(dense)
    rpq.convert(start, bits=2, grow=True, fit="random")
    found, changed = {}, {}
    for share in (0.0, 0.02):
        model = copy.deepcopy(start)
        before = {k: t.clone() for k, t in model.state_dict().items() if t.dtype == torch.uint8}
        done = rpq.tune(model, dense, data[:16], held_out=data[16:], steps=120, recode=share)
        found[share] = done.after
        changed[share] = sum(int((t != model.state_dict()[k]).sum()) for k, t in before.items())
        again = rpq.tune(model, dense, data[:16], held_out=data[16:], steps=0)
        assert again.before == pytest.approx(done.after, rel=1e-5)  # the codes that are kept are those that were judged
    assert changed[0.0] == 0 < changed[0.02]
    assert found[0.02] < 0.7 * found[0.0], found


@pytest.mark.parametrize("share", [1.0, 0.01])
@pytest.mark.parametrize(
    "layer, options",
    [
        (nn.Linear(24, 30), {"dim": 4}),
        (nn.Linear(24, 30), {"codebooks": 6, "axis": "in"}),
        (nn.Linear(24, 30), {"dim": 7, "stages": 2}),
        (nn.Linear(24, 30), {"dim": 4, "rotation": 8}),
        (nn.Embedding(40, 12), {"dim": 4}),
        (nn.Conv2d(6, 8, 3), {"dim": 4}),
        (nn.ConvTranspose2d(6, 8, 3), {"dim": 4}),
    ],
)
def test_a_code_update_goes_where_the_gradients_lead(layer, options, share):
    """A weight and its offset together say where it should be: an update moves the weight nearer and takes that off the offset."""
    model = nn.Sequential(copy.deepcopy(layer))
    rpq.convert(model, grow=True, **options)
    rpq_weight = next(iter(layers_of(model).values()))
    gone = CodeUpdates(model, share)
    (name,) = gone.weights
    g = torch.Generator().manual_seed(0)
    with gone.expanded() as (weight,):
        assert weight.requires_grad
    assert rpq_weight.caches.expanded is None
    gone.accumulate([torch.randn(rpq_weight.shape, generator=g)], 1.0)
    gone.offsets[name].mul_(50)
    before = rpq_weight.matrix_rows(0, rpq_weight.layout.n)
    offset, codes = gone.offsets[name].clone(), rpq_weight.codes.clone()
    changed = gone.update()
    after = rpq_weight.matrix_rows(0, rpq_weight.layout.n)
    assert 0 < changed <= max(1, math.ceil(share * codes.numel()))
    assert int((codes != rpq_weight.codes).sum()) == changed
    torch.testing.assert_close(after + gone.offsets[name], before + offset, rtol=1e-5, atol=1e-5)
    scale = 1.0 if (found := rpq_weight.scale_matrix()) is None else found  # nearer is judged among codewords
    assert (gone.offsets[name] / scale).norm() < (offset / scale).norm()


def test_a_share_of_codes_is_a_share(pair):
    with pytest.raises(rpq.TuneError, match="between 0 and 1"):
        rpq.tune(copy.deepcopy(pair[1]), pair[0], pair[2], recode=5)


def test_what_is_kept_is_what_was_judged(pair, tmp_path):
    dense, model, data = pair[0], copy.deepcopy(pair[1]), pair[2]
    done = rpq.tune(model, dense, data[:8], held_out=data[8:10], steps=12, every=4)
    rpq.save(model, tmp_path / "out")
    loaded = rpq.load(tmp_path / "out")
    again = rpq.tune(loaded, dense, data[:8], held_out=data[8:10], steps=0)
    assert again.before == pytest.approx(done.after, rel=1e-6)


def test_steps_that_harm_are_not_kept(pair):
    dense, model, data = pair[0], copy.deepcopy(pair[1]), pair[2]
    before = {k: t.clone() for k, t in model.state_dict().items()}
    done = rpq.tune(model, dense, data[:8], steps=6, every=1, rate=30.0, patience=3)
    assert done.best == 0 and done.after == done.before and done.steps == 3
    assert rpq.tune(model, dense, data[:8], steps=750, rate=30.0, patience=1).steps == 60  # judged 25 times at most
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in before.items())


def test_where_steps_help_no_more_shorter_ones_do(pair):
    """A rate that is far too large stands still; a quarter of it goes on from the best step, and tuning ends at its plateau."""
    dense, model, data = pair[0], copy.deepcopy(pair[1]), pair[2]
    done = rpq.tune(model, dense, data[:8], held_out=data[8:10], steps=400, every=5, rate=0.05, patience=3)
    losses = [loss for _, loss in done.history]
    stuck = min(losses[:5])  # patience is out at the fourth evaluation
    assert min(losses[1:5]) == losses[1] and done.best > 20 and done.after < 0.95 * stuck
    assert done.steps == done.best + 15 < 400


def test_steps_that_are_too_long_become_shorter(pair):
    dense, model, data = pair[0], copy.deepcopy(pair[1]), pair[2]
    done = rpq.tune(model, dense, data[:8], steps=32, every=4, rate=2.0, patience=8)
    (_, before), (_, first), *_ = done.history
    assert first > before > done.after


@pytest.mark.parametrize("recode, rate", [(0.0, 2e-3), (0.01, 2e-3), (0.01, 2.0)])
def test_a_killed_run_goes_on_to_the_same_bits(pair, tmp_path, recode, rate, monkeypatch):
    monkeypatch.setattr(code_updates, "RATE", 0.1)
    dense, data = pair[0], pair[2][:10]
    whole, parts = copy.deepcopy(pair[1]), copy.deepcopy(pair[1])
    file = tmp_path / "tune.safetensors"
    settings = {"steps": 9, "every": 3, "seed": 5, "recode": recode, "rate": rate}
    expected = rpq.tune(whole, dense, data, **settings)

    def kill(step, loss):
        if step == 8:
            raise KeyboardInterrupt

    before = {k: t.clone() for k, t in parts.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        rpq.tune(parts, dense, data, **settings, checkpoint=file, progress=kill)
    assert file.is_file()
    parts = copy.deepcopy(pair[1])
    assert all(torch.equal(t, parts.state_dict()[k]) for k, t in before.items() if t.dtype == torch.uint8)
    steps = []
    with pytest.raises(rpq.TuneError, match="another run"):
        rpq.tune(parts, dense, data, **{**settings, "seed": 6}, checkpoint=file)
    done = rpq.tune(parts, dense, data, **settings, checkpoint=file, progress=lambda step, loss: steps.append(step))
    assert steps == [7, 8, 9] and done == expected and not file.exists()
    assert all(torch.equal(t, parts.state_dict()[k]) for k, t in whole.state_dict().items())


def test_an_interrupted_run_leaves_a_whole_model(pair):
    dense, model, data = pair[0], copy.deepcopy(pair[1]), pair[2]

    def kill(step, loss):
        raise KeyboardInterrupt

    dtypes = {k: t.dtype for k, t in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        rpq.tune(model, dense, data, steps=5, progress=kill)
    assert {k: t.dtype for k, t in model.state_dict().items()} == dtypes
    assert all(torch.isfinite(t).all() for t in model.state_dict().values() if t.is_floating_point())


def test_any_module_any_loss_and_tied_weights():
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 10)
    ).train()
    model = copy.deepcopy(dense)
    rpq.convert(model, bits=1, grow=True)
    data = [torch.randn(16, 3, 8, 8) for _ in range(10)]
    done = rpq.tune(model, dense, data, steps=30, every=10)
    assert done.after < done.before and model.training and dense.training
    own = rpq.tune(model, dense, data, steps=10, every=5, loss=lambda a, b: (a - b).abs().mean())
    assert own.after <= own.before

    tied = architectures.ARCHITECTURES["GPT-2"](64).eval()
    small = copy.deepcopy(tied)
    rpq.convert(small, bits=1, grow=True)
    ids = [{"input_ids": torch.randint(0, 256, (2, 16))} for _ in range(4)]
    done = rpq.tune(small, tied, ids, steps=4, every=2)
    assert done.after <= done.before and small.lm_head.weight_rpq is small.transformer.wte.weight_rpq


def test_half_precision_is_tuned_under_autocast(pair):
    dense, model, data = copy.deepcopy(pair[0]).bfloat16(), copy.deepcopy(pair[0]).bfloat16(), pair[2]
    rpq.convert(model, bits=2, grow=True)
    done = rpq.tune(model, dense, data[:8], steps=10, every=5, autocast=torch.bfloat16)
    assert done.after <= done.before
    assert model.model.norm.weight.dtype == torch.bfloat16 and model(**data[0]).logits.dtype == torch.bfloat16


def test_what_cannot_be_tuned_is_refused(pair):
    dense, model, data = pair
    with pytest.raises(rpq.TuneError, match="no RPQ layer"):
        rpq.tune(copy.deepcopy(dense), dense, data)
    with pytest.raises(rpq.TuneError, match="too little data"):
        rpq.tune(model, dense, data[:1])
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(rpq.TuneError, match="as it came"):
        rpq.tune(broken, dense, data)


def test_blocks_are_tuned_one_after_another(monkeypatch):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(3)]
    base = nn.Sequential(nn.Linear(16, 64), nn.Sequential(*blocks), nn.Linear(64, 8)).eval()
    model = copy.deepcopy(base)
    rpq.convert(model, bits=1, grow=True)
    data = [torch.randn(64, 16) for _ in range(20)]
    held = [torch.randn(256, 16)]
    before = rpq.evaluate(base, model, held).metrics["relative_error"]
    done = rpq.tune_blocks(model, base, data, steps=40, every=10)
    assert set(done) == {"0", "1", "2"}  # the outermost chain
    assert done["1"].after < done["1"].before and all(d.after <= d.before for d in done.values())
    assert rpq.evaluate(base, model, held).metrics["relative_error"] < before
    before = {k: t.clone() for k, t in model.state_dict().items() if t.dtype == torch.uint8}
    monkeypatch.setattr(code_updates, "RATE", 0.1)
    done = rpq.tune_blocks(model, base, data, steps=40, every=10, recode=0.02)
    changed = {k.partition(".")[0] for k, t in before.items() if not torch.equal(t, model.state_dict()[k])}
    assert "1" in changed <= {path for path, d in done.items() if d.best}
    with pytest.raises(rpq.TuneError, match="no chain"):
        rpq.tune_blocks(model[0], base[0], data)


def test_recomputing_changes_memory_not_bits():
    torch.manual_seed(0)
    base = architectures.ARCHITECTURES["Llama"](64).eval()
    data = [{"input_ids": torch.randint(64, (2, 16))} for _ in range(6)]
    states, calls = [], []
    for recompute in (False, True):
        model = copy.deepcopy(base)
        rpq.convert(model, bits=2, grow=True)
        inner = model.model.layers[1].mlp
        handle = inner.register_forward_pre_hook(lambda *_: calls.append(1))
        rpq.tune(model, base, data, steps=3, every=3, recompute=recompute)
        handle.remove()
        states.append((model.state_dict(), len(calls)))
        calls.clear()
    (plain, once), (again, twice) = states
    assert all(torch.equal(v, again[k]) for k, v in plain.items())
    assert twice == once + 3 and "forward" not in model.model.layers[1].__dict__  # one more run in each backward pass
