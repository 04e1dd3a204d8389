"""What calibration, measuring, evaluation and tuning leave behind in a model: nothing."""

import copy
import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.running.state import kept


class Cache:
    __slots__ = ("calls", "keys")

    def __init__(self):
        self.keys, self.calls = [], 0


class Streaming(nn.Module):
    """A model that remembers what it has seen, in every way that models do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.state = (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
        self.register_buffer("frames", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)
        self.count, self.last, self.array = 0, None, np.zeros(3)
        self.history, self.recent, self.by_name, self.shapes = [], deque(maxlen=3), {"rows": {"n": 0}}, set()
        self.cache, self.plain = Cache(), SimpleNamespace(total=0)
        self.numbers, self.generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.python = random.Random(0)

    def forward(self, x):
        h, self.state = self.lstm(self.layers(x), self.state)
        self.frames += x.shape[1]
        self.replaced = self.replaced + 1
        self.count += 1
        self.last = h
        self.fresh = h  # an attribute that it did not have
        self.array[:] += 1
        self.history.append(h)
        self.recent.append(self.count)
        self.by_name["rows"]["n"] += x.shape[1]
        self.by_name["new"] = 1
        self.shapes.add(x.shape)
        self.cache.keys.append(h)
        self.cache.calls += 1
        self.plain.total += 1
        noise = torch.randn(()) + torch.randn((), generator=self.generator) + random.random() + np.random.rand()
        return h + 1e-3 * (noise + self.numbers.random() + self.python.random())


def facts(model):
    """Return everything but weights, as values that can be compared."""
    own = {k: v for k, v in vars(model).items() if not k.startswith(("_", "_rpq"))}
    own |= {k: getattr(model.cache, k) for k in Cache.__slots__} | {
        "plain": vars(model.plain),
        "buffers": dict(model.named_buffers()),
    }
    own |= {"numbers": model.numbers.bit_generator.state, "generator": model.generator.get_state()}
    own |= {
        "python": model.python.getstate(),
        "cache": None,
        "modes": [m.training for m in (model, *model.layers, model.lstm)],
    }
    return repr(own)


def drawn():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


DATA = [torch.randn(1, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 9, 6, 7)]
BITS = {"bits": 4, "grow": True}


def converted(dense):
    model = copy.deepcopy(dense)
    rpq.convert(model, **BITS)
    return model


ACTS = {
    "convert": lambda m: (rpq.convert(m, calibration=DATA, **BITS), m),
    "sensitivities": lambda m: (rpq.sensitivities(m, DATA, grow=True), m),
    "evaluate": lambda m: (rpq.evaluate(m, other := converted(m), DATA), m, other),
    "layer_errors": lambda m: (rpq.layer_errors(m, other := converted(m), DATA), m, other),
    "recalibrate": lambda m: (rpq.recalibrate(other := converted(m), m, DATA), m, other),
    "tune": lambda m: (rpq.tune(other := converted(m), m, DATA, steps=2), m, other),
    "tune_blocks": lambda m: (rpq.tune_blocks(other := converted(m), m, DATA, steps=2), m, other),
}


@pytest.mark.parametrize("act", ACTS)
def test_nothing_is_left_behind(act):
    torch.manual_seed(0)
    model = Streaming().eval()
    model.layers[0].train()  # a mode of its own
    before, numbers = facts(model), drawn()
    objects = model.history, model.state, model.cache, model.frames
    _, *models = ACTS[act](model)
    for found in models:
        assert facts(found) == before
    assert drawn() == numbers
    assert all(a is b for a, b in zip(objects, (model.history, model.state, model.cache, model.frames), strict=True))


class Fails(Streaming):
    def forward(self, x):
        self.count += 1
        self.frames += 1
        if x.shape[1] == 6:
            raise RuntimeError("no more")
        return super().forward(x)


@pytest.mark.parametrize("act", ["convert", "sensitivities", "evaluate"])
def test_nothing_is_left_behind_by_a_failure(act):
    model = Fails().eval()
    before, numbers = facts(model), drawn()
    with pytest.raises(RuntimeError, match="no more"):
        ACTS[act](model)
    assert facts(model) == before and drawn() == numbers


def test_every_input_begins_from_the_state_that_the_model_came_with():
    """So what a layer is fitted to does not depend on how often a model was run."""
    torch.manual_seed(0)
    model = Streaming().eval()
    seen = []
    model.lstm.register_forward_pre_hook(lambda m, args: seen.append(float(args[1][0].abs().max())))
    rpq.convert(model, calibration=DATA, **BITS)
    assert len(seen) > len(DATA) and max(seen) == 0


def test_blocks_that_remember_are_restored_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(8, 8), 0
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            self.calls += 1
            self.mean += x.mean((0, 1))
            return self.linear(x) - self.mean

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    dense = copy.deepcopy(model)
    rpq.convert(model, calibration=DATA, bits=8, grow=True)
    assert [b.calls for b in model] == [0] * 3 and not any(b.mean.any() for b in model)
    assert rpq.evaluate(dense, model, DATA).metrics["relative_error"] < 1e-3


def test_a_shared_container_stays_shared_and_weights_are_not_copied():
    shared = []
    model = nn.Linear(4, 4)
    model.seen, model.list_of_weights = shared, [model.weight]
    with kept(model) as restore:
        model.seen.append(1)
        restore()
        assert model.seen is shared and shared == []
        with torch.no_grad():
            model.weight.add_(1)
        changed = model.weight.detach().clone()
        model.seen = [2]
    assert model.seen is shared and torch.equal(model.weight, changed)
