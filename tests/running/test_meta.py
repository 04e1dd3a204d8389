"""Models without weights: what one thread builds on meta leaves the modules of other threads alone."""

import threading

import torch
from torch import nn

from rpq_convert.running.meta import parameters_on_meta


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
