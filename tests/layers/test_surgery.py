"""Classes that refuse what surgery must do to their objects, and conversions that fail half-way."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import rpq_convert as rpq
from rpq_convert.layers.surgery import RPQLayer

T = TypeVar("T")


class Adapter(ABC):
    @abstractmethod
    def name(self) -> str: ...


class AbstractFirst(Adapter, nn.Linear):
    def name(self) -> str:
        return "here"


class GenericFirst(Generic[T], nn.Linear):
    pass


class AbstractGeneric(Generic[T], ABC, nn.Linear):
    pass


class Called(Protocol):
    def forward(self, x: Tensor) -> Tensor: ...


class ProtocolLast(nn.Linear, Called):
    pass


class NoSlots:
    __slots__ = ()


class SlotsFirst(NoSlots, nn.Linear):
    pass


class OwnSlot(nn.Linear):
    __slots__ = ("extra",)


class Registered(nn.Linear):
    def __init_subclass__(cls, key: str, **kwargs: Any) -> None:
        raise AssertionError("a class was announced")


class Final(nn.Linear):
    def __init_subclass__(cls) -> None:
        raise TypeError("final")


class Meta(type):
    def __new__(mcs, name: str, bases: Any, space: Any, *, key: str) -> Any:
        return super().__new__(mcs, name, bases, space)

    def __init__(cls, name: str, bases: Any, space: Any, *, key: str) -> None:
        super().__init__(name, bases, space)


class OwnMeta(nn.Linear, metaclass=Meta, key="here"):
    pass


class Refusing(nn.Linear):
    """Takes no attribute once it is built, and gives none up."""

    done = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.done = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.done:
            raise AttributeError("frozen")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError("frozen")


class Disguised(nn.Linear):
    @property
    def __class__(self) -> Any:
        return nn.Linear


class Shift:
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1  # type: ignore[misc]


class MixinFirst(Shift, nn.Linear):
    pass


KINDS = [
    AbstractFirst, GenericFirst, AbstractGeneric, ProtocolLast, SlotsFirst, OwnSlot, Registered, Final, OwnMeta, Refusing, Disguised,
    MixinFirst,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_class_of_a_layer_is_converted_and_restored(kind):
    torch.manual_seed(0)
    dense = kind(12, 9)
    model, x = copy.deepcopy(dense), torch.randn(3, 12)
    exact = {"match": "*", "dim": 2, "books": "blocks", "scales": "none", "codebook_dtype": "float32"}
    rpq.convert(model, rules=[exact], grow=True)
    assert isinstance(model, RPQLayer) and isinstance(model, kind) and issubclass(type(model), kind)
    assert type(model).__name__ == f"RPQ{kind.__name__}" and not isinstance(nn.Linear(2, 2), type(model))
    torch.testing.assert_close(model(x), dense(x))
    if kind is not OwnSlot:  # torch copies no slots, of dense modules neither
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is type(model) and torch.equal(twin(x), model(x))
    rpq.restore(model)
    assert type(model) is kind and set(model._parameters) == {"weight", "bias"}


def test_a_class_derived_from_a_generated_one_is_an_ordinary_one():
    """FSDP2 makes such a class: its own mixin before the class of the module."""
    told = []

    class Telling(nn.Linear):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            told.append(cls.__name__)
            super().__init_subclass__(**kwargs)

    layer = Telling(12, 9)
    rpq.convert(layer, dim=3, fit="random", grow=True)
    x = torch.randn(2, 12)
    expected = layer(x)
    layer.__class__ = type("Sharded", (Shift, type(layer)), {})
    assert told == ["Sharded"]
    assert [c.__name__ for c in type(layer).__mro__[:5]] == ["Sharded", "Shift", "RPQTelling", "RPQLayer", "Telling"]
    assert torch.equal(layer(x), expected + 1)


class Deep(nn.Module):
    """Layers in a chain, tied ends, buffers, hooks, gradients and a config: what a failure must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 32)
        self.layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
        self.recurrent = nn.LSTM(32, 32)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(32))
        self.layers[0].register_forward_hook(lambda module, args, out: out * 2)
        self.layers[1].weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.layers(self.embed(ids)) + self.offset)[0])


def picture(model: nn.Module) -> list[Any]:
    """Return what must be the same objects after a failure."""
    tensors = [
        t for m in model.modules() for table in (m._parameters, m._buffers) for t in table.values() if t is not None
    ]
    modules = [
        (type(m), m.training, sorted(m.__dict__), list(m._modules), list(m._forward_hooks)) for m in model.modules()
    ]
    return [
        [id(t) for t in tensors], [(t.dtype, t.data_ptr(), t.requires_grad, id(t.grad)) for t in tensors], modules,
        [id(t) for t in model.recurrent._flat_weights],
    ]  # fmt: skip


def failing(after: int, error: type[BaseException]) -> Any:
    left = iter(range(after))

    def progress(*_: Any) -> None:
        if next(left, None) is None:
            raise error("stop here")

    return progress


