"""Threads: one kernel on several threads, which are torch's own.

torch multiplies with OpenMP threads, which spin for milliseconds when idle, so a second pool of threads would compete with
them for the cores. Here a compiled task runs on those same threads, through the OpenMP library that torch has loaded: a
dispatch costs 3 microseconds. Where that library is not found, ordinary Python threads run the task.

A task is a C function of one argument, the address of an int64 array; it takes numbers from a counter there until none is
left. What a number means follows from shapes alone, never from the number of threads, so results do not either.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import types

from rpq_convert.kernels.jit.cache import cfunc

SIGNATURE = types.void(types.CPointer(types.int64))
NEXT, COUNT, SLOT, SCRATCH, SCRATCH_BYTES = range(5)  # the first fields of every task's array
FIRST = 5  # the first field of a task's own

_pool: ThreadPoolExecutor | None = None
_local = threading.local()
_keep: list[Any] = []  # compiled functions live as long as their addresses are called


def _forget() -> None:
    global _pool
    _pool = None  # a forked child has none of the threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@cache
def compiled(task: Callable[..., None]) -> tuple[Any, Any]:
    """Compile a task (or read it from numba's cache on disk); return it as a function of an address, and its own address."""
    function: Any = cfunc(SIGNATURE, task)
    _keep.append(function)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address), function.address


@cache
def _openmp() -> Any:
    """Return torch's `GOMP_parallel`, or None."""
    torch.zeros(1)
    try:
        loaded = {m[0] for m in re.finditer(r"/\S*lib(?:gomp|iomp5|omp)\S*", Path("/proc/self/maps").read_text())}
        inside = [p for p in loaded if Path(p).parent == Path(torch.__file__).parent / "lib"]
        start = ctypes.CDLL(inside[0]).GOMP_parallel
    except (OSError, IndexError, AttributeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


class Work:
    """A task with its own fields, to be run many times: its array is prepared once, as microseconds count."""

    def __init__(self, task: Callable[..., None], fields: Any) -> None:
        self.function, self.address = compiled(task)
        self.kind = ctypes.c_int64 * (FIRST + len(fields))
        self.fields = self.kind(0, 0, 0, 0, 0, *fields)

    def run(
        self,
        stop: int,
        scratch_floats: int = 0,
        changes: tuple[tuple[int, int], ...] = (),
        *,
        first: int = 0,
        shared: tuple[int, int] = (0, 0),
    ) -> None:
        """Run numbers `first` to `stop` on at most `torch.get_num_threads()` threads; return when all are done.

        Args:
            scratch_floats: memory for each thread, at `fields[SCRATCH] + slot * fields[SCRATCH_BYTES]`.
            changes: (place in the array, value) of the fields that this call sets.
            shared: (place in the array, floats) of memory that all threads use.
        """
        threads = min(torch.get_num_threads(), stop - first) if stop - first > 1 else 1
        data = self.kind.from_buffer_copy(self.fields)
        for place, value in changes:
            data[place] = value
        data[NEXT], data[COUNT] = first, stop
        if scratch_floats:
            line = -(-scratch_floats // 16) * 16
            data[SCRATCH], data[SCRATCH_BYTES] = _scratch(line * threads + shared[1]), 4 * line
            if shared[1]:
                data[shared[0]] = data[SCRATCH] + 4 * line * threads
        at = ctypes.addressof(data)
        if threads == 1:
            self.function(at)
        else:
            _together(self.function, self.address, at, threads)


def run(task: Callable[..., None], fields: Any, stop: int, scratch_floats: int = 0, *, first: int = 0) -> None:
    """Run a task once."""
    Work(task, fields).run(stop, scratch_floats, first=first)


def _together(function: Any, address: int, at: int, threads: int) -> None:
    """Call a task's function on several threads at once."""
    global _pool
    start = _openmp()
    if start is not None:
        start(address, at, threads, 0)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="rpq-kernel")
    others = [_pool.submit(function, at) for _ in range(threads - 1)]
    function(at)
    for other in others:
        other.result()


def held_room(size: int, most: int) -> np.ndarray:
    """Return `size` bytes of this thread that the next call overwrites, aligned to a cache line.

    Fresh pages cost as much as filling them, so what is not more than `most` is kept.
    """
    held = getattr(_local, "room", None)
    if held is None or held.size < size + 64:
        held = np.empty(size + 64, np.uint8)
        if size <= most:
            _local.room = held
    start = -held.ctypes.data % 64
    return held[start : start + size]


def _scratch(floats: int) -> int:
    """Return the address of a buffer that belongs to the calling thread, aligned to a cache line."""
    held = getattr(_local, "buffer", None)
    if held is None or held[0].size < floats + 16:
        fresh = np.empty(floats + 16, np.float32)
        held = _local.buffer = (fresh, -(-fresh.ctypes.data // 64) * 64)
    return held[1]
