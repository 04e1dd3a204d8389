"""Budgets: the allocation against brute force, sizes on disk, and that sensitivities are what a model really suffers."""

import copy
import itertools
import json
import math
import random
from xml.etree import ElementTree

import pytest
import torch
import transformers as tf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import rpq_convert as rpq
from rpq_convert.planning.allocation import allocate
from rpq_convert.planning.rates import interpolate


def llama(tied=True, seed=0):
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


class Tied(nn.Module):
    def __init__(self, words, width, layers, kernel):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.layers = nn.ModuleList(nn.Linear(width, width * (1 + i % 3)) for i in range(layers))
        self.conv = nn.Conv2d(width, width, kernel)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight


# ---- allocation --------------------------------------------------------------------------------------------------------

options = st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(options, min_size=1, max_size=5), st.floats(0, 1))
def test_allocation_is_brute_force(items, share):
    low, high = (sum(pick(o[0] for o in i) for i in items) for pick in (min, max))
    budget = low + round(share * (high - low))
    best = min(
        sum(i[c][1] for i, c in zip(items, choice))
        for choice in itertools.product(*(range(len(i)) for i in items))
        if sum(i[c][0] for i, c in zip(items, choice)) <= budget
    )
    found = allocate(items, budget)
    assert found.nbytes == sum(i[c][0] for i, c in zip(items, found.choice)) <= budget
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert found.bound <= best + 1e-9
    assert allocate(items, budget) == found
    with pytest.raises(ValueError, match="smallest options"):
        allocate(items, low - 1)


def test_large_allocation_is_near_its_bound():
    draw = random.Random(0)
    items = []
    for _ in range(400):
        weights, harm = 10 ** draw.uniform(3, 6), draw.random()
        items.append([(int(weights * b / 8) + 512, harm * weights * 4**-b) for b in (0.5, 1, 2, 2.7, 3, 4, 5.3, 6, 8)])
    budget = sum(i[3][0] for i in items)
    found = allocate(items, budget)
    assert 0.999 * budget < found.nbytes <= budget
    assert found.loss < 1.001 * found.bound


