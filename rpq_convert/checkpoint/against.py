"""Verify a converted folder against its source: that it was made from that, and that its weights are what a conversion makes of it.

A weight's error is measured again from source and codes, however it was fitted, and held against the report. A weight that was fitted to itself
alone, by a conversion into a folder, is fitted again and must have the same bytes; on another kind of processor it would not, unless it is
reproducible, so that is left out there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from rpq_convert.checkpoint.opening import Opened, either, open_checkpoint
from rpq_convert.core import description
from rpq_convert.encoding.encode import encode
from rpq_convert.encoding.measure import weight_errors
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.kernels.rans import packed
from rpq_convert.layers.weight import RPQWeight
from rpq_convert.planning.plan import Job, Plan, Skip
from rpq_convert.report.schema import read_report
from rpq_convert.running.processor import family
from rpq_convert.running.progress import Progress
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.assembly import digest
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.records import PLAN, REPORT, read_manifest
from rpq_convert.storage.sources import read_config
from rpq_convert.storage.unpacking import checked

SAMPLE = 3  # weights, and tensors that stay dense, that are looked at by default
CLOSE = 1e-3  # relative difference of errors that are measured on different processors
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """What was compared with the source, in numbers of tensors.

    Args:
        weights: converted ones whose error is what the report says, of so many in `total`. traced: those of them whose source is the one on record.
        refitted: those that were fitted again, to the same bytes. dense: tensors that stayed dense, equal.
        note: why none was fitted again; empty where some were.
    """

    weights: int
    total: int
    traced: int
    refitted: int
    dense: int
    note: str = ""

    def __str__(self) -> str:
        said = f"{self.weights} of {self.total} weights have the errors of the report, {self.traced} were made from these very values, "
        said += f"{self.refitted} were fitted again to the same bytes; {self.dense} dense tensors are equal"
        return said + (f" ({self.note})" if self.note else "")


def compare_with_source(
    folder: Path, src: str | Path, options: SourceOptions, *, every: bool = False, progress: Progress | None = None
) -> Comparison:
    """Hold the weights of a converted folder against its source.

    Args:
        folder: verified before. src, options: the dense checkpoint, as for `rpq.convert_checkpoint`.
        every: look at all tensors, not at a sample.

    Raises:
        VerifyError: which tensor is not what a conversion makes of the source. SourceError: the source cannot be read.
    """
    plan = Plan.from_dict(read_json(folder / PLAN, kinds.PLAN, VerifyError), str(folder / PLAN))
    rows = {row.name: row for row in read_report(folder / REPORT).rows}
    contents = description.read_all(read_config(folder)["quantization_config"])
    files = open_folder(folder)
    stored, opened = checked(files, contents), open_checkpoint(src, options)
    if opened.source is None:
        raise SourceError(f"{src} has no weights to compare with")
    made = read_manifest(folder).get("made") or {}
    known = (made.get("source") or {}).get("tensors", {})
    note = _why_not_again(made, known, plan)
    jobs, skips = _some(plan.jobs, every), _some([s for s in plan.skips if s.name in files], every)
    traced = refitted = 0
    for number, job in enumerate(jobs):
        if progress:
            progress(f"comparing {job.name}", number, len(jobs))
        tensor = _of(opened, job).to(getattr(torch, job.dtype))
        if job.name in known:
            if digest(_of(opened, job)) != known[job.name]:
                raise VerifyError(f"{job.name}: {src} holds other values than those that {folder} was made from")
            traced += 1
        _check_error(job, tensor, stored, contents.modules[job.name], rows[job.name].error, src)
        if not note and rows[job.name].inputs is None:
            _check_again(job, tensor, files)
            refitted += 1
    for skip in skips:
        wanted = _of(opened, skip).to(files[skip.name].dtype)
        if digest(wanted) != digest(files[skip.name]):
            raise VerifyError(f"{skip.name}: {src} holds other values than {folder}, which keeps it dense")
    if not refitted and not note:
        note = "none was fitted again: all were fitted to the inputs of their layers"
    return Comparison(len(jobs), len(plan.jobs), traced, refitted, len(skips), note)


def _of(opened: Opened, item: Job | Skip) -> torch.Tensor:
    names = (item.name, *item.aliases)
    if not any(n in opened.source for n in names):
        raise VerifyError(f"{opened.src} has no tensor {item.name}, which the folder was made from")
    tensor = either(opened.source, names).detach()
    if tuple(tensor.shape) != item.shape:
        raise VerifyError(f"{item.name} is {list(tensor.shape)} in {opened.src}, and {list(item.shape)} in the folder")
    return tensor


def _why_not_again(made: Mapping[str, Any], known: Mapping[str, str], plan: Plan) -> str:
    """Say why no weight is fitted again; empty where they can be."""
    if not known:
        return "none was fitted again: the folder does not say what its weights were fitted to"
    if made.get("processor") != family() and not plan.is_reproducible:
        return f"none was fitted again: the folder was made on another kind of processor ({made.get('processor')})"
    return ""


def _check_error(
    job: Job, tensor: torch.Tensor, stored: Any, what: Any, reported: float | None, src: str | Path
) -> None:
    """Measure a weight's error from its codes, and compare it with the report's."""
    if reported is None:
        return
    rpq = RPQWeight.of(what, "meta")
    for part in rpq.tensors():
        rpq.set_tensor(part, stored[f"{job.name}_rpq.{part}"])
    error, _ = weight_errors(tensor.float(), rpq)
    if not math.isclose(error, reported, rel_tol=CLOSE, abs_tol=1e-9):
        raise VerifyError(f"{job.name}: its error against {src} is {error:.4g}, and the report says {reported:.4g}")


def _check_again(job: Job, tensor: torch.Tensor, files: Any) -> None:
    encoded = encode(job, tensor)
    for part, found in packed(job.spec, job.weight_view, job.shape, encoded.tensors).items():
        if digest(found) != digest(files[f"{job.name}_rpq.{part}"]):
            raise VerifyError(f"{job.name}: fitted again, its {part} are not those of the folder")


def _some(items: Sequence[T], every: bool) -> list[T]:
    """Return a sample, evenly over all."""
    if every or len(items) <= SAMPLE:
        return list(items)
    return [items[i * (len(items) - 1) // (SAMPLE - 1)] for i in range(SAMPLE)]
