"""What belongs to a folder, which of its files are the weights, and that nothing leaves it."""

import pytest

from rpq_convert.errors import SourceError
from rpq_convert.storage.files import (
    belongs,
    files_beside,
    is_inside,
    module_weights,
    named_files,
    refuse_links,
    weight_files,
)

BELONGS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "source.spm", "target.spm", "normalizer.json", "tokens.txt", "tokens.json", "bpe.codes", "dict.txt",
    "spiece.model", "sentencepiece.bpe.model", "generation_config.json", "preprocessor_config.json", "chat_template.jinja",
    "additional_chat_templates/tool.jinja", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "LICENSE", "NOTICE.md",
    "README.base.md", "custom_generate/generate.py", "custom_generate/requirements.txt", "config_sentence_transformers.json",
    "bpe_simple_vocab_16e6.txt.gz", "keyboard.json", "scheduler/scheduler_config.json", "images/example.png", "1_Pooling/README.md",
)  # fmt: skip
LEFT_OUT = (
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "model.onnx", "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml",
    "consolidated.00.pth", "model.Q4_K_M.gguf", "original/params.json", "weights.npz", "saved_model.pb", "2_Dense/pytorch_model.bin",
    ".git/config", ".cache/huggingface/x.json", "a/.cache/x", "__pycache__/x.pyc", ".gitattributes", ".DS_Store",
    ".env", "prod.env", "token", "token.txt", "hf_token.json", "access-token", "credentials.json", "my_secrets.yaml", "server.pem",
    "id_rsa", "id_ed25519.pub", "api_key.txt", "service-account.json", "private.key", "1_Pooling/.env",
    "tokenizer.json.incomplete", "vocab.txt.part", "tokenizer.json.tmp", "a.lock", "vocab.txt~",
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "events.out.tfevents.1",
    "checkpoint-500/tokenizer.json", "global_step100/x.json", "latest", "runs/x.json", "data.pkl", "archive.zip", "weights.tar.gz",
    "config.json", "README.md", "rpq_plan.json", "rpq_report.json", "rpq_manifest.json", "modeling_mine.py", "adapter_config.json",
    "../tokenizer.json", "/etc/passwd", "a/../../b", "a\\b", "C:/x", "",
)  # fmt: skip


def test_what_belongs_is_told_by_what_does_not():
    assert [n for n in BELONGS if not belongs(n)] == []
    assert [n for n in LEFT_OUT if belongs(n)] == []


@pytest.mark.parametrize(
    "names, chosen",
    [
        (
            ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"],
            "model.safetensors",
        ),
        (["model.safetensors.index.json", "model-1.safetensors", "pytorch_model.bin"], "model.safetensors.index.json"),
        (["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-1.bin"], "pytorch_model.bin"),
        (["pytorch_model.bin.index.json", "pytorch_model-1.bin"], "pytorch_model.bin.index.json"),
        (["weights.safetensors", "adapter_model.safetensors"], "weights.safetensors"),
        (["model.safetensors", "adapter_model.safetensors"], "model.safetensors"),
    ],
)
def test_weights_are_those_that_transformers_takes(names, chosen):
    assert weight_files(names, "here", allow_pickle=True) == [chosen]


def test_the_file_that_a_config_names_comes_first():
    names = ["model.safetensors", "ema.safetensors", "other.bin"]
    assert weight_files(names, "here", named="ema.safetensors") == ["ema.safetensors"]
    for named in ("other.bin", "../x.safetensors", "absent.safetensors"):
        with pytest.raises(SourceError, match="here: its config names"):
            weight_files(names, "here", named=named)


def test_an_adapter_alone_is_no_model():
    with pytest.raises(SourceError, match="merge it into its base"):
        weight_files(["adapter_model.safetensors", "adapter_config.json"], "here")


@pytest.mark.parametrize("place", ["tokenizer.json", "1_Pooling/config.json", "1_Pooling", "a/b/c.txt"])
def test_no_link_out_of_a_folder_is_followed_at_any_depth(tmp_path, place):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    link = folder / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside if place == "1_Pooling" else outside / "file")
    for act in (refuse_links, files_beside, named_files):
        with pytest.raises(SourceError, match="leaves the folder"):
            act(folder)


def test_links_inside_and_in_hidden_folders_are_no_matter(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "real.txt").write_text("x")
    (tmp_path / "a" / "link.txt").symlink_to("real.txt")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "out").symlink_to("/etc/hostname")
    assert list(files_beside(tmp_path)) == ["a/link.txt", "a/real.txt"]


def test_modules_of_sentence_transformers_keep_their_weights(tmp_path):
    (tmp_path / "modules.json").write_text(
        '[{"idx": 0, "path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../3"}]'
    )
    names = [
        "modules.json",
        "model.safetensors",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
    ]
    assert module_weights(names, tmp_path) == {"2_Dense/model.safetensors": "2_Dense/model.safetensors"}
    del names[3]
    with pytest.raises(SourceError, match="allow_pickle=True"):
        module_weights(names, tmp_path)
    assert module_weights(names, tmp_path, allow_pickle=True) == {
        "2_Dense/model.safetensors": "2_Dense/pytorch_model.bin"
    }


def test_files_to_save_stay_in_the_folder(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert named_files([tmp_path / "a.txt"]) == {"a.txt": tmp_path / "a.txt"}
    assert named_files({"sub/b.txt": tmp_path / "a.txt"}) == {"sub/b.txt": tmp_path / "a.txt"}
    for wrong in ({"../b.txt": tmp_path / "a.txt"}, {"/b.txt": tmp_path / "a.txt"}, [tmp_path / "absent"]):
        with pytest.raises(SourceError):
            named_files(wrong)
    assert is_inside("a/b") and not is_inside("a//b")
