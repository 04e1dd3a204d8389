"""RPQ-pytorch's models by conversion, and its published sizes to the last printed digit."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn
from vit_pytorch import ViT

import rpq_convert as rpq
from rpq_convert import models
from rpq_convert.layers.surgery import layers_of
from rpq_convert.running.meta import parameters_on_meta

COMMON = {"num_classes": 1000, "dropout": 0.1, "emb_dropout": 0.1}
GIANT = {"image_size": 336, "patch_size": 14, "dim": 1280, "depth": 32, "heads": 16, "mlp_dim": 5120, **COMMON}
BASE = {"image_size": 224, "patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072, **COMMON}
SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 128, "depth": 2, "heads": 4, "mlp_dim": 512}
OPT_66B = tf.OPTConfig(
    hidden_size=9216, num_attention_heads=72, num_hidden_layers=64, ffn_dim=36864, vocab_size=50272,
    max_position_embeddings=2048, word_embed_proj_dim=9216, dtype="float32",
)  # fmt: skip
TINY = {
    "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 512, "vocab_size": 600,
    "max_position_embeddings": 64, "word_embed_proj_dim": 128,
}  # fmt: skip
OPT = {
    "RPQOPTModel": tf.OPTModel, "RPQOPTForCausalLM": tf.OPTForCausalLM,
    "RPQOPTForSequenceClassification": tf.OPTForSequenceClassification,
    "RPQOPTForQuestionAnswering": tf.OPTForQuestionAnswering,
}  # fmt: skip
opts = pytest.mark.parametrize("name", OPT)


def megabytes(plan: rpq.Plan) -> str:
    """The size of everything but the loaders' guard, as RPQ-pytorch printed it."""
    stored = (r.codebook_bytes + r.code_bytes + r.scale_bytes + r.other_bytes for r in plan.rows())
    return f"{sum(stored) / 2**20:.3f}MB"


@pytest.mark.parametrize("kind, arguments, options, dense, small", [
    (models.SeedViT, GIANT, {"codebooks": "heads"}, "2252.157MB", "361.429MB"),
    (models.SeedViT, GIANT, {"preset": "vit-giant"}, "2252.157MB", "361.429MB"),
    (models.SeedViT, BASE, {"codebooks": "heads"}, "330.124MB", "88.164MB"),
    (ViT, GIANT, {"codebooks": "heads"}, "2252.171MB", "361.443MB"),
])  # fmt: skip
def test_vit_sizes(kind, arguments, options, dense, small):
    with parameters_on_meta():
        model = kind(**arguments)
    assert f"{rpq.model_size(model):.3f}MB" == dense
    assert megabytes(rpq.plan(model, fit="random", **options)) == small


def test_a_factory_may_be_one_that_converts(tmp_path):
    model = models.RPQViT(**SMALL, grow=True, seed=0).eval()
    rpq.save(model, tmp_path / "vit")
    again = rpq.load(tmp_path / "vit", factory=lambda: models.RPQViT(**SMALL, grow=True, seed=1))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items())
    tied = models.RPQOPTForCausalLM(tf.OPTConfig(**TINY), grow=True, seed=0).eval()
    rpq.save(tied, tmp_path / "opt")
    again = rpq.load(
        tmp_path / "opt", factory=lambda: models.RPQOPTForCausalLM(tf.OPTConfig(**TINY), grow=True, seed=1)
    )
    assert again.lm_head.weight_rpq is again.model.decoder.embed_tokens.weight_rpq
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in tied.state_dict().items())


