"""Every family of models: what stays dense is named, bytes are as planned, reload is exact, outputs and gradients agree."""

import hashlib

import pytest
import torch
from architectures import ARCHITECTURES, EACH_KIND, inputs, outputs
from often import often
from paths import ROOT

import rpq_convert as rpq
from rpq_convert.hf import loading as hub
from rpq_convert.hf.module_source import ModuleSource
from rpq_convert.layers import surgery
from rpq_convert.storage.folder import open_folder

# Parameters of two and more axes that stay dense, by the end of their names. All others are converted, in every family.
DENSE = {
    "XLNet": {"r_w_bias", "r_r_bias", "r_s_bias", "seg_embed", "mask_emb"},
    "Funnel": {"r_w_bias", "r_r_bias", "r_s_bias", "seg_embed"},
    "Mamba": {"A_log"},
    "RecurrentGemma": {"input_gate_bias", "recurrent_gate_bias"},
    "RWKV": {"time_mix_key", "time_mix_value", "time_mix_receptance"},
    "Mixtral": {"gate.weight"},
    "Qwen3-MoE": {"gate.weight"},
    "gpt-oss": {"router.weight", "gate_up_proj_bias", "down_proj_bias"},
    "DeepSeek-V3": {"gate.weight"},
    "Granite-MoE": {"router.weight"},
    "Jamba": {"router.weight", "A_log"},
    "EnCodec": {"parametrizations.weight.original0"},
    "Wav2Vec2": {"parametrizations.weight.original0"},
    "SigLIP": {"probe"},
    "SAM": {"pos_embed", "rel_pos_h", "rel_pos_w", "positional_embedding"},
    "ViT": {"cls_token", "position_embeddings"},
    "DINOv2": {"cls_token", "mask_token", "position_embeddings"},
    "BEiT": {"cls_token", "relative_position_bias_table"},
    "Swin": {"relative_position_bias_table"},
}


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def same(a, b):
    """Return whether two models hold the same tensors, bit for bit."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


def gradients(model):
    """Return parameter -> its gradient after one step's backward pass."""
    model.train(model.config.model_type == "rwkv")  # in evaluation it writes to what its backward pass needs
    for weight in surgery.layers_of(model).values():
        weight.train()  # so that gradients are float32
    out = model(**inputs(model)).to_tuple()
    generator = torch.Generator().manual_seed(2)  # not the mean square: behind a norm, its gradient is all rounding
    trained = [t for t in out if isinstance(t, torch.Tensor) and t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator)).sum() for t in trained).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", often(ARCHITECTURES, EACH_KIND))
def test_architecture(name, tmp_path):
    torch.manual_seed(0)
    model = ARCHITECTURES[name](64).eval()
    model.save_pretrained(tmp_path / "src")
    converted = type(model).from_pretrained(tmp_path / "src").eval()

    # the checkpoint, read tensor by tensor, is the model
    source = ModuleSource(hub.build_empty(hub.load_config(tmp_path / "src")), open_folder(tmp_path / "src"))
    source.check()
    for key, tensor in converted.state_dict().items():
        assert torch.equal(source[key].to(tensor.dtype), tensor), key

    # in memory and as a stream, with the bytes of the plan
    plan = rpq.plan(tmp_path / "src", bits=4, grow=True)
    report = rpq.convert_checkpoint(tmp_path / "src", tmp_path / "out", bits=4, grow=True)
    rpq.convert(converted, bits=4, grow=True)
    rpq.save(converted, tmp_path / "memory")
    assert digest(tmp_path / "out") == digest(tmp_path / "memory")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == plan.file_bytes == report.predicted_bytes

    # nothing is left out in silence
    rows = [r for r in report.rows if r.decision != "buffer"]
    assert {n for r in rows for n in (r.name, *r.aliases)} >= {
        n for n, _ in model.named_parameters(remove_duplicate=False)
    }
    assert sum(r.params for r in rows) == sum(p.numel() for p in model.parameters())
    assert all(r.reason for r in rows)
    left = [r.name for r in rows if r.decision == "dense" and len(r.shape) > 1]
    known = DENSE.get(name, set())
    found = {next((k for k in known if n.endswith(k)), n) for n in left}
    assert found == known or (name == "Jamba" and found == {"A_log"})  # its router is a Linear before transformers 5.21

    # reload, here and by transformers
    expected = outputs(converted)
    assert torch.isfinite(expected).all()
    loaded = rpq.load(tmp_path / "out")
    hugging, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert same(loaded, converted) and same(hugging.eval(), converted)
    assert torch.equal(outputs(loaded), expected)
    # transformers maps its tensors from the file, where they are aligned less: torch rounds some sums another way
    assert (outputs(hugging) - expected).abs().max() < 1e-6 * expected.abs().max()

    # a dense model that holds the decoded weights says the same
    dense = rpq.restore(loaded)
    assert not surgery.layers_of(dense) and type(dense) is type(model)
    assert (outputs(dense) - expected).abs().max() < 1e-5 * expected.abs().max()

    # and its gradients are those of the codebooks and scales, through the decoding
    wanted, got, found = gradients(dense), gradients(hugging), surgery.layers_of(hugging)
    for path, weight in found.items():
        if path in wanted:
            parts = dict(weight.named_parameters())
            through = torch.autograd.grad(weight(), list(parts.values()), wanted.pop(path))
            wanted |= {f"{path}_rpq.{part}": g for part, g in zip(parts, through)}
    assert wanted.keys() == got.keys() and any("_rpq." in n for n in got)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for n, g in wanted.items():  # some are zero but for rounding: a bias of keys, which softmax ignores
        assert (got[n] - g).abs().max() < 1e-5 * max(float(g.abs().max()), 1e-2 * largest), n


def test_the_table_in_the_docs_has_every_family():
    page = (ROOT / "docs" / "models.md").read_text("utf8")
    assert not [name for name in ARCHITECTURES if f"| {name}, width" not in page], "run benchmarks/model_coverage.py"
    assert "NOT EXACT" not in page


def test_what_most_of_a_mixture_weighs_is_covered():
    """Experts are 68 to 98 % of such a model, and stored as raw parameters that other tools pass over in silence."""
    for name in ("Mixtral", "Qwen3-MoE", "gpt-oss", "DeepSeek-V3", "Granite-MoE"):
        plan = rpq.plan(ARCHITECTURES[name](64), bits=4, grow=True)
        experts = [j for j in plan.jobs if "experts" in j.name or "input_linear" in j.name or "output_linear" in j.name]
        assert len(experts) >= 2, name
    plan = rpq.plan(ARCHITECTURES["GPT-2"](64), bits=4, grow=True)
    assert sum(j.layer == "Conv1D" for j in plan.jobs) == 8
