"""PEFT over converted models: adapters train, save and reload, and a merge is right or refused, never lost."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, inputs
from often import often
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

import rpq_convert as rpq
from rpq_convert.layers import surgery

CASES = {
    "Llama": ("all-linear", {}),
    "Llama, DoRA": (["q_proj", "v_proj"], {"use_dora": True}),
    "Llama, embedding": (["q_proj", "embed_tokens"], {}),
    "GPT-2": ("all-linear", {"fan_in_fan_out": True}),
    "GPT-2, DoRA": (["c_attn", "c_proj"], {"use_dora": True, "fan_in_fan_out": True}),
    "BERT": ("all-linear", {"use_rslora": True}),
    "Mixtral": (["q_proj", "o_proj"], {}),
    "ResNet": (["convolution"], {}),
}


def converted(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name](64).eval()
    rpq.convert(model, bits=4, grow=True)
    return model


def first(model):
    return model(**inputs(model))[0]


@pytest.fixture(params=often(CASES, ("GPT-2, DoRA", "Mixtral")))
def adapted(request):
    targets, more = CASES[request.param]
    model = converted(request.param.split(",")[0])
    before = first(model).detach()
    return model, before, get_peft_model(model, LoraConfig(r=4, target_modules=targets, **more))


def stir(peft):
    """Give the adapter something to say."""
    torch.manual_seed(1)
    for name, p in peft.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            p.data.normal_(std=0.1)


def test_adapters_train_alone(adapted):
    _, before, peft = adapted
    assert torch.allclose(first(peft), before, atol=1e-5)  # a fresh adapter changes nothing
    trained = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    target = torch.randn(before.shape, generator=torch.Generator().manual_seed(2)) * before.std()
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (first(peft) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.95 * losses[0]


def test_an_adapter_is_saved_and_reloaded(adapted, tmp_path):
    _, _, peft = adapted
    stir(peft)
    rpq_state = {k: t.clone() for k, t in peft.state_dict().items() if "_rpq." in k}
    with torch.no_grad():
        expected = first(peft)
    peft.save_pretrained(tmp_path / "adapter")
    plain = peft.unload()
    rpq.save(plain, tmp_path / "model")
    fresh = rpq.load(tmp_path / "model")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(first(again), expected)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in rpq_state.items())


def test_a_plain_merge_is_refused_and_nothing_is_lost(adapted):
    _, _, peft = adapted
    stir(peft)
    expected = first(peft).detach()
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(
            RuntimeError, match=r"would be lost in its codes: call rpq\.merge_adapter.*restore\(model\)"
        ):
            merge()
        assert torch.equal(first(peft), expected)
    rpq.restore(peft)
    merged = peft.merge_and_unload()
    assert torch.allclose(first(merged), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_merge_adapter_encodes_again_with_a_stated_error(adapted):
    model, before, peft = adapted
    stir(peft)
    names = {
        n.removesuffix(".base_layer") for n, m in peft.get_base_model().named_modules() if n.endswith("base_layer")
    }
    others = {k: t.clone() for k, t in model.state_dict().items() if "_rpq.codes" in k and "base_layer" not in k}
    dense = rpq.restore(copy.deepcopy(peft)) or None
    wanted = first(dense if dense is not None else peft).detach()
    merged, report = rpq.merge_adapter(peft)
    rows = [r for r in report.rows if r.decision == "rpq"]
    assert {r.name.removesuffix(".weight") for r in rows} == names
    assert all(0 < r.error < 0.05 for r in rows)
    assert not any("lora" in n for n, _ in merged.named_modules())
    assert set(surgery.layers_of(merged)) >= {f"{n}.weight" for n in names}
    assert all(torch.equal(t, merged.state_dict()[k]) for k, t in others.items())
    moved, missed = (first(merged) - before).norm(), (first(merged) - wanted).norm()
    assert missed < 0.5 * moved


def test_loaded_by_transformers(tmp_path):
    rpq.save(converted("Llama"), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = inputs(model) | {"labels": inputs(model)["input_ids"]}
    peft.train()
    peft(**data).loss.backward()
    trained = [n for n, p in peft.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    assert any(bool(p.grad.any()) for p in peft.parameters() if p.grad is not None)


def test_a_converted_head_that_is_saved_trains_its_codebooks_and_a_restored_one_its_weight():
    model = converted("Llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft = get_peft_model(copy.deepcopy(model), config)
    first(peft).sum().backward()
    assert peft.base_model.model.lm_head.modules_to_save["default"].weight_rpq.codebooks.grad.any()
    rpq.restore(model.lm_head)
    first(get_peft_model(model, config)).sum().backward()
    assert model.lm_head.modules_to_save["default"].weight.grad.any()


def test_prepared_for_low_bit_training():
    model = prepare_model_for_kbit_training(converted("Llama"))
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    first(peft).sum().backward()
    assert {n for n, p in peft.named_parameters() if p.grad is not None} == {
        n for n, p in peft.named_parameters() if "lora_" in n
    }


def test_what_has_no_adapter_is_told(tmp_path):
    model = ARCHITECTURES["Llama"](64)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no RPQ layer with an adapter"):
        rpq.merge_adapter(peft)


@pytest.mark.parametrize("tied", often([False, True], (True,)))
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "CPTConfig"])
def test_prompts_find_the_word_embeddings(kind, tied):
    import peft

    model = converted("OPT" if tied else "Llama")
    more = (
        {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}
        if kind == "CPTConfig"
        else {"num_virtual_tokens": 2}
    )
    prompted = get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **more))
    assert prompted.word_embeddings is model.get_input_embeddings()
    assert "named_parameters" not in model.__dict__
    loss = prompted(input_ids=torch.arange(4, 12)[None], labels=torch.arange(4, 12)[None]).loss
    loss.backward()
    trained = {n for n, p in prompted.named_parameters() if p.grad is not None}
    assert trained and all(n.startswith("prompt_encoder") for n in trained)


@pytest.mark.parametrize("tied", [False, True])
def test_adapted_tokens_are_merged(tied):
    model = converted("OPT" if tied else "Llama")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "token" in name and parameter.requires_grad:
                parameter.add_(0.5)
    wanted = first(peft.eval())
    merged, _ = rpq.merge_adapter(peft)
    assert type(merged).__name__ == type(model).__name__
    assert (first(merged) - wanted).norm() < 0.1 * wanted.norm()  # 4 bits


def test_what_an_adapter_trains_is_not_converted():
    model = ARCHITECTURES["Llama"](64)
    peft = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    report = rpq.convert(peft, bits=8, grow=True)
    names = {r.name for r in report.rows if r.decision == "rpq"}
    assert names and not any("lora_" in n or "modules_to_save" in n for n in names)
    assert {n for n, p in peft.named_parameters() if "lora_A" in n and not n.endswith("weight")} == set()


def test_converted_experts_refuse_an_adapter():
    model = converted("Mixtral")
    with pytest.raises(ValueError, match=r"target_parameters: .*experts.*is converted"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"]))