def test_plans_of_parameters_larger_than_any_memory():
    """One of DeepSeek-V3's fused parameters has 15 GB in bfloat16; a system refuses to lend what it does not have."""
    sizes = {"vocab_size": 64, "hidden_size": 2**14, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    config = tf.DeepseekV3Config(
        **sizes, n_routed_experts=2**12, moe_intermediate_size=2**15, architectures=["DeepseekV3ForCausalLM"]
    )
    plan = rpq.plan(config, bits=2)
    experts = {j.name: j for j in plan.jobs}["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.shape == (2**12, 2**16, 2**14) and experts.dense_bytes >= 2**43


class Layered:
    """A config whose layers differ in their heads: transformers raises, rather than to name one number."""

    hidden_size = 64

    def get_text_config(self):
        return self

    @property
    def num_attention_heads(self):
        raise RuntimeError("'num_attention_heads' is a per-layer attribute")


@pytest.mark.parametrize("bits, dim, stages", [(3, 8, 3), (6, 4, 3), (5.34, 3, 2)])
def test_more_bits_in_fewer_bytes_are_taken_where_codebooks_outweigh_codes(bits, dim, stages):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(1024, 1024))
    small, large = (j.spec for j in rpq.plan(model, bits=bits, storage="bytes").jobs)
    assert (large.dim, large.stages) == (dim, stages)
    assert (small.dim, small.stages) == (int(8 // bits), 1) and small.bits >= large.bits
    asked = rpq.plan(model, rules=[{"match": "*", "dim": dim, "stages": stages}])  # who asks for stages gets them
    assert all(j.spec.stages == stages for j in asked.jobs)
    bytes_of = [sum(j.nbytes.values()) for j in rpq.plan(model, bits=bits, storage="bytes").jobs]
    assert bytes_of[0] < 64 * 64 * 2


def test_kernels_of_few_inputs_get_eight_bits_unless_a_rule_names_them():
    blocks = nn.Conv2d(3, 512, 3), nn.Conv2d(512, 512, 3, groups=512), nn.Conv2d(512, 512, 1), nn.Embedding(4096, 16)
    model = nn.Sequential(*blocks)
    few = [j.spec.bits for j in rpq.plan(model, bits=4).jobs]
    assert few[:2] == [8, 8] and few[2] > 4 > few[3]  # the others share an average of 4
    assert [j.spec.bits for j in rpq.plan(model, preset="4bit").jobs] == [8, 8, 4, 4]
    assert "at most 32 inputs" in rpq.plan(model, bits=4).explain("1.weight")
    rule = {"match": "1", "bits": 4}
    assert [j.spec.bits for j in rpq.plan(model, bits=4, rules=[rule]).jobs] == [8, 4, *few[2:]]
    assert {j.spec.dim for j in rpq.plan(model, dim=2, axis="in").jobs} == {2}
    with pytest.raises(rpq.PlanError, match="bits must be"):
        rpq.plan(model, bits=True)


def test_a_model_whose_layers_differ_in_their_heads_has_a_plan():
    model = nn.Linear(64, 64)
    model.config = Layered()
    assert rpq.plan(model, bits=4, grow=True).jobs
    with pytest.raises(rpq.PlanError, match="needs a model with attention heads"):
        rpq.plan(model, codebooks="heads")


def test_a_built_vit_base_has_the_published_size():
    model = models.RPQViT(**BASE, seed=0)
    assert f"{rpq.model_size(model):.3f}MB" == "88.164MB"
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "options, size", [({"codebooks": "heads"}, "5720.913MB"), ({"preset": "opt-66b"}, "5885.707MB")]
)
def test_opt_66b_sizes(options, size):
    plan = rpq.plan(OPT_66B, fit="random", **options)
    assert megabytes(plan) == size
    assert f"{sum(r.dense_bytes for r in plan.rows()) / 2**20:.3f}MB" == "250700.766MB"
    if "preset" in options:
        stored = sum(r.codebook_bytes + r.code_bytes + r.other_bytes for r in plan.rows())
        assert stored == 6_171_611_392


def test_a_built_model_has_the_size_that_its_plan_says():
    model = models.RPQOPTModel(tf.OPTConfig(**TINY), seed=0, grow=True)
    plan = rpq.plan(tf.OPTConfig(**TINY, dtype="float32"), codebooks="heads", fit="random", grow=True)
    assert megabytes(plan) == f"{rpq.model_size(model):.3f}MB"


def test_vit_forward_and_backward():
    model = models.RPQViT(**SMALL, grow=True, seed=0)
    assert isinstance(model, ViT) and len(layers_of(model)) == 9
    out = model(torch.randn(2, 3, 32, 32))
    assert out.shape == (2, 5)
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_vit_starts_as_the_dense_one_does():
    torch.manual_seed(0)
    dense, model = models.SeedViT(**SMALL), models.RPQViT(**SMALL, grow=True, seed=0)
    ours = {**dict(model.named_parameters()), **{n: w() for n, w in layers_of(model).items()}}
    for name, p in dense.named_parameters():
        if p.numel() > 100:
            assert float(ours[name].detach().std()) == pytest.approx(float(p.detach().std()), rel=0.2, abs=1e-6), name
            assert float(ours[name].detach().mean()) == pytest.approx(float(p.detach().mean()), abs=0.1), name
    tokens = torch.randn(16, 17, 128)
    with torch.no_grad():
        for ours, theirs in zip(model.transformer.layers[0], dense.transformer.layers[0]):
            assert float(ours(tokens).std()) == pytest.approx(float(theirs(tokens).std()), rel=0.15)


@pytest.mark.parametrize("odd", [
    {"heads": 3, "dim": 128, "mlp_dim": 512, "dim_head": 64},  # heads do not divide the width
    {"dim": 64, "mlp_dim": 128, "heads": 2},  # narrower than a patch: RPQ-pytorch raised ZeroDivisionError
    {"heads": 1, "dim": 64, "dim_head": 64, "mlp_dim": 64},  # no output projection
    {"pool": "mean"},
])  # fmt: skip
def test_vits_that_the_seed_could_not_build(odd):
    model = models.RPQViT(**{**SMALL, **odd}, grow=True)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5) and layers_of(model)


@opts
def test_opt_forward_and_backward(name):
    model = getattr(models, name)(tf.OPTConfig(**TINY, pad_token_id=1), grow=True, seed=0)
    assert type(model) is OPT[name] and model.training
    assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    out = model(input_ids=torch.randint(2, 600, (2, 7)))[0]
    out.square().sum().backward()
    grads = {n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "qa_outputs" not in n}
    assert all(grads.values()), [n for n, g in grads.items() if not g]


@opts
def test_opt_starts_as_the_dense_one_does(name):
    config = tf.OPTConfig(**TINY)
    torch.manual_seed(0)
    dense, model = OPT[name](config), getattr(models, name)(config, grow=True, seed=0)
    state = {**dict(model.named_parameters()), **{n: w() for n, w in layers_of(model).items()}}
    for n, p in dense.named_parameters():
        assert float(state[n].detach().std()) == pytest.approx(float(p.detach().std()), rel=0.12, abs=1e-6), n
        assert float(state[n].detach().mean()) == pytest.approx(float(p.detach().mean()), abs=5e-3), n


def test_opt_head_is_tied_and_saves_and_loads(tmp_path):
    """RPQ-pytorch left the head dense and untied."""
    model = models.RPQOPTForCausalLM(tf.OPTConfig(**TINY), grow=True, seed=0).eval()
    assert model.lm_head.weight_rpq is model.model.decoder.embed_tokens.weight_rpq
    rpq.save(model, tmp_path / "out")
    loaded = rpq.load(tmp_path / "out")
    ids = torch.randint(2, 600, (2, 7))
    assert type(loaded) is tf.OPTForCausalLM and torch.equal(loaded(ids).logits, model(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_a_projected_embedding():
    """opt-350m embeds narrower than it computes, where RPQ-pytorch divided by zero."""
    model = models.RPQOPTForCausalLM(tf.OPTConfig(**{**TINY, "word_embed_proj_dim": 96}), grow=True)
    assert model(torch.randint(2, 600, (1, 5))).logits.shape == (1, 5, 600)


def test_the_seed_decides_every_number_and_leaves_the_global_generator_alone():
    def state(**how):
        return models.RPQViT(**SMALL, grow=True, **how).state_dict()

    before = torch.get_rng_state()
    one, same, other = state(seed=1), state(seed=1), state(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["cls_token"], other["cls_token"])
    torch.manual_seed(3)
    one = state()
    torch.manual_seed(3)
    same = state()
    assert all(torch.equal(one[k], same[k]) for k in one)


def test_materialise_keeps_shared_and_real_parameters():
    with parameters_on_meta():
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        model.append(model[0])
    real = nn.Parameter(torch.full((4,), 3.0))
    model[1].bias = real
    models.materialise(model)
    assert model[0] is model[2] and model[1].bias is real and torch.equal(real, torch.full((4,), 3.0))
    assert torch.equal(model[1].weight, torch.ones(4)) and 0 < float(model[0].weight.detach().std()) < 0.5
