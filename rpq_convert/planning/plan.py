"""Plan: what will happen to every parameter, and what the files will weigh, before a weight is read.

A plan is a frozen, JSON-able value. The dry run prints it, the executor runs it, the checkpoint keeps it. It knows every
tensor that will be written, so file sizes, headers and shards follow exactly (`Plan.files`); a test holds them to
`os.stat`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from rpq_convert.core.axes import WeightView
from rpq_convert.core.safetensors import file_size
from rpq_convert.core.spec import Spec, dtype_of
from rpq_convert.errors import PlanError
from rpq_convert.report.schema import Dropped, Report, Row, dropped_of, without_empty
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check
from rpq_convert.schemas.kinds import FORMAT_VERSION
from rpq_convert.version import __version__


@dataclass(frozen=True)
class Job:
    """One parameter to convert."""

    name: str
    aliases: tuple[str, ...]
    layer: str
    shape: tuple[int, ...]
    dtype: str
    view: str
    spec: Spec
    fit: str
    seed: int
    rule: str
    padding_idx: int | None = None
    reproducible: bool = False

    @property
    def is_random(self) -> bool:
        """Whether codes and codebooks are drawn, and the weights that there may be are not looked at."""
        return self.fit == "random"

    @property
    def weight_view(self) -> WeightView:
        return WeightView(self.view)

    @property
    def dense_bytes(self) -> int:
        return dtype_of(self.dtype).itemsize * math.prod(self.shape)

    @property
    def nbytes(self) -> dict[str, int]:
        return self.spec.nbytes(self.weight_view, self.shape)

    @property
    def memory_bytes(self) -> int | None:
        """Its bytes in memory, where files hold it in fewer."""
        return None if self.spec.rate is None else self.spec.memory_bytes(self.weight_view, self.shape)

    @property
    def expected_error(self) -> float:
        return 1.0 if self.is_random else self.spec.expected_error(self.weight_view, self.shape)


@dataclass(frozen=True)
class Skip:
    """One parameter or buffer that stays dense, and why. `dtype` is what is written."""

    name: str
    aliases: tuple[str, ...]
    layer: str
    shape: tuple[int, ...]
    dtype: str
    reason: str
    buffer: bool = False

    @property
    def nbytes(self) -> int:
        return dtype_of(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """Jobs, skips and everything that decides the files.

    Args:
        jobs, skips: in the order of the model's state dict.
        options: what was asked, for the record.
        max_shard_size: bytes of tensor data in one weight file.
        warnings: plain sentences for the user.
        parts: paths of the modules that are models themselves, which their own class may load from the same files.
        dropped: tensors of the source that are not written.
    """

    jobs: tuple[Job, ...]
    skips: tuple[Skip, ...]
    options: Mapping[str, Any]
    max_shard_size: int
    warnings: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    dropped: tuple[Dropped, ...] = ()

    @cached_property
    def guards(self) -> tuple[str, ...]:
        """The parameters under whose dense names an empty tensor is written: the first job of the model and of every part.

        A loader that does not know RPQ fails on their shape instead of running with random weights.
        """
        firsts = (self._first(part) for part in ("", *self.parts))
        return tuple(dict.fromkeys(name for name in firsts if name is not None))

    def _first(self, part: str) -> str | None:
        return next((j.name for j in self.jobs if not part or j.name.startswith(f"{part}.")), None)

    @cached_property
    def entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every tensor that is written: key -> (dtype, shape), guards first, then skips, then the jobs' tensors."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dict.fromkeys(self.guards, (torch.float32, (0,)))
        for skip in self.skips:
            found[skip.name] = (dtype_of(skip.dtype), skip.shape)
        for job in self.jobs:
            for part, (dtype, shape) in job.spec.stored(job.weight_view, job.shape).items():
                found[f"{job.name}_rpq.{part}"] = (dtype, shape)
        return found

    @cached_property
    def shards(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Return (file name, keys) of each weight file."""
        groups: list[list[str]] = [[]]
        size = 0
        for key, (dtype, shape) in self.entries.items():
            n = dtype.itemsize * math.prod(shape)
            if groups[-1] and size + n > self.max_shard_size:
                groups.append([])
                size = 0
            groups[-1].append(key)
            size += n
        if len(groups) == 1:
            return (("model.safetensors", tuple(groups[0])),)
        return tuple((f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for i, g in enumerate(groups, 1))

    @cached_property
    def files(self) -> dict[str, int]:
        """Return weight file name -> exact size in bytes, header included."""
        return {name: file_size({k: self.entries[k] for k in keys}) for name, keys in self.shards}

    @property
    def file_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def tensor_bytes(self) -> int:
        return sum(d.itemsize * math.prod(s) for d, s in self.entries.values())

    @property
    def is_reproducible(self) -> bool:
        """Whether every weight is fitted to the same bytes on every processor."""
        return bool(self.jobs) and all(job.reproducible for job in self.jobs)

    def rows(self) -> tuple[Row, ...]:
        """Return the report's rows as far as they are known before a fit."""
        rows = [
            Row(
                name=j.name, layer=j.layer, shape=j.shape, dtype=j.dtype, decision="rpq", reason=j.rule,
                dense_bytes=j.dense_bytes, codebook_bytes=j.nbytes["codebooks"], code_bytes=_sum(j, "codes", "stream", "frequencies"),
                scale_bytes=_sum(j, "scales", "input_scales"), outlier_bytes=_sum(j, "outliers", "positions"), spec=f"{j.spec.describe()}, {j.fit}",
                expected_error=j.expected_error, memory_bytes=j.memory_bytes, aliases=j.aliases,
            )
            for j in self.jobs
        ]  # fmt: skip
        rows += [
            Row(
                name=s.name, layer=s.layer, shape=s.shape, dtype=s.dtype, decision="buffer" if s.buffer else "dense",
                reason=s.reason, dense_bytes=s.nbytes, other_bytes=s.nbytes, aliases=s.aliases,
            )
            for s in self.skips
        ]  # fmt: skip
        return tuple(rows)

    def report(self, title: str = "plan") -> Report:
        """Return the plan as a size audit, nothing measured yet."""
        return Report(
            title=title, rows=self.rows(), warnings=self.warnings, options=dict(self.options),
            predicted_bytes=self.file_bytes, version=__version__, dropped=self.dropped,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Plan: {len(self.jobs)} jobs, {len(self.skips)} skips, {self.file_bytes:,} bytes>"

    def __str__(self) -> str:
        return str(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def explain(self, name: str) -> str:
        """Say what happens to one parameter, named by its path or its module's, and why."""
        for job in self.jobs:
            if name in _names(job):
                b = job.nbytes
                n, length = job.weight_view.matrix_shape(job.shape, job.spec.axis)
                return (
                    f"{job.name} ({job.layer}, {list(job.shape)} {job.dtype}) is converted by {job.rule}: a matrix of "
                    f"{n} x {length}, {job.spec.describe()}, fit {job.fit}. {job.dense_bytes:,} bytes become "
                    f"{sum(b.values()):,} ({', '.join(f'{k} {v:,}' for k, v in b.items())}), "
                    f"{8 * sum(b.values()) / math.prod(job.shape):.3f} bits per weight; expected relative squared error "
                    f"{job.expected_error:.2g}." + (f" Tied to {', '.join(job.aliases)}." if job.aliases else "")
                )
        for skip in self.skips:
            if name in _names(skip):
                return f"{skip.name} ({skip.layer}, {list(skip.shape)} {skip.dtype}) stays dense: {skip.reason}."
        raise PlanError(f"no parameter named {name!r} in the plan")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values; of its parts those that have a guard of their own."""
        found = {"format_version": FORMAT_VERSION} | without_empty(asdict(self), "dropped")
        found["jobs"] = [
            without_empty(job, "reproducible") | {"spec": own.spec.to_dict()}
            for job, own in zip(found["jobs"], self.jobs)
        ]
        parts = [p for p in found.pop("parts") if self._first(p) not in (None, self._first(""))]
        return found | ({"parts": parts} if parts else {})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "the value") -> Plan:
        """Return the plan that `to_dict` described.

        Args:
            where: what holds it, such as a file's path, for messages.

        Raises:
            PlanError: another format, or a field that is missing, unknown, of the wrong type or out of its range.
        """
        version = data.get("format_version", FORMAT_VERSION) if isinstance(data, Mapping) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise PlanError(f"{where} is not a plan of format {FORMAT_VERSION}, but {version!r}; update rpq-convert")
        check(data, kinds.PLAN, where, PlanError)
        return cls(
            jobs=tuple(_job(j, f"{where} is not a plan: jobs[{i}]") for i, j in enumerate(data["jobs"])),
            skips=tuple(_skip(s, f"{where} is not a plan: skips[{i}]") for i, s in enumerate(data["skips"])),
            options=data["options"],
            max_shard_size=data["max_shard_size"],
            warnings=tuple(data["warnings"]),
            parts=tuple(data.get("parts", ())),
            dropped=dropped_of(data.get("dropped", ())),
        )


def _sum(job: Job, *parts: str) -> int:
    return sum(job.nbytes.get(part, 0) for part in parts)


def _job(entry: Mapping[str, Any], where: str) -> Job:
    """Return a job whose fields have the right types; what they say together is checked here."""
    field = ".spec"
    try:
        spec = Spec(**entry["spec"])
        field = ""
        job = Job(**_tuples(entry) | {"spec": spec})
        tensors = {**spec.tensors(job.weight_view, job.shape), **spec.stored(job.weight_view, job.shape)}
    except ValueError as e:
        raise PlanError(f"{where}{field}: {e}") from None
    if large := [part for part, (_, size) in tensors.items() if math.prod(size) > kinds.MAX_NUMBERS]:
        raise PlanError(f"{where}.spec: {large[0]} would hold more than {kinds.MAX_NUMBERS:,} numbers")
    return job


def _skip(entry: Mapping[str, Any], where: str) -> Skip:
    try:
        dtype_of(entry["dtype"])
    except ValueError as e:
        raise PlanError(f"{where}.dtype: {e}") from None
    return Skip(**_tuples(entry))


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "aliases": tuple(entry["aliases"]), "shape": tuple(entry["shape"])}


def _names(item: Job | Skip) -> set[str]:
    return {n for full in (item.name, *item.aliases) for n in (full, full.rpartition(".")[0])}
