"""A part of a model, or a model inside a wrapper: converted, saved by its own class and loaded by any, or refused."""

import json

import pytest
import torch
import transformers as tf
from architectures import gqa, image, wide
from safetensors.torch import load_file, save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import EncodeError
from rpq_convert.hf.composite import without_description
from rpq_convert.layers.surgery import layers_of

IDS, PICTURE = torch.arange(7, 15)[None], torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HOW = {"bits": 8, "grow": True}
VISION = {**image(64), "intermediate_size": 128}


def near(a, b):
    return (a - b).norm() < 0.05 * b.norm()


def bert(**more):
    return tf.BertConfig(**wide(64), max_position_embeddings=64, **more)


def llava():
    torch.manual_seed(0)
    parts = {"text_config": tf.LlamaConfig(**wide(64)), "vision_config": tf.CLIPVisionConfig(**VISION)}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(**parts, image_token_index=255)).eval()


def answer(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    texts = {**wide(64), "projection_dim": 64, "max_position_embeddings": 64}
    config = tf.CLIPConfig(text_config=texts, vision_config={**VISION, "projection_dim": 64}, projection_dim=64)
    tf.CLIPModel(config).eval().save_pretrained(root / "source")
    rpq.convert_checkpoint(root / "source", root / "out", **HOW)
    return root / "source", root / "out"


@pytest.mark.parametrize(
    "name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPTextModel", "CLIPTextModelWithProjection"]
)
def test_a_class_that_reads_one_part_of_a_folder(name, clip, tmp_path):
    source, out = clip
    kind, given = getattr(tf, name), PICTURE if "Vision" in name else IDS
    dense, model = kind.from_pretrained(source).eval(), kind.from_pretrained(out).eval()
    assert model.dtype == dense.dtype and len(layers_of(model)) > 5
    assert near(model(given)[0], dense(given)[0])
    model.save_pretrained(tmp_path / "part")
    assert torch.equal(kind.from_pretrained(tmp_path / "part").eval()(given)[0], model(given)[0])
    assert torch.equal(rpq.load(tmp_path / "part")(given)[0], model(given)[0])


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    return tf.Qwen2VLConfig(text_config={**gqa(64), "rope_parameters": rope}, vision_config=vision)


