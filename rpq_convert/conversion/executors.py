"""Executors: how jobs run. Each is a generator that maps a function over items and holds few of them at a time.

An executor knows nothing of weights. It takes items lazily, so that at most `workers` tensors are read ahead, and yields
results as they finish. Every job carries its own seed, so the results do not depend on which executor ran them.

Between processes tensors travel as bytes. torch would send file descriptors through a thread of its own, which prints a
traceback when a worker dies in the middle of it.
"""

from __future__ import annotations

import io
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpq_convert.conversion.asked import check_executor


def run(fn: Callable[[Any], Any], items: Iterable[Any], *, executor: str = "serial", workers: int = 1) -> Iterator[Any]:
    """Yield `fn(item)` for every item, in the order of completion.

    Args:
        executor: `serial`; `threads` (fits release the interpreter lock); `processes` (spawned; `fn` and items must
            be importable and picklable).
        workers: how many run at once.
    """
    check_executor(executor, None)
    if executor == "serial" or workers <= 1:
        yield from map(fn, items)
    elif executor == "threads":
        with ThreadPoolExecutor(workers) as pool:
            yield from _bounded(pool, fn, items, workers)
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            packed = map(_pack, items)
            yield from map(pickle.loads, _bounded(pool, partial(_packed, fn), packed, workers))


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


def _bounded(pool: Executor, fn: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    waiting: set[Future[Any]] = set()
    source = iter(items)
    try:
        while True:
            while len(waiting) < workers:
                try:
                    item = next(source)
                    with _deaf():
                        waiting.add(pool.submit(fn, item))
                except StopIteration:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def _deaf() -> Iterator[None]:
    """Hold ctrl-C back while a worker starts: it inherits the mask, and what it would print is the parent's to say."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
