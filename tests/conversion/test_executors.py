"""Executors: all of them give the same results, read no further ahead than they may, and pass on what goes wrong."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

import rpq_convert as rpq
from rpq_convert.conversion import executors
from rpq_convert.conversion.asked import EXECUTORS
from rpq_convert.conversion.executors import run

ROOT = Path(__file__).parents[2]
NAMES = [name for name in EXECUTORS if name != "ray"]  # test_cluster.py


def square(tensor):
    return tensor * tensor


def fails_on_three(number):
    if number == 3:
        raise KeyError("three")
    return number


def dies_on_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Linear(48, 40 + 8 * i, bias=False) for i in range(2)), torch.nn.Embedding(90, 32)
    )


def test_every_executor_converts_to_the_same_bytes():
    found = {}
    for executor in NAMES:
        converted = model()
        rpq.convert(converted, bits=4, grow=True, executor=executor, workers=None if executor == "serial" else 2)
        found[executor] = converted.state_dict()
    assert len(found["serial"]) >= 6
    for executor in ("threads", "processes"):
        assert found[executor].keys() == found["serial"].keys()
        assert all(torch.equal(t, found["serial"][name]) for name, t in found[executor].items()), executor


def test_tensors_of_every_kind_travel_between_processes():
    """Views, empty ones, half precision and other dtypes come back with their values, shapes and dtypes."""
    kinds = [
        torch.arange(12.0).view(3, 4).T,
        torch.empty(0, 5),
        torch.tensor(2.5),
        torch.arange(6, dtype=torch.uint8)[::2],
        torch.randn(7, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.tensor([True, False]),
    ]
    found = list(run(square, kinds, executor="processes", workers=2))
    for tensor in kinds:
        wanted = square(tensor)
        assert any(f.dtype == wanted.dtype and f.shape == wanted.shape and torch.equal(f, wanted) for f in found)
    assert len(found) == len(kinds)


@pytest.mark.parametrize("executor", ["serial", "threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_items_are_read_no_further_ahead_than_there_are_workers(executor):
    taken = []

    def items():
        for number in range(12):
            taken.append(number)
            yield torch.tensor(float(number))

    for done, _ in enumerate(run(square, items(), executor=executor, workers=3), 1):
        assert len(taken) <= done + 3
    assert len(taken) == 12


class Result:
    pass


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_results_that_were_taken_are_not_kept(executor):
    """As many as there are workers may be on their way; a run over a large model must not hold what it has made."""
    made, most = [], 0

    def make(number):
        found = Result()
        made.append(weakref.ref(found))
        return found

    for result in run(make, range(40), executor=executor, workers=2):
        del result
        most = max(most, sum(ref() is not None for ref in made))
    assert len(made) == 40 and most <= 4


def test_as_many_threads_run_at_once_as_there_are_workers():
    """Three items wait for each other, which only three threads end."""
    barrier = threading.Barrier(3, timeout=60)
    assert sorted(run(lambda n: (barrier.wait(), n)[1], range(6), executor="threads", workers=3)) == list(range(6))


@pytest.mark.parametrize("executor", NAMES)
def test_an_exception_in_a_worker_is_raised_here_and_no_more_items_are_read(executor):
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    with pytest.raises(KeyError, match="three"):
        list(run(fails_on_three, items(), executor=executor, workers=2))
    assert len(taken) < 10


def test_an_iterator_that_is_closed_early_ends_its_workers():
    before = threading.active_count()
    results = run(square, (torch.ones(1) for _ in range(100)), executor="threads", workers=2)
    next(results)
    results.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_worker_process_ends_the_run_with_an_error():
    with pytest.raises(BrokenProcessPool):
        list(run(dies_on_three, range(50), executor="processes", workers=2))


def test_an_unknown_executor_is_refused_by_name():
    with pytest.raises(ValueError, match="serial, threads, processes or ray, not 'clusters'"):
        list(run(square, [], executor="clusters"))


INTERRUPTED = """
import signal, sys, time
from rpq_convert.conversion.executors import run

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with ctrl-C ignored
    def items():
        for number in range(10_000):
            if number == 4:
                print("running", flush=True)
            yield 0.05

    try:
        list(run(time.sleep, items(), executor=sys.argv[1], workers=2))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("executor", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_run_and_its_workers_without_a_word_from_them(executor, tmp_path):
    """The signal goes to the whole group, as a terminal sends it; only the parent raises, and no worker is left."""
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED, "utf8")
    started = subprocess.Popen(
        [sys.executable, str(script), executor], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert started.stdout.readline() == "running\n"
    os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=120)
    assert (started.returncode, out, err) == (0, "interrupted\n", "")
    for _ in range(600):
        try:
            os.killpg(started.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a worker outlives the run")


def stops_on_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return number


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_stopped_worker_is_named_and_goes_on_when_it_is_let(monkeypatch, caplog):
    monkeypatch.setattr(executors, "PATIENCE", 0.2)
    found = []

    def let_go(record):
        pid = re.search(
            r"worker process (\d+) is stopped, and the run waits for it; `kill -CONT \1`", record.getMessage()
        )[1]
        os.kill(int(pid), signal.SIGCONT)
        found.append(pid)
        return True

    logger = logging.getLogger("rpq_convert")
    monkeypatch.setattr(logger, "filters", [let_go])
    assert sorted(run(stops_on_three, range(6), executor="processes", workers=2)) == list(range(6))
    assert len(found) == 1


ORPHANS = """
import multiprocessing, os, sys, time
from rpq_convert.conversion.executors import run

if __name__ == "__main__":
    def items():
        for number in range(10_000):
            if number == 4:
                print(*(p.pid for p in multiprocessing.active_children()), flush=True)
            yield 0.05

    list(run(time.sleep, items(), executor="processes", workers=2))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_workers_end_with_their_parent(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS, "utf8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    workers = [int(pid) for pid in started.stdout.readline().split()]
    started.kill()
    started.wait()
    assert len(workers) == 2
    for pid in workers:
        for _ in range(600):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("a worker outlives its parent")


@pytest.mark.parametrize("executor", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_no_more_runs_at_once_than_there_is_room_for(executor):
    """An item that is larger than the room runs alone; small ones run beside each other."""
    running, most = set(), []
    sizes = [3, 3, 3, 9, 1, 1, 1, 1]

    def items():
        for number in range(len(sizes)):
            running.add(number)
            most.append(sum(sizes[i] for i in running))
            yield number

    found = []
    for number in run(identity, items(), executor=executor, workers=3, sizes=iter(sizes), room=6):
        running.discard(number)
        found.append(number)
    assert sorted(found) == list(range(len(sizes)))
    assert max(most) == 9 and sorted(most)[-2] <= 6


def identity(number):
    return number
