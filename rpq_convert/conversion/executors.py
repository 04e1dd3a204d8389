"""Executors: how jobs run. Each is a generator that maps a function over items and holds few of them at a time.

An executor knows nothing of weights. It takes items lazily, so that at most `workers` tensors are read ahead, and yields
results as they finish. Every job carries its own seed, so the results do not depend on which executor ran them.

Between processes tensors travel as bytes. torch would send file descriptors through a thread of its own, which prints a
traceback when a worker dies in the middle of it.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpq_convert.conversion.asked import check_executor
from rpq_convert.showing import notice

PATIENCE = 10.0  # seconds without a result after which workers are looked at


def run(
    fn: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    executor: str = "serial",
    workers: int = 1,
    sizes: Iterable[int] = (),
    room: float = math.inf,
) -> Iterator[Any]:
    """Yield `fn(item)` for every item, in the order of completion.

    Args:
        executor: `serial`; `threads` (fits release the interpreter lock); `processes` (spawned; `fn` and items must
            be importable and picklable).
        workers: how many run at once, at most.
        sizes: bytes that each item takes while it runs; those at once take at most `room` together, but for a single one.
    """
    check_executor(executor, None)
    if executor == "serial" or workers <= 1:
        yield from map(fn, items)
    elif executor == "threads":
        with ThreadPoolExecutor(workers) as pool:
            yield from _bounded(pool, fn, items, Share(workers, iter(sizes), room))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            packed = map(_pack, items)
            yield from map(
                pickle.loads,
                _bounded(pool, partial(_packed, fn), packed, Share(workers, iter(sizes), room), _tell_of_stopped()),
            )


def _end_with_parent() -> None:
    """Let a worker end when its parent does, however that happens: the pipe between them then closes."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _tell_of_stopped() -> Callable[[], None]:
    """Return what says of each worker that was stopped (SIGSTOP, a debugger) that the run waits for it; where the system tells."""
    told: set[int] = set()

    def tell() -> None:
        stopped = {p.pid for p in multiprocessing.active_children() if p.pid is not None and _is_stopped(p.pid)}
        for pid in sorted(stopped - told):
            notice(f"worker process {pid} is stopped, and the run waits for it; `kill -CONT {pid}` lets it go on")
        told.intersection_update(stopped)
        told.update(stopped)

    return tell


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:  # it is no more, or this is no Linux
        return False


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.is_meta:
            return NotImplemented
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (raw, value.dtype, value.shape)


def _tensor(raw: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _pack(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _packed(fn: Callable[[Any], Any], item: bytes) -> bytes:
    return _pack(fn(pickle.loads(item)))


class Share:
    """How much may run at once.

    Args:
        workers: items. sizes: bytes of each item, in their order; 0 for those that follow. room: bytes of all that run.
    """

    def __init__(self, workers: int, sizes: Iterator[int], room: float) -> None:
        self.workers, self.sizes, self.room = workers, sizes, room
        self.held: dict[Future[Any], int] = {}
        self.next = next(sizes, 0)

    def has_room(self, running: set[Future[Any]]) -> bool:
        """Return whether the next item may start beside these."""
        used = sum(self.held[future] for future in running)
        return not running or (len(running) < self.workers and used + self.next <= self.room)

    def take(self, future: Future[Any]) -> None:
        """Note that the next item has started."""
        self.held[future] = self.next
        self.next = next(self.sizes, 0)

    def give_back(self, future: Future[Any]) -> Any:
        """Note that an item has ended; return its result, of which nothing is kept."""
        del self.held[future]
        return future.result()


def _bounded(
    pool: Executor,
    fn: Callable[[Any], Any],
    items: Iterable[Any],
    share: Share,
    idle: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
    """Yield results in the order of completion; `idle` is called whenever none has come for a while."""
    waiting: set[Future[Any]] = set()
    source = iter(items)
    try:
        while True:
            while share.has_room(waiting):
                try:
                    item = next(source)  # read only now: it takes memory
                    with _deaf():
                        future = pool.submit(fn, item)
                    share.take(future)
                    waiting.add(future)
                    del item
                except StopIteration:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, timeout=PATIENCE, return_when=FIRST_COMPLETED)
            if not done:
                idle()
            while done:
                yield share.give_back(done.pop())
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def _deaf() -> Iterator[None]:
    """Hold ctrl-C and SIGTERM back while a worker starts: it inherits the mask, and its parent, who says so, ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