def mllama():
    language = {**gqa(64), "cross_attention_layers": [1], "pad_token_id": 0}
    vision = {
        **image(64),
        "num_channels": 3,
        "intermediate_size": 128,
        "attention_heads": 4,
        "num_global_layers": 1,
        "max_num_tiles": 1,
    }
    vision |= {"vision_output_dim": 128, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    return tf.MllamaConfig(text_config=language, vision_config=vision)


@pytest.mark.parametrize(
    ("config", "whole", "part"),
    [
        (qwen2_vl, "Qwen2VLForConditionalGeneration", "Qwen2VLTextModel"),
        (mllama, "MllamaForConditionalGeneration", "AutoModelForCausalLM"),  # a part with a head from outside of it
    ],
)
def test_a_language_model_out_of_a_whole_that_renamed_it(config, whole, part, tmp_path):
    """transformers finds it under older names, which it writes too; converted files have the new ones."""
    torch.manual_seed(0)
    model = getattr(tf, whole)(config()).eval()
    model.save_pretrained(tmp_path / "dense")
    rpq.convert(model, **HOW)
    model.save_pretrained(tmp_path / "out")
    dense, wanted = getattr(tf, part).from_pretrained(tmp_path / "dense", output_loading_info=True)
    language, found = getattr(tf, part).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and not wanted["missing_keys"] and len(layers_of(language)) > 10
    assert near(language.eval()(IDS)[0], dense.eval()(IDS)[0])


def test_only_one_part_is_converted(clip, tmp_path):
    source, _ = clip
    rpq.convert_checkpoint(source, tmp_path / "out", include=["text_model.*"], **HOW)
    vision = tf.CLIPVisionModel.from_pretrained(tmp_path / "out").eval()
    assert not layers_of(vision)
    assert torch.equal(vision(PICTURE)[0], tf.CLIPVisionModel.from_pretrained(source).eval()(PICTURE)[0])
    assert layers_of(tf.CLIPTextModel.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPVisionModel", "CLIPTextModel"])
def test_where_transformers_does_not_know_rpq_every_part_fails(name, clip, monkeypatch):
    """Its guard has another shape than the parameter; no class loads random weights."""
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rpq")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        getattr(tf, name).from_pretrained(clip[1])


def test_guards_are_one_for_the_model_and_one_for_every_part(clip):
    _, out = clip
    guards = {k for k, t in load_file(out / "model.safetensors").items() if t.shape == (0,)}
    assert {name.partition(".")[0] for name in guards} == {"text_model", "vision_model"}
    assert rpq.plan(clip[0], **HOW).file_bytes == (out / "model.safetensors").stat().st_size
    assert (out / "rpq_plan.json").read_text() == rpq.plan(clip[0], **HOW).to_json()


@pytest.mark.parametrize("part", ["model.language_model", "model.vision_tower", "model", "lm_head", ""])
def test_the_outer_model_saves_what_was_converted_inside(part, tmp_path):
    model = llava()
    rpq.convert(model.get_submodule(part), **HOW)
    expected = answer(model)
    model.save_pretrained(tmp_path / "out")
    kind = tf.LlavaForConditionalGeneration
    assert torch.equal(answer(kind.from_pretrained(tmp_path / "out").eval()), expected)
    assert torch.equal(answer(rpq.load(tmp_path / "out")), expected)
    rpq.verify(tmp_path / "out")
    rpq.restore(model)
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in json.dumps(config)
    assert near(answer(kind.from_pretrained(tmp_path / "dense").eval()), expected)


def test_the_inner_model_saves_itself(tmp_path):
    model = llava()
    rpq.convert(model, **HOW)
    inner = model.model.language_model
    inner.save_pretrained(tmp_path / "inner")
    assert torch.equal(tf.LlamaModel.from_pretrained(tmp_path / "inner").eval()(IDS)[0], inner(IDS)[0])
    model.save_pretrained(tmp_path / "outer")  # and the outer one as before
    assert torch.equal(answer(rpq.load(tmp_path / "outer")), answer(model))


def test_restored_parts(tmp_path):
    model = llava()
    rpq.convert(model, **HOW)
    rpq.restore(model.model.language_model)
    expected = answer(model)
    assert not layers_of(model.model.language_model) and layers_of(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(answer(tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()), expected)


class Holder(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(64, 3)


@pytest.mark.parametrize(
    "wrap", [Holder, lambda m: nn.ModuleList([m]), lambda m: torch.compile(m, backend="eager"), nn.DataParallel]
)
def test_a_model_inside_a_wrapper(wrap, tmp_path):
    torch.manual_seed(0)
    body = tf.BertModel(bert()).eval()
    outer = wrap(body)
    rpq.convert(outer, **HOW)
    expected = body(IDS)[0]
    body.save_pretrained(tmp_path / "out")
    assert torch.equal(tf.AutoModel.from_pretrained(tmp_path / "out").eval()(IDS)[0], expected)


def test_two_models_side_by_side(tmp_path):
    both = nn.ModuleDict({"a": tf.BertModel(bert()), "b": llava()}).eval()
    rpq.convert(both, **HOW)
    for name, model in both.items():
        model.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name).eval()
        assert torch.equal(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(64, 64))

    compiled, x = torch.compile(build(), backend="eager"), torch.randn(2, 64)
    before = compiled(x)
    rpq.convert(compiled, **HOW)
    assert near(compiled(x), before) and not torch.equal(compiled(x), before)
    rpq.save(compiled, tmp_path / "out")
    assert torch.equal(rpq.load(tmp_path / "out", factory=build)(x), compiled(x))
    assert rpq.plan(torch.compile(build(), backend="eager"), **HOW).jobs[0].name == "0.weight"


def compiled_blocks(when):
    """Return a language model whose blocks are compiled `when`: before or after the conversion."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**wide(64))).eval()

    def compile_blocks():
        for i, block in enumerate(model.model.layers):
            model.model.layers[i] = torch.compile(block, backend="eager")

    if when == "before":
        compile_blocks()
    rpq.convert(model, **HOW)
    if when == "after":
        compile_blocks()
    return model


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_compiled_submodules_are_saved_under_their_own_names(when, tmp_path):
    """Names with `_orig_mod` in them would be found by no class, which loads random weights in their place."""
    model = compiled_blocks(when)
    expected = answer(model)
    rpq.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert torch.equal(answer(rpq.load(tmp_path / folder)), expected)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(answer(again), expected)
        rpq.verify(tmp_path / folder)
    assert {type(block).__name__ for block in model.model.layers} == {"OptimizedModule"}
    assert rpq.restore(model).model.layers[0].mlp.up_proj.weight.shape == (128, 64)
    assert {type(block).__name__ for block in model.model.layers} == {"OptimizedModule"}


def test_a_conversion_that_fails_leaves_compiled_submodules(tmp_path):
    model = nn.Sequential(torch.compile(nn.Linear(64, 64), backend="eager"), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(EncodeError):
        rpq.convert(model, **HOW)
    assert type(model[0]).__name__ == "OptimizedModule" and not layers_of(model)


def test_a_factory_that_compiles_submodules(tmp_path):
    def build():
        return nn.Sequential(torch.compile(nn.Linear(64, 64), backend="eager"), nn.Linear(64, 64))

    model, x = build(), torch.randn(2, 64)
    save_file({k: t.clone() for k, t in model.state_dict().items()}, tmp_path / "dense.safetensors")
    rpq.convert_checkpoint(tmp_path / "dense.safetensors", tmp_path / "stream", factory=build, **HOW)
    rpq.convert(model, **HOW)
    rpq.save(model, tmp_path / "memory")
    for name in ("stream", "memory"):
        loaded = rpq.load(tmp_path / name, factory=build)
        assert type(loaded[0]).__name__ == "OptimizedModule"
        assert torch.equal(loaded(x), model(x))


@pytest.mark.slow
def test_encoder_and_decoder_from_converted_folders(tmp_path):
    torch.manual_seed(0)
    tf.BertModel(bert()).save_pretrained(tmp_path / "e")
    tf.BertLMHeadModel(bert(is_decoder=True, add_cross_attention=True)).save_pretrained(tmp_path / "d")
    for name in "ed":
        rpq.convert_checkpoint(tmp_path / name, tmp_path / f"{name}o", **HOW)
    make, given = tf.EncoderDecoderModel.from_encoder_decoder_pretrained, {"input_ids": IDS, "decoder_input_ids": IDS}
    dense = make(tmp_path / "e", tmp_path / "d").eval()
    for encoder, decoder in (("eo", "do"), ("eo", "d"), ("e", "do")):
        model = make(tmp_path / encoder, tmp_path / decoder).eval()
        expected = model(**given).logits
        assert near(expected, dense(**given).logits)
        place = tmp_path / f"{encoder}{decoder}"
        model.save_pretrained(place)
        assert torch.equal(tf.EncoderDecoderModel.from_pretrained(place).eval()(**given).logits, expected)
        assert torch.equal(rpq.load(place)(**given).logits, expected)


def test_a_model_with_adapters_in_it_does_not_save_itself(tmp_path):
    peft = pytest.importorskip("peft")
    model = tf.BertModel(bert())
    rpq.convert(model, **HOW)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(rpq.SourceError, match="has an adapter: save the adapter"):
        adapted.get_base_model().save_pretrained(tmp_path / "out")
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_hub_mixin_refuses(tmp_path):
    from huggingface_hub import PyTorchModelHubMixin

    class Mixed(nn.Module, PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Parameter(torch.ones(2))

    model = Mixed()
    model.save_pretrained(tmp_path / "dense")
    rpq.convert(model, **HOW)
    with pytest.raises(rpq.SourceError, match=r"PyTorchModelHubMixin does not load again: save it with rpq\.save"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    rpq.save(model, tmp_path / "own")
    assert torch.equal(rpq.load(tmp_path / "own", factory=Mixed).a.weight[:], model.a.weight[:])
    with pytest.raises(
        rpq.SourceError, match=r"Mixed\.from_pretrained does not read: load it with rpq\.load\(folder, factory="
    ):
        Mixed.from_pretrained(tmp_path / "own")
    assert torch.equal(Mixed.from_pretrained(tmp_path / "dense").b, torch.ones(2))


@pytest.mark.slow  # timm takes seconds to import
def test_timm_refuses(tmp_path):
    hub = pytest.importorskip("timm.models")
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=4)
    rpq.convert(model, **HOW)
    with pytest.raises(rpq.SourceError, match=r"timm does not load again: save it with rpq\.save"):
        hub.save_for_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_restored_folder_says_nothing_of_rpq(clip, tmp_path):
    _, out = clip
    rpq.restore_checkpoint(out, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in json.dumps(config)
    assert without_description(config) == config
    assert near(
        tf.CLIPVisionModel.from_pretrained(tmp_path / "dense").eval()(PICTURE)[0],
        tf.CLIPVisionModel.from_pretrained(out).eval()(PICTURE)[0],
    )