IDS = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{}, {"calibration": [IDS]}], ids=["weights alone", "calibrated"])
def test_a_conversion_that_fails_half_way_leaves_the_model_as_it_was(options, error):
    model = Deep().train()
    model(IDS).sum().backward()
    before, expected = picture(model), model.eval()(IDS)
    model.train()
    with pytest.raises(error, match="stop here"):
        rpq.convert(model, bits=8, grow=True, progress=failing(4, error), **options)
    assert picture(model) == before
    assert torch.equal(model.eval()(IDS), expected)


class Stubborn(nn.Linear):
    """A layer that takes no further module, of the kind that registries and adapters make."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        raise TypeError("no children here")


def test_a_layer_that_cannot_be_changed_leaves_those_before_it_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 16), Stubborn(16, 16))
    tensors = [id(p) for p in model.parameters()]
    with pytest.raises(TypeError, match="no children"):
        rpq.convert(model, dim=2, fit="random", grow=True, dtype="bfloat16")
    assert [type(m) for m in model] == [nn.Linear, nn.LSTM, Stubborn]
    assert [id(p) for p in model.parameters()] == tensors and all(p.dtype == torch.float32 for p in model.parameters())


def test_a_cast_that_fails_is_taken_back():
    """The dtype of what stays dense changes at the very end, tensor by tensor."""
    model = Deep()
    model.layers.add_module("last", nn.BatchNorm1d(32))
    before = picture(model)
    act = rpq.layers.surgery.AFTER
    act.append(failing(0, RuntimeError))
    try:
        with pytest.raises(RuntimeError, match="stop here"):
            rpq.convert(model, bits=8, grow=True, dtype="bfloat16")
    finally:
        act.pop()
    assert picture(model) == before


def stop_at(number: int) -> Any:
    """Let torch refuse the parameter of this number that is registered from now on."""
    left = iter(range(number))

    def refuse(module: nn.Module, name: str, parameter: Any) -> None:
        if next(left, None) is None:
            raise MemoryError("stop here")

    return register_module_parameter_registration_hook(refuse)


def test_restoring_that_fails_leaves_the_model_converted():
    model = Deep().eval()
    rpq.convert(model, bits=8, grow=True)
    before, expected = picture(model), model(IDS)
    handle = stop_at(3)
    try:
        with pytest.raises(MemoryError, match="stop here"):
            rpq.restore(model)
    finally:
        handle.remove()
    assert picture(model)[0] == before[0] and picture(model)[2] == before[2]
    assert torch.equal(model(IDS), expected)


def test_recalibration_that_fails_leaves_the_model_converted():
    base = Deep().eval()
    model = copy.deepcopy(base)
    rpq.convert(model, bits=4, grow=True)
    before, expected = picture(model), model(IDS)
    with pytest.raises(KeyboardInterrupt):
        rpq.recalibrate(model, base, [IDS], progress=failing(2, KeyboardInterrupt))
    assert picture(model)[0] == before[0] and picture(model)[2] == before[2]
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(8, 64), nn.LazyLinear(64)),
        lambda: nn.LazyBatchNorm2d(),
        lambda: nn.LazyConv1d(4, 3),
    ],
)
def test_lazy_modules_are_refused_until_they_ran(build):
    model = build()
    for call in (rpq.plan, rpq.convert):
        with pytest.raises(rpq.PlanError, match=r"Lazy\w+ has no shape yet; run the model once on data first"):
            call(model, bits=8, grow=True)
    kinds = [type(m) for m in model.modules()]
    assert kinds == [type(m) for m in build().modules()]


def test_a_lazy_layer_that_ran_is_converted():
    model, x = nn.Sequential(nn.Linear(8, 64), nn.LazyLinear(64)), torch.randn(2, 8)
    expected = model(x)
    rpq.convert(model, bits=8, grow=True)
    assert (model(x) - expected).norm() < 0.02 * expected.norm() and type(model[1]).__name__ == "RPQLinear"


def test_saving_says_why_nothing_was_converted(tmp_path):
    model = nn.Linear(4, 4)
    with pytest.raises(rpq.SourceError, match="Linear has no RPQ weight; convert it first"):
        rpq.save(model, tmp_path / "out")
    rpq.convert(model, bits=8)
    with pytest.raises(
        rpq.SourceError, match="Linear has no RPQ weight; nothing is converted: 1 x would grow from 64 to"
    ):
        rpq.save(model, tmp_path / "out")


def test_a_first_call_keeps_nothing_that_was_not_made_before(tmp_path):
    """Small things made amid activations would keep memory in pieces (`make_ahead`)."""
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    rpq.convert(model, bits=4, grow=True)
    rpq.save(model, tmp_path / "out")
    for made in (
        model,
        rpq.load(tmp_path / "out", factory=lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))),
    ):
        caches = [layer.weight_rpq.caches for layer in (made[0], made[2])]
        before = [(c.lazy, c.codes, c.product) for c in caches]
        assert all(all(kept) for kept in before)
        with torch.no_grad():
            made(torch.randn(1, 64))
            made(torch.randn(40, 64))
        made(torch.randn(40, 64)).sum().backward()
        assert all(
            a is b for kept, c in zip(before, caches) for a, b in zip(kept, (c.lazy, c.codes, c.product), strict=True)
        )
