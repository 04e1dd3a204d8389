"""Plan, convert, save, stream, verify and restore one small convnet, on real files."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import VerifyError


def net():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    model = net().eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", model


@pytest.mark.parametrize(
    "executor, codebooks", [("serial", "float16"), ("threads", "float16"), ("serial", "float8_e4m3fn")]
)
def test_streaming_equals_memory_and_plan_equals_disk(source, tmp_path, executor, codebooks):
    file, model = source
    options = {"bits": 4, "rules": [{"match": "*", "codebook_dtype": codebooks}]}
    plan = rpq.plan(model, max_shard_size="20KB", **options)
    how = {"executor": executor} | ({"workers": 2} if executor == "threads" else {})
    rpq.convert_checkpoint(file, tmp_path / "stream", factory=net, max_shard_size="20KB", **how, **options)
    rpq.convert(model, **how, **options)
    rpq.save(model, tmp_path / "memory", max_shard_size="20KB")
    names = sorted(p.name for p in (tmp_path / "stream").glob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        assert (tmp_path / "stream" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
        assert (tmp_path / "stream" / name).stat().st_size == plan.files[name]
    x = torch.randn(2, 3, 16, 16)
    loaded = rpq.load(tmp_path / "stream", factory=net)
    assert torch.equal(loaded(x), model(x))
    rpq.verify(tmp_path / "stream")


class Masked(nn.Linear):
    """As timm's Swin: a buffer that no checkpoint holds, computed where a parameter lies."""

    def __init__(self):
        super().__init__(64, 64)
        self.register_buffer("mask", torch.arange(64, device=self.weight.device) % 2, persistent=False)

    def forward(self, x):
        return super().forward(x * self.mask)


def test_a_buffer_computed_on_a_parameters_device(tmp_path):
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(3, 64)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = {"factory": Masked, "bits": 4, "grow": True, "calibration": [x]}
    rpq.convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", **options)
    rpq.convert(model, bits=4, grow=True, calibration=[x])
    assert torch.equal(rpq.load(tmp_path / "out", factory=Masked)(x), model(x))


def test_predicted_size_of_every_dtype(tmp_path):
    from rpq_convert.core.safetensors import SAFETENSORS_NAMES, file_size, header

    generator = torch.Generator().manual_seed(0)
    for round_ in range(5):
        entries, tensors = {}, {}
        for dtype in SAFETENSORS_NAMES:
            for i in torch.randint(1, 2000, (2,), generator=generator).tolist():
                name = f"{i}.weight.{SAFETENSORS_NAMES[dtype]}"
                entries[name], tensors[name] = (dtype, (i,)), torch.zeros(i, dtype=dtype)
        path = tmp_path / f"{round_}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        head = header(entries)
        assert path.stat().st_size == file_size(entries)
        assert path.read_bytes()[8 : 8 + len(head)] == head


def test_restore_writes_a_plain_checkpoint(source, tmp_path):
    file, model = source
    rpq.convert_checkpoint(file, tmp_path / "out", factory=net, bits=4)
    rpq.restore_checkpoint(tmp_path / "out", tmp_path / "dense")
    dense = net().eval()
    dense.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    rpq.convert(model, bits=4)
    x = torch.randn(2, 3, 16, 16)
    for i in (0, 3, 7, 9):
        assert torch.equal(dense[i].weight, model[i].weight.clone())
    assert torch.allclose(dense(x), model(x), atol=1e-6)  # layers multiply codes; only the order of sums differs
    rpq.restore(model)
    assert type(model[0]) is nn.Conv2d and torch.equal(dense(x), model(x))


def test_killed_run_goes_on(source, tmp_path):
    file, _ = source

    def kill(job, encoded):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rpq.convert_checkpoint(file, tmp_path / "out", factory=net, bits=4, executor="serial", progress=kill)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    resumed = []
    rpq.convert_checkpoint(
        file, tmp_path / "out", factory=net, bits=4, progress=lambda job, e: resumed.append(e is None)
    )
    assert resumed.count(True) == 1
    rpq.convert_checkpoint(file, tmp_path / "whole", factory=net, bits=4)
    digests = [hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in ("out", "whole")]
    assert digests[0] == digests[1]


def test_damage_is_named(source, tmp_path):
    file, _ = source
    rpq.convert_checkpoint(file, tmp_path / "out", factory=net, bits=4)
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(VerifyError, match="sha256"):
        rpq.verify(tmp_path / "out")
    weights.write_bytes(data[:-10])
    with pytest.raises(rpq.SourceError, match="truncated, 10 bytes are missing"):
        rpq.load(tmp_path / "out", factory=net)


def test_bad_requests_are_refused_before_any_work(source, tmp_path):
    file, model = source
    with pytest.raises(rpq.PlanError, match="no parameter matches"):
        rpq.plan(model, bits=4, rules=[{"match": "nothing.*", "bits": 2}])
    with pytest.raises(rpq.PlanError, match="unknown preset"):
        rpq.plan(model, preset="nope")
    with pytest.raises(rpq.PlanError, match="do not divide"):
        rpq.plan(model, codebooks=7, grow=True)
    with pytest.raises(rpq.SourceError, match="does not exist"):
        rpq.convert_checkpoint(tmp_path / "missing.safetensors", tmp_path / "out", factory=net)
    (tmp_path / "there").mkdir()
    with pytest.raises(rpq.FolderError, match="exists"):
        rpq.convert_checkpoint(file, tmp_path / "there", factory=net, bits=4)
    with torch.no_grad():
        model[7].weight[0, 0] = float("nan")
    with pytest.raises(rpq.EncodeError, match=r"7\.weight"):
        rpq.convert(model, bits=4)
    assert type(model[0]) is nn.Conv2d


def test_config_names_no_code(source, tmp_path):
    file, _ = source
    rpq.convert_checkpoint(file, tmp_path / "out", factory=net, bits=4)
    text = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "factory" not in json.dumps(text) and text["quantization_config"]["quant_method"] == "rpq"


def test_codebooks_of_one_byte_need_scales():
    for rule in ({"scales": "none", "codebook_dtype": "float8_e4m3fn"}, {"scales": "float8_e4m3fn"}):
        with pytest.raises(ValueError, match=r"codebooks need scales|scales must be"):
            rpq.plan(net(), bits=2, rules=[{"match": "*", **rule}])