# ---- sizes -------------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, phases=[Phase.generate])
@given(
    words=st.integers(1000, 30000), width=st.sampled_from([256, 320, 500]), layers=st.integers(4, 10),
    kernel=st.sampled_from([1, 3]), share=st.floats(0.01, 0.99), dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_a_budget_is_met_within_one_percent(words, width, layers, kernel, share, dtype):
    with torch.device("meta"):
        model = Tied(words, width, layers, kernel).to(getattr(torch, dtype))
    low, high = rpq.plan(model, bits=0.5).file_bytes, rpq.plan(model, bits=8).file_bytes
    target = round(low + share * (high - low))
    plan = rpq.plan(model, target_size=target)
    assert 0.99 * target <= plan.file_bytes <= target
    assert any(j.aliases == ("head.weight",) for j in plan.jobs) or any(s.aliases for s in plan.skips)
    assert rpq.plan(model, target_size=target) == plan
    assert rpq.Plan.from_dict(json.loads(plan.to_json())).sha256 == plan.sha256


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_files_have_the_size(tied, tmp_path):
    model = llama(tied)
    model.save_pretrained(tmp_path / "base")
    report = rpq.convert_checkpoint(tmp_path / "base", tmp_path / "a", target_size="190KB", max_shard_size="64KB")
    written = sum(f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors"))
    assert 0.99 * 190_000 <= written <= 190_000 and written == report.predicted_bytes
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    rpq.convert(model, target_size="190KB", max_shard_size="64KB")
    rpq.save(model, tmp_path / "b", max_shard_size="64KB")  # both ways measure the same and choose the same
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    ids = torch.randint(512, (1, 8))
    assert torch.equal(rpq.load(tmp_path / "a")(input_ids=ids).logits, model(input_ids=ids).logits)


def test_bits_are_an_average():
    with torch.device("meta"):
        model = Tied(2000, 128, 6, 3)
    plan = rpq.plan(model, bits=2.5, storage="bytes")
    weights = sum(math.prod(j.shape) for j in plan.jobs) + sum(
        math.prod(s.shape) for s in plan.skips if s.reason == "kept dense by the budget"
    )
    used = 8 * sum(sum(j.nbytes.values()) for j in plan.jobs)
    assert 0.99 * 2.5 <= used / weights <= 2.5
    assert len({j.spec.bits for j in plan.jobs}) > 1
    assert len({j.spec.bits for j in rpq.plan(model, bits=4, storage="bytes").jobs}) == 1
    assert len({j.spec.bits for j in rpq.plan(model, preset="5bit").jobs}) == 1


def test_largest_error():
    model = llama()
    for limit in (0.2, 0.02, 0.002):
        plan = rpq.plan(model, max_error=limit)
        assert all(j.expected_error <= limit for j in plan.jobs)
        tighter = rpq.plan(model, max_error=limit / 4)
        assert tighter.file_bytes > plan.file_bytes
    kept = rpq.plan(model, max_error=1e-9)
    assert not kept.jobs and any("by the budget" in s.reason for s in kept.skips)


def test_rules_keep_their_word():
    model = llama()
    plan = rpq.plan(
        model, target_size="700KB", rules=[{"match": "type:Embedding", "bits": 4}, {"match": "*.o_proj", "scales": "none"}],
        exclude=["*.0.mlp.*"], sensitivity="shape",
    )  # fmt: skip
    jobs = {j.name: j for j in plan.jobs}
    assert jobs["model.embed_tokens.weight"].spec.bits == 4
    assert jobs["model.embed_tokens.weight"].rule == "rule 'type:Embedding'"
    assert jobs["model.layers.0.self_attn.o_proj.weight"].spec.scales is None
    assert jobs["model.layers.0.self_attn.o_proj.weight"].rule == "the budget"
    assert not any("layers.0.mlp" in n for n in jobs)
    assert any("shapes alone" in w for w in plan.warnings)


def test_budgets_that_cannot_be():
    model = llama()
    for target in (1000, "10GB"):
        with pytest.raises(
            rpq.PlanError, match=r"cannot be met: the weight files can take from ([\d,]+) to ([\d,]+)"
        ) as e:
            rpq.plan(model, target_size=target, sensitivity="shape")
    low, high = (int(s.replace(",", "")) for s in str(e.value).split("from ")[1].removesuffix(" bytes").split(" to "))
    assert rpq.plan(model, target_size=low, sensitivity="shape").file_bytes == low
    assert not rpq.plan(model, target_size=high, sensitivity="shape").jobs
    for wrong, says in (
        ({"bits": 0.51}, "bits per weight cannot be met"),
        ({"max_error": 2}, "between 0 and 1"),
        ({"target_size": "1MB", "bits": 2.5}, "give one of bits, target_size"),
        ({"target_size": "1MB", "bits": 4}, "give one of bits, target_size"),
        ({"target_size": "1MB", "preset": "4bit"}, "give one of preset, target_size"),
        ({"target_size": "1MB", "sensitivity": {"nothing": 1.0}}, "names nothing"),
        ({"target_size": "1MB", "sensitivity": "guess"}, "'shape', 'measured' or a mapping"),
        ({"preset": "4bit", "sensitivity": {"lm_head.weight": 1.0}}, "sensitivity serves"),
    ):
        with pytest.raises(rpq.PlanError, match=says):
            rpq.plan(model, **wrong)


# ---- sensitivities -----------------------------------------------------------------------------------------------------


def test_given_sensitivities_decide():
    with torch.device("meta"):
        model = nn.ModuleDict({n: nn.Linear(256, 256) for n in "abcd"})
    plain = {j.name: j.spec.bits for j in rpq.plan(model, bits=2.9).jobs}
    heavy = rpq.plan(
        model, bits=2.9, sensitivity={"a.weight": 100.0, "b.weight": 1.0, "c.weight": 1.0, "d.weight": 1.0}
    )
    bits = {j.name: j.spec.bits for j in heavy.jobs}
    assert bits["a.weight"] > max(plain.values()) and bits["a.weight"] > 1.5 * bits["b.weight"]
    measured = {n: {8: 1e-4, 2: 0.1} for n in ("b.weight", "c.weight", "d.weight")} | {"a.weight": {8: 1e-2, 2: 10.0}}
    told = {j.name: j.spec.bits for j in rpq.plan(model, bits=2.9, sensitivity=measured).jobs}
    assert told["a.weight"] > 1.5 * told["b.weight"]
    assert interpolate({8: 1e-4, 2: 1e-1}, 5) == pytest.approx(10**-2.5)
    assert interpolate({"4": 0.01}, 3) == pytest.approx(0.04)


def divergence(model, changed, inputs):
    with torch.no_grad():
        p, q = (torch.log_softmax(m(**i).logits.float(), -1).flatten(0, -2) for m in (model, changed) for i in inputs)
        return float(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))


def test_sensitivities_are_divergences():
    """What is measured for a layer is what happens to the output when that layer alone is converted."""
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from a uniform prediction
    data = [{"input_ids": torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))}]
    found = rpq.sensitivities(model, data * 8)
    step = 0.05  # of the way to the converted weight, where the divergence is still quadratic
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj", "model.embed_tokens"):
        changed = copy.deepcopy(model)
        report = rpq.convert(changed, dim=4, include=[name])
        error = next(r.error for r in report.rows if r.error is not None)
        rpq.restore(changed)
        with torch.no_grad():
            for p, q in zip(changed.parameters(), model.parameters()):
                p.copy_(q + step * (p - q))
        measured = divergence(model, changed, data) / (step**2 * error)
        assert measured == pytest.approx(found[f"{name}.weight"], rel=0.4)


