"""Entropy-coded folders: every way to write and read one gives the same weights, in the bytes that were planned."""

import pytest
import torch
from rpq_convert.cli import group
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.errors import PlanError, SourceError, VerifyError
from rpq_convert.layers.surgery import layers_of

OPTIONS = {"bits": 3.5, "storage": "rans"}
WORDS = torch.arange(24).reshape(2, 12)


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense folder, its conversion, and the logits that this gives."""
    root = tmp_path_factory.mktemp("coded")
    build().save_pretrained(root / "dense")
    model = AutoModelForCausalLM.from_pretrained(root / "dense")
    rpq.convert(model, **OPTIONS)
    rpq.convert_checkpoint(root / "dense", root / "out", **OPTIONS)
    with torch.inference_mode():
        return root / "dense", root / "out", model(WORDS).logits, model


def same(model, expected) -> None:
    with torch.inference_mode():
        assert torch.equal(model(WORDS).logits, expected)


def test_sizes_are_those_of_the_plan_and_of_the_rate(folders):
    dense, out, _, _ = folders
    plan = rpq.plan(dense, **OPTIONS)
    files = {p.name: p.stat().st_size for p in out.glob("*.safetensors")}
    assert files == plan.files
    stored = load_file(out / "model.safetensors")
    coded = [j for j in plan.jobs if j.spec.rate is not None]
    assert len(coded) == 11  # all but the small keys and values
    numbers = [torch.Size(job.shape).numel() for job in coded]
    bits = [8 * len(stored[f"{job.name}_rpq.stream"]) / n for job, n in zip(coded, numbers)]
    assert bits == pytest.approx([j.spec.rate for j in coded], abs=8 / min(numbers))
    assert 3.498 < sum(b * n for b, n in zip(bits, numbers)) / sum(numbers) <= 3.5
    for job in coded:
        assert f"{job.name}_rpq.codes" not in stored
    row = next(r for r in rpq.audit(out).rows if r.name == coded[0].name)
    assert row.code_bytes == len(stored[f"{coded[0].name}_rpq.stream"]) + 512


def test_every_way_to_read_it_gives_the_same(folders, tmp_path):
    dense, out, expected, _ = folders
    assert rpq.verify(out)
    same(rpq.load(out), expected)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    same(loaded, expected)
    assert loaded.lm_head.weight is not None and "lm_head.weight_rpq.stream" not in loaded.state_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert rpq.verify(tmp_path / "again")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)
    same(AutoModelForCausalLM.from_pretrained(dense, quantization_config=rpq.RPQConfig(**OPTIONS)), expected)
    rpq.restore_checkpoint(out, tmp_path / "restored")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "restored")(WORDS).logits, expected)
    assert torch.equal(loaded.model(WORDS).last_hidden_state, rpq.load(out).model(WORDS).last_hidden_state)


@pytest.mark.parametrize("executor", ["serial", pytest.param("processes", marks=pytest.mark.slow)])
def test_every_executor_writes_the_same_bytes(executor, folders, tmp_path):
    dense, out, _, model = folders
    rpq.convert_checkpoint(dense, tmp_path / "out", executor=executor, **OPTIONS)
    rpq.save(model, tmp_path / "saved")
    for other in (tmp_path / "out", tmp_path / "saved"):
        assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_damaged_stream_is_refused_by_name(folders, tmp_path):
    _, out, _, _ = folders
    for p in out.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    tensors = load_file(out / "model.safetensors")
    key = next(k for k in tensors if k.endswith(".stream"))
    tensors[key][200] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=key.replace(".", r"\.") + ".*damaged"):
        rpq.load(tmp_path)
    with pytest.raises(SourceError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(VerifyError):
        rpq.verify(tmp_path)


@pytest.mark.slow
def test_calibrated_recalibrated_and_trained_codes_fit_their_streams(folders, tmp_path):
    dense, _, _, _ = folders
    base, model = build(), build()
    data = [torch.randint(512, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    rpq.convert(model, calibration=data, **OPTIONS)
    rpq.convert_checkpoint(dense, tmp_path / "fed", calibration=data, **OPTIONS)
    rpq.save(model, tmp_path / "saved")
    first = (tmp_path / "fed" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "saved" / "model.safetensors").read_bytes()
    rpq.recalibrate(model, base, data)
    rpq.save(model, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == len(first)
    name, weight = next(iter(layers_of(model).items()))
    generator = torch.Generator().manual_seed(0)
    weight.set_tensor("codes", torch.randint(256, weight.codes.shape, generator=generator, dtype=torch.uint8))
    rpq.save(model, tmp_path / "trained")  # as code updates might leave them: more bits than were planned
    assert torch.equal(
        layers_of(rpq.load(tmp_path / "trained"))[name].stored_tensor("codes"), weight.stored_tensor("codes")
    )


def test_a_budget_mixes_any_rates(folders):
    dense, _, _, _ = folders
    for size in (100_000, 160_000):
        plan = rpq.plan(dense, target_size=size, storage="rans", sensitivity="shape")
        assert 0.98 * size < plan.file_bytes <= size
        assert len({j.spec.rate for j in plan.jobs if j.spec.rate}) >= 1


@pytest.mark.parametrize("options, said", [
    ({"bits": 4, "storage": "rans", "fit": "random"}, "exclude each other"),
    ({"bits": 4, "storage": "bytes", "fit": "ecvq"}, "exclude each other"),
    ({"dim": 2, "storage": "rans"}, "take bits"),
    ({"bits": 4, "storage": "zip"}, "storage must be"),
])  # fmt: skip
def test_what_no_stream_can_hold_is_refused(options, said):
    with pytest.raises(PlanError, match=said):
        rpq.plan(build(), **options)


def test_the_command_converts_and_says_both_sizes(folders, tmp_path):
    dense, _, _, _ = folders
    command = ["convert", str(dense), "--bits", "4", "--storage", "rans", "--effort", "fast", "--no-check"]
    done = CliRunner().invoke(group, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "in memory" in done.output and "as planned" in done.output
    assert "--storage rans" in (tmp_path / "out" / "README.md").read_text()
