"""Cluster: jobs as tasks of a Ray cluster (`executor="ray"`).

A task reads its tensor where it runs, if the machine there sees the same source: a shared path, whose files are compared, or an address.
Otherwise the tensor is sent with the task. What was fitted is written as a piece by the task, if the machine sees the same output folder, and
sent back otherwise. A job and its tensor decide the result, so it does not matter where a task runs, or how often: a task whose worker is lost
runs again.

Ray is imported when it is asked for, and what is started here sends nothing out: no dashboard, no usage statistics.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpq_convert.checkpoint.opening import either
from rpq_convert.core.results import Encoded, Statistics
from rpq_convert.encoding.encode import encode
from rpq_convert.errors import EncodeError, PlanError, SourceError
from rpq_convert.planning import needs
from rpq_convert.planning.plan import Job
from rpq_convert.report.text import megabytes
from rpq_convert.running.processor import family
from rpq_convert.showing import notice
from rpq_convert.storage.assembly import digest
from rpq_convert.storage.origin import Origin, difference
from rpq_convert.storage.pieces import Pieces
from rpq_convert.storage.reader import SafetensorsSource, Witnessed
from rpq_convert.storage.records import ORIGIN, PLAN, sha256
from rpq_convert.version import __version__

TRIES = 3  # further ones, of a task whose worker is lost
ROUND = 1 << 30  # bytes: tasks that ask for the same can follow each other in one worker
PATIENCE = 5.0  # seconds in which a piece becomes visible that another machine has written
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
NOT_HERE = "the source is not here"


@contextmanager
def connected(executor: str, address: str | None = None) -> Iterator[None]:
    """Be connected to a cluster while a conversion runs; where the executor is another one, nothing is done.

    Args:
        address: `host:port`, `ray://host:port` or `auto`; by default RAY_ADDRESS in the environment, or a cluster of this machine alone, which is
            started, and ended afterwards. A process that is connected stays so.

    Raises:
        PlanError: Ray is not installed, or no cluster answers.
    """
    if executor != "ray":
        yield
        return
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    how: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    if address:
        _check_answers(address)
    with _own_signals():
        try:
            ray.init(**how, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as e:
            said = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise PlanError(f"no Ray cluster answers at {address or 'this machine'}: {said}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens: Ray would wait for it for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\]]+?)\]?:(\d+)", address)
    if found is None:
        return  # such as auto
    try:
        socket.create_connection((found[1], int(found[2])), timeout=PATIENCE).close()
    except (OSError, OverflowError) as e:
        said = getattr(e, "strerror", None) or str(e)
        raise PlanError(f"no Ray cluster answers at {address}: {said}; start one with `ray start --head`") from None


def _ray() -> Any:
    try:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import ray
    except ImportError:
        raise PlanError("executor ray needs a package: pip install 'rpq-convert[ray]'") from None
    return ray


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what SIGTERM does: Ray takes it over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Ask:
    """What all tasks of a run are told.

    Args:
        source: where each finds its tensor, and the record of its files; None where it is sent. std: as for `encode`.
        work: the folder where pieces are written, and the hashes of its plan and its source; None where results are sent back.
        cwd: the folder that relative paths begin at.
    """

    source: tuple[Any, Mapping[str, Any]] | None
    std: float | None = None
    work: tuple[Path, str] | None = None
    version: str = __version__
    cwd: str = field(default_factory=os.getcwd)

    @classmethod
    def of(cls, source: Mapping[str, Tensor], std: float | None, pieces: Pieces | None) -> Ask:
        inner = source.source if isinstance(source, Witnessed) else source
        files: Any = inner
        while files is not None and not isinstance(files, SafetensorsSource):
            files = getattr(files, "source", None)
        found = None if files is None else (inner, Origin.of(files.infos.values()).record())
        work = None if pieces is None else pieces.folder.parent.absolute()
        return cls(found, std, None if work is None else (work, _seal(work)))

    def reads(self) -> bool:
        """Return whether the tensors can be read in this process."""
        assert self.source is not None
        source, known = self.source
        while not isinstance(source, SafetensorsSource):
            source = source.source
        try:
            return not difference(known, Origin.of(source.infos.values()).record())
        except (OSError, SourceError):
            return False

    def writes(self) -> bool:
        """Return whether this process sees the output folder of the run."""
        return self.work is not None and _seal(self.work[0]) == self.work[1]


def _seal(work: Path) -> str:
    """Return what tells an unfinished output folder from any other; empty where there is none."""
    try:
        return sha256(work / PLAN) + sha256(work / ORIGIN)
    except OSError:
        return ""


@dataclass(frozen=True)
class Done:
    """What a task says: the result, without tensors where they are written; the hash of its tensor; the kind of its processor."""

    encoded: Encoded | None
    source: str | None = None
    processor: str = ""
    note: str = ""


@lru_cache(2)
def _told(ref: str) -> tuple[Ask, bool, bool]:
    """Return what the tasks of a run are told, and what this process sees of it; asked once a process and run."""
    ask = _asks[ref]
    if Path(ask.cwd).is_dir():
        os.chdir(ask.cwd)
    return ask, ask.source is not None and ask.reads(), ask.writes()


_asks: dict[str, Ask] = {}


def _task(
    ref: list[Any], job: Job, tensor: Tensor | None, statistics: Statistics | None, start: Any, *, store: bool
) -> Done:
    """Do one job, on a machine of the cluster.

    Args:
        ref: a reference to what all tasks are told. tensor: None where it is read here. store: write the piece where that is possible.
    """
    import ray

    torch.set_num_threads(1)
    key = ref[0].hex()
    if key not in _asks:
        _asks.clear()
        _asks[key] = ray.get(ref[0])
    ask, reads, writes = _told(key)
    if ask.version != __version__:
        raise PlanError(f"the cluster has rpq-convert {__version__}, and this is {ask.version}: install the same there")
    if tensor is None:
        if not reads or ask.source is None:
            return Done(None, note=NOT_HERE)
        tensor = either(ask.source[0], (job.name, *job.aliases))
    known = None if tensor.is_meta else digest(tensor)
    encoded = encode(
        job, tensor.detach().to(getattr(torch, job.dtype)), std=ask.std, statistics=statistics, start=start
    )
    if not (store and writes and ask.work is not None):
        return Done(encoded, known, family())
    Pieces(ask.work[0]).put(job, encoded, known)
    return Done(replace(encoded, tensors={}), known, family())


class Run:
    """Jobs that run on the cluster.

    Args:
        source: their tensors. std: as for `encode`. pieces: where their results belong, if tasks may write them.
        statistics, start: as for `run_jobs`. workers: how many run at once at most; by default as many as the cluster has processors.
    """

    def __init__(
        self, source: Mapping[str, Tensor], *, std: float | None, pieces: Pieces | None, statistics: Mapping[str, Any],
        start: Mapping[str, Any], workers: int | None,
    ) -> None:  # fmt: skip
        self.ray, self.source, self.pieces = _ray(), source, pieces
        self.statistics, self.start = statistics, start
        self.ask = Ask.of(source, std, pieces)
        self.ref = [self.ray.put(self.ask)]
        self.sends = self.ask.source is None
        processors = max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        self.limit = (
            workers if workers and workers < processors else processors + 1
        )  # one waits there for the next that is free
        self.task = self.ray.remote(max_retries=TRIES, num_cpus=1)(_task)
        self.shared: dict[
            int, tuple[Any, Any]
        ] = {}  # by id, what several jobs are given, and where it lies in the object store
        self.told: set[str] = set()

    def results(self, jobs: Iterable[Job]) -> Iterator[Encoded]:
        """Yield results in the order of completion; no more jobs than may run at once, and one, have been given to the cluster."""
        waiting: dict[Any, Job] = {}
        left, again = iter(jobs), deque[Job]()
        try:
            while True:
                while len(waiting) < self.limit and (job := again.popleft() if again else next(left, None)) is not None:
                    waiting[self._begin(job)] = job
                if not waiting:
                    return
                (ref,), _ = self.ray.wait([*waiting], num_returns=1)
                job = waiting.pop(ref)
                done = self._end(job, ref)
                if done is None:
                    again.append(job)
                else:
                    yield done
        finally:
            for ref in waiting:
                self.ray.cancel(ref)

    def _begin(self, job: Job) -> Any:
        tensor = either(self.source, (job.name, *job.aliases)).detach() if self.sends else None
        memory = -(-(needs.fit_bytes(job) + needs.BASE) // ROUND) * ROUND
        most = max((n["Resources"].get("memory", 0) for n in self.ray.nodes() if n["Alive"]), default=0)
        if memory > most:
            raise PlanError(
                f"{job.name} needs {megabytes(memory)} of memory to fit, and no machine of the cluster has more than {megabytes(int(most))}"
            )
        return self.task.options(memory=memory).remote(
            self.ref, job, tensor, self._put(self.statistics.get(job.name)), self._put(self.start.get(job.name)), store=self.pieces is not None
        )  # fmt: skip

    def _put(self, value: Any) -> Any:
        """Put what several jobs are given into the object store, once."""
        if value is None:
            return None
        if id(value) not in self.shared:
            self.shared[id(value)] = value, self.ray.put(value)  # kept, so that nothing else gets its id
        return self.shared[id(value)][1]

    def _end(self, job: Job, ref: Any) -> Encoded | None:
        """Return a job's result, or None where it has to run again, otherwise."""
        done = self._got(job, ref)
        if done.note == NOT_HERE:
            self._say("machines of the cluster do not see the source, so its tensors are sent to them")
            self.sends = True
            return None
        if done.processor != family():
            self._say(
                f"machines of the cluster are of another kind ({done.processor}): some codes are not those of this one"
            )
        if isinstance(self.source, Witnessed) and done.source is not None:
            self.source.digests[job.name] = done.source
        if done.encoded is not None and not done.encoded.tensors and not self._visible(job):
            self._say("pieces that the cluster has written are not seen here, so results are sent back")
            self.pieces = None
            return None
        return done.encoded

    def _got(self, job: Job, ref: Any) -> Done:
        errors = self.ray.exceptions
        try:
            found: Done = self.ray.get(ref)
            return found
        except errors.RayTaskError as e:
            cause = getattr(e, "cause", None) or e
            if isinstance(cause, (ImportError, RuntimeError)) and "import" in str(cause):
                raise PlanError(
                    f"the cluster cannot import rpq-convert {__version__}: install it on every machine"
                ) from None
            raise cause from None
        except errors.RayError as e:
            raise EncodeError(
                f"{job.name}: its worker was lost {TRIES + 1} times ({type(e).__name__}), perhaps for want of memory; "
                "run the same command again to go on"
            ) from None

    def _visible(self, job: Job) -> bool:
        """Return whether a piece that another machine has written is there; a network mount may show it late."""
        assert self.pieces is not None
        end = time.monotonic() + PATIENCE
        while not self.pieces.path(job).is_file():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _say(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            notice(text)
