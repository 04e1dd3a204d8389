"""Pickled files as people have them: which state dict is read, and what is refused in one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import SourceError
from rpq_convert.storage.pickles import PickleSource


def build():
    return nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48))


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build().state_dict()


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def rearranged(state, kind):
    optimizer = {"state": {0: {"exp_avg": torch.ones(4, 4)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "plain": state,
        "beside": {"epoch": 3, "name": "x", **state, "none": None},
        "lightning": {
            "state_dict": state,
            "epoch": 3,
            "optimizer_states": [optimizer],
            "callbacks": {"ema": {"a": torch.ones(3)}},
        },
        "tutorial": {"model_state_dict": state, "optimizer_state_dict": optimizer, "loss": torch.tensor(1.0)},
        "model": {
            "model": state,
            "optimizer": optimizer,
            "lr_scheduler": {"last": 1},
            "scaler": {"scale": torch.ones(1)},
        },
        "module": {"module": state, "rng_state": torch.zeros(8, dtype=torch.uint8)},
        "deep": {"checkpoint": {"model": {"state_dict": state}}, "step": torch.tensor(5)},
        "own name": {"my_network": state, "config": {"mean": torch.ones(3)}},
        "ddp": prefixed(state, "module."),
        "compiled": prefixed(state, "_orig_mod."),
        "ddp of compiled": prefixed(state, "module._orig_mod."),
        "wrapped inside": {
            k.replace("0.", "0._orig_mod.").replace("1.", "1._fsdp_wrapped_module."): v for k, v in state.items()
        },
        "lightning's own name": {"state_dict": prefixed(state, "model.")},
        "no counter": {k: v for k, v in state.items() if "num_batches" not in k},
    }[kind]


KINDS = (
    "plain", "beside", "lightning", "tutorial", "model", "module", "deep", "own name", "ddp", "compiled", "ddp of compiled",
    "wrapped inside", "lightning's own name", "no counter",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_found_and_gives_the_same_bytes(state, tmp_path, kind, zipped):
    torch.save(rearranged(state, kind), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    save_file(state, tmp_path / "x.safetensors")
    options = {"factory": build, "bits": 8, "grow": True, "executor": "serial"}
    report = rpq.convert_checkpoint(tmp_path / "x.pth", tmp_path / "a", allow_pickle=True, **options)
    rpq.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "b", **options)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("not tensors" in w and "epoch" in w for w in report.warnings) == (kind in ("beside",))


def test_prefixes_in_safetensors_too(state, tmp_path):
    save_file(prefixed(state, "module._orig_mod."), tmp_path / "x.safetensors")
    rpq.convert_checkpoint(tmp_path / "x.safetensors", tmp_path / "out", factory=build, bits=8, grow=True)
    assert torch.equal(rpq.load(tmp_path / "out", factory=build)[0].bias, state["0.bias"])


@pytest.mark.parametrize("names", [("model", "ema"), ("state_dict", "state_dict_ema"), ("generator", "discriminator")])
def test_several_state_dicts_are_refused_until_one_is_named(state, tmp_path, names):
    first, second = names
    torch.save({first: state, second: {k: v + 1 for k, v in state.items()}}, tmp_path / "x.pth")
    options = {"factory": build, "bits": 8, "grow": True, "allow_pickle": True}
    with pytest.raises(SourceError, match=f"several state dicts: {first}, {second}; choose one with state_dict='KEY'"):
        rpq.convert_checkpoint(tmp_path / "x.pth", tmp_path / "out", **options)
    rpq.convert_checkpoint(tmp_path / "x.pth", tmp_path / "out", state_dict=second, **options)
    assert torch.equal(rpq.load(tmp_path / "out", factory=build)[0].bias, state["0.bias"] + 1)
    with pytest.raises(SourceError, match="no state dict under 'other'"):
        rpq.plan(tmp_path / "x.pth", state_dict="other", **options)


class Own:
    pass


def wrong(kind, state):
    return {
        "object": {"model": state, "args": Own()},
        "module": build(),
        "list": [1, 2],
        "empty": {},
        "numbers": {"step": 3, "loss": torch.tensor(1.0)},
        "sparse": {**state, "0.weight": state["0.weight"].to_sparse()},
        "quantized": {**state, "0.weight": torch.quantize_per_tensor(state["0.weight"], 0.1, 0, torch.qint8)},
    }[kind]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["object", "module", "list", "empty", "numbers", "sparse", "quantized"])
def test_what_is_no_state_dict_is_one_line(state, tmp_path, kind):
    torch.save(wrong(kind, state), tmp_path / "x.pth")
    with pytest.raises(SourceError, match=r"x\.pth") as caught:
        PickleSource([tmp_path / "x.pth"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_names_that_would_fall_together_are_refused(state, tmp_path):
    save_file(
        {**state, **{k.replace("0.", "0._orig_mod."): v + 1 for k, v in state.items() if k.startswith("0.")}},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(SourceError, match="would both be"):
        rpq.plan(tmp_path / "x.safetensors", factory=build, bits=8)
