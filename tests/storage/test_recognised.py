"""What people give instead of a checkpoint is named, by Python and by every command's first look; nothing of it is unpickled."""

import io
import json
import pickle
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import SourceError
from rpq_convert.storage.options import HubOptions, SourceOptions
from rpq_convert.storage.sources import check_source, located, near, read_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)


def zipped(*names):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as packed:
        for name in names:
            packed.writestr(name, "{}")
    return data.getvalue()


def tarred():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as packed:
        packed.addfile(tarfile.TarInfo("model/config.json"))
    return data.getvalue()


def saved(what, **how):
    data = io.BytesIO()
    torch.save(what, data, **how)
    return data.getvalue()


FILES = {  # name -> (contents, what is said)
    "model.gguf": (b"GGUF\x03\x00\x00\x00", "is a GGUF file of llama.cpp; convert the safetensors checkpoint"),
    "renamed.bin": (b"GGUF\x03\x00\x00\x00", "is a GGUF file of llama.cpp"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "is an ONNX graph; convert the torch model"),
    "model.h5": (b"\x89HDF\r\n\x1a\n", "is a Keras or TensorFlow file"),
    "weights.hdf5": (b"", "is a Keras or TensorFlow file"),
    "model.keras": (zipped("metadata.json", "config.json", "model.weights.h5"), "is a Keras or TensorFlow file"),
    "model.tflite": (b"\x1c\x00\x00\x00TFL3", "is a TensorFlow Lite file"),
    "flax_model.msgpack": (b"\x81\xa6", "is a file of Flax weights; load it with from_flax=True"),
    "model.safetensors": (POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "pytorch_model.bin": (POINTER, "is a Git LFS pointer"),
    "net.pt": (lambda: saved(Net()), "is a whole pickled model (Net), which only its own code can open; load it in Python"),
    "bundle.pth": (lambda: saved({"epoch": 3, "model": nn.Sequential(Net())}), "is a whole pickled model (Sequential)"),
    "old.pt": (lambda: saved(Net(), _use_new_zipfile_serialization=False), "is a whole pickled model (Net)"),
    "dumped.pkl": (lambda: pickle.dumps(nn.Sequential()), "is a whole pickled model (Sequential)"),
    "old-state.pth": (lambda: saved(Net().state_dict(), _use_new_zipfile_serialization=False), "a pickled one needs allow_pickle=True"),
    "script.pt": (zipped("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "is a TorchScript archive, which is code; save the weights"),
    "program.pt2": (zipped("p/archive_format", "p/models/model.json"), "is an exported program of torch.export; save the weights"),
    "arrays.npz": (zipped("a.npy", "b.npy"), "is a file of numpy arrays"),
    "array.npy": (b"\x93NUMPY\x01\x00", "is a file of numpy arrays"),
    "model.zip": (zipped("model/config.json"), "is an archive; unpack it"),
    "model.tar": (tarred(), "is an archive; unpack it"),
    "model.tar.gz": (b"\x1f\x8b\x08", "is an archive; unpack it"),
    "net.py": (b"import torch", "is Python code; give the weights, and the code as --factory"),
    "rows.jsonl": (b"{}", "is data, no model; give it to --calibrate"),
    "cat.png": (b"\x89PNG", "is data, no model"),
    "config.json": (b"{}", "config.json is a file of a checkpoint; give its folder"),
    "notes.txt": (b"words", "is a text, no model; give a checkpoint's folder, a safetensors file or a hub id"),
    "state.pt": (lambda: saved(nn.Linear(4, 4).state_dict()), "is not a safetensors file; a pickled one needs allow_pickle=True"),
}  # fmt: skip
LORA = {"base_model_name_or_path": "facebook/opt-125m", "peft_type": "LORA"}
FOLDERS = {  # name -> (its files, what is said)
    "adapter": ({"adapter_config.json": json.dumps(LORA), "adapter_model.safetensors": "x"},
                "is a PEFT adapter (LORA) of facebook/opt-125m, not a model: it holds an adapter (adapter_config.json); merge it"),
    "pipeline": ({"model_index.json": '{"_class_name": "StableDiffusionPipeline"}', "unet/config.json": "{}", "vae/config.json": "{}"},
                 "is a diffusers pipeline (StableDiffusionPipeline), several models in one folder; give the folder of one of them: unet, vae"),
    "saved-model": ({"saved_model.pb": "x", "variables/variables.index": "x"}, "is a TensorFlow SavedModel"),
    "ggufs": ({"README.md": "", "model-q4.gguf": "GGUF"}, "no weights for torch; model-q4.gguf in it is a GGUF file of llama.cpp"),
    "onnxes": ({"config.json": "{}", "onnx/model.onnx": "x"}, "onnx/model.onnx in it is an ONNX graph"),
    "flax": ({"config.json": "{}", "flax_model.msgpack": "x"}, "flax_model.msgpack in it is a file of Flax weights"),
    "keras": ({"config.json": "{}", "tf_model.h5": "x"}, "tf_model.h5 in it is a Keras or TensorFlow file"),
    "parts": ({".metadata": "x", "__0_0.distcp": "x"}, "is a distributed checkpoint in parts; merge it"),
    "words": ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "is a folder of a tokenizer alone; give the folder that has"),
    "data": ({"a.txt": "words", "sub/b.jsonl": "{}"}, "is a folder of data, no model; give it to --calibrate"),
    "empty": ({}, "is an empty folder: no weights, no config; give one with"),
    "pointers": ({"config.json": "{}", "model.safetensors": POINTER.decode()}, "model.safetensors is a Git LFS pointer"),
    "small.partial": ({"rpq_source.json": "[]", "rpq_plan.json": "{}"}, "is an unfinished conversion; repeat the command"),
    "gptq": ({"config.json": '{"quantization_config": {"quant_method": "gptq"}}', "model.safetensors": "x"}, "quantized already (gptq)"),
    "runs": ({"checkpoint-10/config.json": "{}", "checkpoint-20/config.json": "{}", "log.txt": ""}, "has no weights; did you mean "),
    "old-sentence": ({"modules.json": "[]", "0_Transformer/config.json": "{}", "0_Transformer/model.safetensors": "x", "1_Pooling/config.json": "{}"},
                     "old-sentence/0_Transformer?"),
    "router": ({"modules.json": "[]", "a/config.json": "{}", "a/model.safetensors": "x", "b/config.json": "{}", "b/model.safetensors": "x"},
               "has no weights of its own; its models are in a, b: convert each, into a copy of this folder"),
    "static": ({"modules.json": "[]", "model.safetensors": "x"}, "holds no model of transformers; sentence-transformers reads the weights"),
    "weightless": ({"config.json": '{"model_type": "bert"}'}, "has no weights: no model.safetensors, index or pytorch_model.bin"),
}  # fmt: skip


@pytest.fixture
def given(request, tmp_path):
    """Return the path of one of FILES or FOLDERS, and what is said of it."""
    name = request.param
    if name in FILES:
        contents, says = FILES[name]
        (tmp_path / name).write_bytes(contents() if callable(contents) else contents)
        return tmp_path / name, says
    files, says = FOLDERS[name]
    (tmp_path / name).mkdir()
    for inside, text in files.items():
        (tmp_path / name / inside).parent.mkdir(exist_ok=True)
        (tmp_path / name / inside).write_text(text)
    return tmp_path / name, says


@pytest.mark.parametrize("given", [*FILES, *FOLDERS], indirect=True)
def test_what_is_no_dense_checkpoint_is_named(given, tmp_path):
    path, says = given
    for refuse in (
        lambda: check_source(path, SourceOptions()),
        lambda: rpq.convert_checkpoint(path, tmp_path / "out", bits=4),
    ):
        with pytest.raises(SourceError) as told:
            refuse()
        assert str(path) in str(told.value) and says in str(told.value) and "\n" not in str(told.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "given", ["model.gguf", "net.pt", "adapter", "pipeline", "words", "empty", "small.partial", "ggufs"], indirect=True
)
def test_what_is_no_converted_folder_is_named(given):
    path, says = given
    for refuse in (
        lambda: read_config(path),
        lambda: rpq.load(path),
        lambda: rpq.audit(path),
        lambda: rpq.verify(path),
    ):
        with pytest.raises(SourceError) as told:
            refuse()
        assert says in str(told.value)


def test_a_pickle_is_looked_at_without_running_it(tmp_path):
    class Evil(nn.Module):
        def __reduce__(self):
            return (tmp_path / "pwned").mkdir, ()

    torch.save({"_modules": Evil(), "_parameters": 3}, tmp_path / "evil.pt")
    with pytest.raises(SourceError):
        rpq.plan(tmp_path / "evil.pt", bits=4)
    assert not (tmp_path / "pwned").exists()


ADDRESSES = {
    "https://huggingface.co/facebook/opt-125m": ("facebook/opt-125m", None),
    "http://www.huggingface.co/facebook/opt-125m/": ("facebook/opt-125m", None),
    "huggingface.co/gpt2": ("gpt2", None),
    "https:/hf.co/facebook/opt-125m": ("facebook/opt-125m", None),  # as a path has it
    "hf://facebook/opt-125m": ("facebook/opt-125m", None),
    "https://huggingface.co/facebook/opt-125m/tree/v2": ("facebook/opt-125m", "v2"),
    "https://huggingface.co/gpt2/tree/v2": ("gpt2", "v2"),
    "https://huggingface.co/facebook/opt-125m/blob/main/config.json?download=true": ("facebook/opt-125m", "main"),
    "https://huggingface.co/facebook/opt-125m/discussions": ("facebook/opt-125m", None),
    "facebook/opt-125m": ("facebook/opt-125m", None),
    "./gpt2": ("./gpt2", None),
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_of_the_hub_is_its_repository(address):
    name, options = located(address, HubOptions())
    assert (name, options.revision) == ADDRESSES[address]


@pytest.mark.parametrize(("address", "says"), [
    ("https://huggingface.co/datasets/stanfordnlp/imdb", r"the address of a dataset, not of a model; as data it is given as hub:stanfordnlp/imdb"),
    ("https://huggingface.co/spaces/a/b", "the address of a space"), ("svn://host/model", r"svn:// is no store"),
    ("zip::https://host/model.zip", r"is a chain of file systems"),
])  # fmt: skip
def test_other_addresses_are_told(address, says):
    for refuse in (lambda: rpq.plan(address, bits=4), lambda: rpq.load(address)):
        with pytest.raises(SourceError, match=says):
            refuse()


def test_a_misspelt_path_meets_the_one_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "My-Model").mkdir(parents=True)
    save_file({"x": torch.zeros(2)}, tmp_path / "small.safetensors")
    for wrong, right in {
        "models/my-model": "models/My-Model", "modls/My-Model": "models/My-Model", "models/My-Modle": "models/My-Model",
        "small": "small.safetensors", "smal.safetensors": "small.safetensors", "models/other": "", "far/away": "",
    }.items():  # fmt: skip
        assert near(wrong) == right or near(wrong) == str(tmp_path / right), wrong
    with pytest.raises(SourceError, match=r"smal.safetensors does not exist; did you mean small.safetensors\?"):
        rpq.plan("smal.safetensors", bits=4)
    assert near(tmp_path / "smal.safetensors") == str(tmp_path / "small.safetensors")
