"""Weights that something besides their modules holds stay dense, with the reason, on every road, and load whole."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import rpq_convert as rpq


class Base(nn.Module):
    """Two layers that nobody else holds, and one whose weight the subclass holds somewhere and multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.free = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.held = nn.Linear(32, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.free(self.embed(ids)), self.weight_again())


class InList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.held.weight]

    def weight_again(self) -> Tensor:
        return self.weights[0]


class BeforeItIsRegistered(Base):
    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(32, 32))
        self.held.weight = weight
        self.by_name = {"w": (weight,)}

    def weight_again(self) -> Tensor:
        return self.by_name["w"][0]


class InClosure(Base):
    def __init__(self) -> None:
        super().__init__()
        weight = self.held.weight
        self.weight_again = lambda: weight


class InDefault(Base):
    def __init__(self) -> None:
        super().__init__()

        def again(weight: Tensor = self.held.weight) -> Tensor:
            return weight

        self.weight_again = again


class InPartial(Base):
    def __init__(self) -> None:
        super().__init__()
        self.weight_again = functools.partial(torch.clone, self.held.weight)


class InMethod(Base):
    def __init__(self) -> None:
        super().__init__()
        self.weight_again = types.MethodType(
            lambda holder: holder.weight, types.SimpleNamespace(weight=self.held.weight)
        )


@dataclasses.dataclass(slots=True)
class Pair:
    number: int
    weight: Tensor


class InDataclass(Base):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(1, self.held.weight)

    def weight_again(self) -> Tensor:
        return self.pair.weight


class InHiddenModule(Base):
    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(32, 32, bias=False)
        hidden.weight = self.held.weight
        self.hidden = [hidden]

    def weight_again(self) -> Tensor:
        return self.hidden[0].weight


class AsView(Base):
    def __init__(self) -> None:
        super().__init__()
        self.turned = self.held.weight.detach().t()

    def weight_again(self) -> Tensor:
        return self.turned.t()


class AsBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turned", self.held.weight.detach().t(), persistent=False)

    def weight_again(self) -> Tensor:
        return self.turned.t()


