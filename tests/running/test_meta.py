"""Models without weights: what one thread builds on meta leaves the modules of other threads alone."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rpq_convert as rpq
from rpq_convert.errors import SourceError
from rpq_convert.running.meta import build_empty, parameters_on_meta


def test_other_threads_build_ordinary_modules():
    """One thread builds on meta again and again, the main one ordinary layers: no parameter of those is on meta."""
    done, empty = threading.Event(), []

    def build():
        while not done.is_set():
            with parameters_on_meta():
                empty.append(all(p.is_meta for p in nn.Linear(8, 8).parameters()))

    thread = threading.Thread(target=build)
    thread.start()
    try:
        real = [p for _ in range(3000) for p in nn.Linear(8, 8).parameters()]
    finally:
        done.set()
        thread.join()
    assert empty and all(empty)
    assert not any(p.is_meta for p in real)


def test_a_thread_that_starts_within_a_block_is_another_thread():
    found = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: found.append(nn.Linear(4, 4).weight.is_meta))
        thread.start()
        thread.join()
        assert nn.Linear(4, 4).weight.is_meta
    assert found == [False] and not nn.Linear(4, 4).weight.is_meta


def test_several_threads_build_on_meta_at_once():
    """All of them stand inside their blocks at the same time; ties stay ties, buffers stay real."""
    barrier, models = threading.Barrier(4, timeout=60), {}

    def build(number):
        with parameters_on_meta():
            barrier.wait()
            model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
            model[1].weight = model[0].weight
            barrier.wait()
        models[number] = model

    threads = [threading.Thread(target=build, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 4
    for model in models.values():
        assert all(p.is_meta for p in model.parameters()) and model[0].weight is model[1].weight
        assert not model[2].running_mean.is_meta


def test_blocks_nest_and_end_after_an_error():
    try:
        with parameters_on_meta(), parameters_on_meta():
            assert nn.Linear(4, 4).weight.is_meta
            raise KeyError("a constructor fails")
    except KeyError:
        pass
    assert not nn.Linear(4, 4).weight.is_meta
    with parameters_on_meta():
        with parameters_on_meta():
            pass
        assert nn.Linear(4, 4).weight.is_meta  # the inner block has not ended the outer one
    assert torch.equal(nn.Parameter(torch.ones(2)), torch.ones(2))


class TrialRun(nn.Module):
    """Finds a size by a forward pass."""

    def __init__(self):
        super().__init__()
        self.f, self.n = nn.Linear(32, 64), nn.LayerNorm(64)
        self.h = nn.Linear(self.n(self.f(torch.zeros(1, 32))).shape[1], 10)

    def forward(self, x):
        return self.h(self.n(self.f(x)))


class Strides(nn.Module):
    """As YOLO: strides of a trial run, kept as a buffer and as an attribute; biases written by index."""

    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stride = 16 / torch.tensor(self.f(torch.zeros(1, 3, 16, 16)).shape[-1])
        self.register_buffer("grid", self.stride * torch.ones(2), persistent=False)
        self.f.bias.data[:2] += torch.log(torch.tensor(0.01))

    def forward(self, x):
        return self.f(x.reshape(-1, 3, 4, 4)[..., :2, :2].repeat(1, 1, 8, 8)) * self.grid[0]


class Given(nn.Module):
    """Weights from elsewhere, the same ones for two layers, also in a list."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(32, 32), nn.Linear(32, 32)
        self.f.weight.data = torch.full((32, 32), 0.1)
        self.g.weight = self.f.weight
        self.names = ["f"]

    def forward(self, x):
        return self.g(self.f(x))


class Kept(nn.Module):
    """A plain tensor that was computed from weights, and code that looks at one."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(32, 64)
        self.mean = self.f.weight.detach().mean() * 0 + 2
        self.positive = bool(self.f.weight.abs().max().item() > 0)

    def forward(self, x):
        return self.f(x) - self.mean


def orthogonal():
    return nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(32, 32)), nn.Linear(32, 32))


def pruned():
    layer = nn.Linear(32, 64)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.Linear(64, 32))


@pytest.mark.parametrize("build", [TrialRun, Strides, Given, Kept, orthogonal, pruned], ids=lambda b: b.__name__)
def test_constructors_that_look_at_weights_are_built_for_real(tmp_path, build):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(3, 48 if build is Strides else 32)
    rpq.convert(model, bits=8, grow=True)
    rpq.save(model, tmp_path / "out")
    torch.manual_seed(1)
    assert torch.equal(rpq.load(tmp_path / "out", factory=build)(x), model(x))
    empty = build_empty(build)
    assert all(p.is_meta for p in empty.parameters()) and not any(b.is_meta for b in empty.buffers())


def test_shared_parameters_stay_shared_and_the_objects_that_they_were():
    held = []

    class Holding(Given):
        def __init__(self):
            super().__init__()
            held[:] = [self.f.weight]

    empty = build_empty(Holding)
    assert empty.f.weight is empty.g.weight is held[0] and held[0].is_meta


def test_an_error_of_a_constructor_is_its_own():
    def broken():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        build_empty(broken)


def test_a_model_that_is_too_large_to_be_built_for_real_is_one_line(tmp_path):
    def large():
        layer = nn.Linear(8, 8)
        layer.big = torch.ones(1) if layer.weight.is_meta else torch.empty(1 << 60)
        layer.bound = layer.weight.max().item()
        return layer

    with pytest.raises(SourceError, match=r"looks at weights .*do not fit in memory"):
        rpq.plan(_some_file(tmp_path), factory=large, bits=8)


def _some_file(folder):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(8, 8), "bias": torch.ones(8)}, folder / "x.safetensors")
    return folder / "x.safetensors"
