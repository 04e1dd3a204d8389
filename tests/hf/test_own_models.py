"""Model classes of the user's own: registered with transformers, saved with their code, or built by a factory."""

import importlib
import json

import pytest
import torch
import transformers as tf

import rpq_convert as rpq

HOW = {"bits": 8, "grow": True}
CODE = """
import transformers as tf
from torch import nn


class {name}Config(tf.PretrainedConfig):
    model_type = "{kind}"

    def __init__(self, width=64, **more):
        self.width = width
        super().__init__(**more)


class {name}Model(tf.PreTrainedModel):
    config_class = {name}Config
    base_model_prefix = "own"

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""
X = torch.randn(2, 64)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of this name with a config and a model, which nothing knows yet."""

    def make(name):
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / f"code_of_{name.lower()}.py").write_text(
            CODE.format(name=name, kind=f"own-{name.lower()}")
        )
        monkeypatch.syspath_prepend(tmp_path / "code")
        module = importlib.import_module(f"code_of_{name.lower()}")
        return getattr(module, f"{name}Config"), getattr(module, f"{name}Model")

    return make


@pytest.mark.parametrize("prefix", ["", "FSDP"])
def test_a_registered_class_is_found(prefix, own, tmp_path):
    kind, model = own(f"Registered{prefix}")
    model(kind()).save_pretrained(tmp_path / "s")
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    config["architectures"] = [prefix + name for name in config["architectures"]]
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    with pytest.raises(rpq.SourceError, match="unknown to transformers; for your own model give factory"):
        rpq.plan(tmp_path / "s", **HOW)
    tf.AutoConfig.register(kind.model_type, kind)
    tf.AutoModel.register(kind, model)
    rpq.convert_checkpoint(tmp_path / "s", tmp_path / "o", **HOW)
    expected = rpq.load(tmp_path / "o")(X)
    assert torch.equal(tf.AutoModel.from_pretrained(tmp_path / "o")(X), expected)
    assert (expected - tf.AutoModel.from_pretrained(tmp_path / "s")(X)).norm() < 0.05 * expected.norm()


def test_a_class_without_a_public_name(tmp_path):
    """Such as the encoder of a T5, saved by itself."""
    config = tf.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    whole = tf.T5ForConditionalGeneration(config).eval()
    rpq.convert(whole, **HOW)
    whole.encoder.save_pretrained(tmp_path / "o")
    ids = torch.arange(8)[None]
    assert torch.equal(rpq.load(tmp_path / "o")(ids)[0], whole.encoder(ids)[0])


def test_a_model_with_its_own_code_is_saved_with_it(own, tmp_path):
    kind, model = own("Carried")
    kind.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    made = model(kind()).eval()
    rpq.convert(made, **HOW)
    rpq.save(made, tmp_path / "rpq")
    made.save_pretrained(tmp_path / "tf")
    for name in ("rpq", "tf"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "code_of_carried.CarriedConfig", "AutoModel": "code_of_carried.CarriedModel",
        }  # fmt: skip
        assert (tmp_path / name / "code_of_carried.py").read_text() == CODE.format(name="Carried", kind="own-carried")
        assert "code_of_carried.py" in rpq.verify(tmp_path / name)
        with pytest.raises(rpq.SourceError, match="needs code from the checkpoint, which is never run"):
            rpq.load(tmp_path / name)
        assert torch.equal(rpq.load(tmp_path / name, factory=lambda: model(kind()))(X), made(X))


def test_a_factory_keeps_the_config(own, tmp_path):
    kind, model = own("Built")
    source = model(kind(note="kept")).eval()
    source.save_pretrained(tmp_path / "s")
    rpq.convert_checkpoint(tmp_path / "s", tmp_path / "o", factory=lambda: model(kind()), **HOW)
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in "so")
    del after["quantization_config"]
    assert after == before and after["note"] == "kept"
    assert "rpq.load(" in (tmp_path / "o" / "README.md").read_text()
    assert (rpq.load(tmp_path / "o", factory=lambda: model(kind()))(X) - source(X)).norm() < 0.05 * source(X).norm()