class InHook(Base):
    def __init__(self) -> None:
        super().__init__()
        weight = self.held.weight
        self.free.register_forward_hook(lambda module, args, out: out @ weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.free(self.embed(ids))


TABLE: list[Tensor] = []


class InGlobal(Base):
    def __init__(self) -> None:
        super().__init__()
        TABLE[:] = [self.held.weight]

    def weight_again(self) -> Tensor:
        return TABLE[0]


def made_in_a_function() -> nn.Module:
    class InClassBody(Base):
        def weight_again(self) -> Tensor:
            return weight

    model = InClassBody()
    weight = model.held.weight
    return model


HOLDERS = {
    InList: "InList.weights[0]",
    BeforeItIsRegistered: "BeforeItIsRegistered.by_name['w'][0]",
    InClosure: "InClosure.weight_again's variable weight",
    InDefault: "InDefault.weight_again's defaults[0]",
    InPartial: "InPartial.weight_again's arguments[0]",
    InMethod: "InMethod.weight_again's object.weight",
    InDataclass: "InDataclass.pair.weight",
    InHiddenModule: "InHiddenModule.hidden[0].weight",
    AsView: "AsView.turned",
    AsBuffer: "AsBuffer.turned",
    InHook: "free._forward_hooks[",
    InGlobal: "InGlobal.weight_again's global TABLE[0]",
    made_in_a_function: "InClassBody.weight_again's variable weight",
}
IDS = torch.arange(6)
holders = pytest.mark.parametrize("build, place", HOLDERS.items(), ids=lambda v: getattr(v, "__name__", ""))


@holders
@torch.no_grad()
def test_a_weight_that_something_else_holds_stays_dense_and_loads(build, place, tmp_path):
    model = build().eval()
    expected = model(IDS)
    save_file({k: t.clone() for k, t in model.state_dict().items()}, tmp_path / "dense.safetensors")
    report = rpq.convert(model, bits=8, grow=True)
    rows = {r.name: r for r in report.rows}
    assert rows["held.weight"].reason.startswith(f"held by {place}")
    assert rows["held.weight"].reason.endswith(" as well, which would go on with the dense weight")
    assert {n for n, r in rows.items() if r.decision == "rpq"} == {"embed.weight", "free.weight"}
    assert any(f"held by {place}" in w for w in report.warnings)
    out = model(IDS)
    assert (out - expected).norm() < 0.02 * expected.norm()
    rpq.save(model, tmp_path / "saved")
    rpq.convert_checkpoint(tmp_path / "dense.safetensors", tmp_path / "streamed", factory=build, bits=8, grow=True)
    for folder in ("saved", "streamed"):
        assert torch.equal(rpq.load(tmp_path / folder, factory=build)(IDS), out), folder


@torch.no_grad()
def test_a_calibrated_stream_runs_what_closures_hold(tmp_path):
    model = InClosure().eval()
    expected = model(IDS)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    rpq.convert_checkpoint(
        tmp_path / "dense.safetensors", tmp_path / "out", factory=InClosure, bits=8, grow=True, calibration=[IDS]
    )
    out = rpq.load(tmp_path / "out", factory=InClosure)(IDS)
    assert (out - expected).norm() < 0.02 * expected.norm()


class Looking(AsView):
    """A constructor that looks at weights, so that it is built for real; its first weights are others each time."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.held.weight, generator=torch.Generator().manual_seed(torch.seed() % 1000))
        self.bound = float(self.held.weight.detach().abs().max()) and 1.0


@torch.no_grad()
def test_a_view_in_a_model_that_is_built_for_real_loads(tmp_path):
    model = Looking().eval()
    rpq.convert(model, bits=8, grow=True)
    rpq.save(model, tmp_path / "out")
    assert torch.equal(rpq.load(tmp_path / "out", factory=Looking)(IDS), model(IDS))


class Ordinary(nn.Module):
    """What is no holder: names of one module, ties, torch's own lists, optimizers, computed weights, numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.recurrent = nn.Linear(16, 16), nn.LSTM(16, 16)
        self.again, self.order = self.layer, [self.layer, self.recurrent]
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(16, 16))])
        self.named = nn.ParameterDict({"same": self.listed[0]})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.old = nn.utils.spectral_norm(nn.Linear(16, 16))
        self.optimizer = torch.optim.Adam(self.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.numbers, self.nothing = list(range(1000)), [None, {}, ()]


def test_ordinary_modules_hold_no_weight_twice():
    plan = rpq.plan(Ordinary(), bits=8, grow=True, rules=[{"match": "listed*", "view": "out in"}])
    assert not [s for s in plan.skips if "held by" in s.reason]
    assert {j.name for j in plan.jobs} == {
        "layer.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "listed.0",
        "normed.parametrizations.weight.original1", "old.weight_orig",
    }  # fmt: skip


def test_an_optimizer_made_before_conversion_is_named():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    other = torch.optim.SGD(nn.Linear(4, 4).parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    (warning,) = rpq.convert(model, bits=8, grow=True).warnings
    assert warning.startswith("AdamW holds 2 of the converted weights") and "make the optimizer anew" in warning
    del optimizer, other
    fresh = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    assert not rpq.convert(fresh, bits=8, grow=True).warnings


class InClass(Base):
    shared: Tensor

    def __init__(self) -> None:
        super().__init__()
        InClass.shared = self.held.weight


class ByReference(Base):
    def __init__(self) -> None:
        super().__init__()
        self.reference = weakref.ref(self.held.weight)


@pytest.mark.parametrize("build, place", [(InClass, "InClass.shared"), (ByReference, "ByReference.reference()")])
def test_classes_and_weak_references_hold_too(build, place):
    plan = rpq.plan(build(), bits=8, grow=True)
    assert [s.reason.partition(" as well")[0] for s in plan.skips if s.name == "held.weight"] == [f"held by {place}"]