def test_measuring_leaves_no_trace():
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(128)
    before = {n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    first = rpq.sensitivities(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.config.use_cache
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] and p.grad is before[n][2]
    torch.set_num_threads(2)
    try:
        assert rpq.sensitivities(model) == first
    finally:
        torch.set_num_threads(1)
    assert all(v > 0 for v in first.values()) and "model.embed_tokens.weight" in first


def test_other_models_are_measured_too():
    torch.manual_seed(0)
    vit = tf.ViTModel(
        tf.ViTConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            image_size=32,
            patch_size=8,
        )
    )
    assert "encoder.layer.0.attention.attention.query.weight" in rpq.sensitivities(vit) or rpq.sensitivities(vit)
    bert = tf.BertModel(
        tf.BertConfig(vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    )
    assert any("query" in n for n in rpq.sensitivities(bert))
    plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    with pytest.raises(rpq.PlanError, match="give data"):
        rpq.sensitivities(plain)
    found = rpq.sensitivities(plain, [torch.randn(32, 64)])
    assert set(found) == {"0.weight", "2.weight"}
    assert "shapes alone" in str(rpq.convert(plain, bits=4.5, storage="bytes").warnings)


def test_measuring_pays():
    """At equal bytes a model whose layers differ in weight keeps more of its output than with one size everywhere."""
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.strong, self.weak = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
            with torch.no_grad():
                self.weak.weight.mul_(0.01)

        def forward(self, x):
            return self.strong(x) + self.weak(x)

    model = Sum()
    x = torch.randn(64, 256)
    wanted = model(x)
    errors = {}
    sizes = rpq.plan(model, bits=2).file_bytes
    for how, kwargs in (
        ("uniform", {"bits": 2}),
        ("mixed", {"target_size": sizes, "sensitivity": rpq.sensitivities(model, [x])}),
    ):
        changed = copy.deepcopy(model)
        rpq.convert(changed, **kwargs)
        errors[how] = float((changed(x) - wanted).detach().square().sum() / wanted.detach().square().sum())
    assert errors["mixed"] < 0.5 * errors["uniform"]


# ---- the curve ---------------------------------------------------------------------------------------------------------


def test_curve():
    model = llama()
    weights = rpq.sensitivities(model)
    curve = rpq.sweep(model, points=8, sensitivity=weights)
    assert not curve.warnings
    sizes, losses = [s.file_bytes for s in curve.mixed], [s.loss for s in curve.mixed]
    assert sizes == sorted(set(sizes)) and losses == sorted(losses, reverse=True)
    for one in curve.uniform:  # one size everywhere is never better than a mix of its bytes
        mixed = rpq.plan(model, target_size=one.file_bytes, sensitivity=weights)
        assert mixed.file_bytes <= one.file_bytes
    assert json.loads(curve.to_json())["mixed"][0]["file_bytes"] == sizes[0]
    assert len(str(curve).splitlines()) == 1 + len(curve.mixed) + len(curve.uniform)
    picture = ElementTree.fromstring(curve.to_svg("<a> & b"))
    (line,) = [e for e in picture.iter() if e.get("class") == "mixed"]
    dots = [e for e in line.iter() if e.tag.endswith("}use")]
    assert len(dots) == len(curve.mixed)
    heights = [float(d.get("y")) for d in dots]
    assert heights == sorted(heights)  # less loss lies lower
    assert "MB, loss" in dots[0][0].text  # what a pointer over it shows
    presets = {s.preset: s.how for s in curve.uniform if s.preset}
    assert presets["4bit"] == "dim 2, 4 bits" and presets["5bit"] == "dim 3 x 2 stages, 5.33 bits"
    assert "(preset 4bit)" in str(curve) and "4bit" in "".join(picture.itertext())
    assert curve._repr_svg_() == curve._repr_svg_() != curve.to_svg("other")
    with pytest.raises(rpq.PlanError, match="no curve"):
        rpq.sweep(nn.LayerNorm(8))
