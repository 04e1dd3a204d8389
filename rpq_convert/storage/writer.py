"""The output folder: written under a temporary name, renamed when complete, resumable before.

Everything is written to `<out>.partial/`. Finished jobs are in its `pieces/`, one small safetensors file each (pieces.py). A killed run
continues after its last finished job. Weight files are then assembled from the pieces, one tensor in memory at a time, and their hashes
noted, so that a later run knows which of them are whole; the tensors then leave the pieces. The manifest is written last: a folder that
has one is complete, and only its name is left to be given (swap.py). Every file is written to a temporary name, synced and renamed; what
else lies in the folder when a run goes on is removed. Rejected: writing shards directly, which loses up to a shard's work to a kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.safetensors import SAFETENSORS_NAMES
from rpq_convert.errors import FolderError, SourceError, VerifyError
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.showing import notice
from rpq_convert.storage import swap
from rpq_convert.storage.assembly import copy_file, digest, write_file, write_tensors, write_tensors_to
from rpq_convert.storage.files import INDEX
from rpq_convert.storage.manifest import is_whole, made_now, write_manifest
from rpq_convert.storage.origin import Origin, difference
from rpq_convert.storage.pickles import PickleSource
from rpq_convert.storage.pieces import Pieces
from rpq_convert.storage.records import MANIFEST, ORIGIN, PLAN, WRITTEN, read_manifest
from rpq_convert.storage.room import bytes_to_write, check_free, check_room

HINT = "; delete the folder, or pass overwrite=True"  # what to do about an unfinished run that cannot go on


class Folder:
    """One output folder in the making. Whoever makes it holds its lock (`lock.locked`).

    Args:
        out: the final path.
        plan: what will be written. An unfinished run with another plan is never continued.
        origin: what the source is; an unfinished run of another source is never continued. None for a model in memory, whose run is
            never continued either.
        overwrite: replace an existing folder, once the new one is complete, and discard an unfinished run.
        closely: compare all bytes of the source with what an earlier run has fitted, and again at the end.
        keeps_plan: the finished folder has the plan in it.

    Attributes:
        is_complete: an earlier run wrote everything, and only `finish` is left.

    Raises:
        FolderError: `out` exists, or an unfinished run of another plan or source does.
    """

    def __init__(
        self, out: str | Path, plan: Plan, *, overwrite: bool = False, origin: Origin | None = None, closely: bool = False,
        keeps_plan: bool = True,
    ) -> None:  # fmt: skip
        self.out, self.plan, self.overwrite, self.keeps_plan = Path(out), plan, overwrite, keeps_plan
        for key, (dtype, _) in plan.entries.items():
            if dtype not in SAFETENSORS_NAMES:
                raise FolderError(
                    f"{key} is {dtype}, which safetensors cannot hold; cast it, or register it with persistent=False"
                )
        self.work = swap.work_of(self.out)
        self.pieces = Pieces(self.work)
        swap.recover(self.out)
        check_free(self.out, overwrite=overwrite)
        self.origin, self.closely = origin, closely
        self.source = None if origin is None else origin.record(whole=closely)
        self.seen = [] if origin is None else origin.seen()
        self.written: dict[str, Any] = {}  # weight file -> its entry in the manifest
        self.is_complete = self._is_complete()
        if self.is_complete:
            return
        goes_on = self._begun() and self._goes_on()
        if not goes_on:
            swap.remove(self.work)
        check_room(self.out, bytes_to_write(self.out, plan))
        self.pieces.folder.mkdir(parents=True, exist_ok=True)
        if not goes_on:
            self._note_source()
            write_file(self.work / PLAN, plan.to_json())

    def _begun(self) -> bool:
        """Return whether an earlier run left work that would be lost; one that failed at its start left none."""
        if not self.work.exists():
            return False
        early = {f"{ORIGIN}.partial", f"{PLAN}.partial", ORIGIN, PLAN, self.pieces.folder.name}
        others = any(p.name not in early for p in self.work.iterdir())
        return others or any(self.pieces.folder.glob("*.safetensors"))

    def _is_complete(self) -> bool:
        """Return whether an earlier run wrote all of this very folder, and was killed before it got its name."""
        if self.source is None or not (self.work / MANIFEST).is_file():
            return False
        try:
            manifest = read_manifest(self.work)
        except VerifyError:
            return False
        made = manifest.get("made") or {}
        if made.get("plan") != self.plan.sha256 or difference(made.get("source") or {"files": []}, self.source):
            return False
        return all(is_whole(self.work / name, facts) for name, facts in manifest["files"].items())

    def _goes_on(self) -> bool:
        """Take over what an earlier run left; return whether it is of use.

        Raises:
            FolderError: it is of use to another run, and may not be discarded.
        """
        origin = self.work / ORIGIN
        if origin.is_file() and not origin.stat().st_size:  # of a model in memory: written anew in a moment
            return False
        try:
            before, why = self._earlier()
        except FolderError:
            if not self.overwrite:
                raise
            return False
        if why and not self.overwrite:
            raise FolderError(f"{self.work} holds an unfinished run {why}; delete it, or pass overwrite=True")
        if why:
            return False
        self.closely = self.closely or [[*file] for file in before["seen"]] != self.seen
        self.written = self._whole_files()
        self._hold()
        self._clear()
        return True

    def _earlier(self) -> tuple[dict[str, Any], str]:
        """Return the source of an unfinished run, and why it cannot be continued; damaged records are refused."""
        plan, origin = self.work / PLAN, self.work / ORIGIN
        same = plan.is_file() and plan.read_text("utf8", errors="replace") == self.plan.to_json()
        if plan.is_file() and not same:
            read_json(plan, kinds.PLAN, FolderError, HINT)
        before = read_json(origin, kinds.ORIGIN, FolderError, HINT) if origin.is_file() else {}
        if not (same and before and self.source is not None):
            return before, f"with other settings{self._others(plan)}"
        changed = difference(before, self.source)
        return before, f"of a source that has changed since: {changed}" if changed else ""

    def _others(self, stored: Path) -> str:
        """Say which settings an unfinished run had, where they can be told."""
        before = read_json(stored, kinds.PLAN, FolderError)["options"] if stored.is_file() else {}
        now = json.loads(self.plan.to_json())["options"]
        names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
        told = [f"{n} {'other data' if n == 'calibration' else before.get(n)}" for n in names[:3]]
        return f" ({', '.join(told)}); repeat them to go on" if told else "; repeat them to go on"

    def _whole_files(self) -> dict[str, Any]:
        """Return the weight files that an earlier run assembled and that are as they were written."""
        record = self.work / WRITTEN
        try:
            written = read_json(record, kinds.WRITTEN, FolderError) if record.is_file() else {}
        except FolderError as e:
            notice(f"{e}; weight files are assembled again")
            written = {}
        whole = {n: facts for n, facts in written.items() if is_whole(self.work / n, facts)}
        for name in written.keys() - whole.keys():
            notice(f"{self.work / name} is damaged; it is assembled again")
        return {n: facts for n, facts in whole.items() if n in self.plan.files}

    def _clear(self) -> None:
        """Remove whatever a run that goes on will write anew, such as files that a killed one had not finished."""
        kept = {self.work / name for name in (ORIGIN, PLAN, WRITTEN, *self.written)}
        kept |= {self.pieces.path(job) for job in self.plan.jobs}
        for path in sorted(self.work.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                path.unlink()

    def _note_source(self) -> None:
        found = self.source and {**self.source, "seen": self.seen}
        write_file(self.work / ORIGIN, json.dumps(found, indent=1) if found else "")

    def forget(self) -> None:
        """Remove a run that failed before anything was done; what was done is kept for the next one."""
        if self.work.exists() and not self._begun():
            swap.remove(self.work)

    def compare(self, weight: Callable[[Job], Tensor], dense: Callable[[str], Tensor]) -> None:
        """Hold what an earlier run has written against the source, weight by weight, where that may have changed.

        Args:
            weight: the tensor of a job. dense: one that stays dense, by its name.

        Raises:
            FolderError: the source holds other values. With `overwrite` all is made anew instead.
        """
        if not self.closely:
            return
        if name := self._changed(weight, dense):
            if not self.overwrite:
                raise FolderError(
                    f"{self.work} holds an unfinished run of a source that has changed since: {name} has other values{HINT}"
                )
            swap.remove(self.work)
            self.written, self.pieces = {}, Pieces(self.work)
            self.pieces.folder.mkdir(parents=True)
            write_file(self.work / PLAN, self.plan.to_json())
        self._note_source()

    def check_source(self, weight: Callable[[Job], Tensor], dense: Callable[[str], Tensor]) -> None:
        """Refuse to finish what was made from a source that changed meanwhile.

        Raises:
            SourceError: which file or tensor.
        """
        if self.origin is None or self.source is None:
            return
        try:
            changed = difference(self.source, self.origin.record(whole=self.closely))
            if not changed and (self.closely or self.origin.seen() != self.seen):
                name = self._changed(weight, dense)
                changed = f"{name} has other values" if name else ""
        except FileNotFoundError as e:
            changed = f"{e.filename} is gone"
        if changed:
            raise SourceError(
                f"the source has changed while it was converted: {changed}; delete {self.work} and begin anew"
            )

    def _changed(self, weight: Callable[[Job], Tensor], dense: Callable[[str], Tensor]) -> str:
        """Return the name of a tensor that was written, and has other values in the source; empty where all are the same."""
        for job in self.plan.jobs:
            known = self.pieces.facts(job).get("source") if self.pieces.done(job) else None
            if known is not None and known != digest(weight(job)):
                return job.name
        kept = {s.name for s in self.plan.skips}
        for facts in self.written.values():
            for key, known in facts["tensors"].items():
                if key in kept and known != digest(self._dense(key, dense)):
                    return str(key)
        return ""

    def write_weights(self, dense: Callable[[str], Tensor], progress: Callable[[str], None] | None = None) -> None:
        """Assemble the weight files; `dense(name)` gives what stays dense."""
        plan = self.plan
        computed = {f"{j.name}_rpq.{p}": (j, p) for j in plan.jobs for p in j.nbytes}
        kept = {s.name for s in plan.skips}
        not_finite: list[str] = []

        def tensor(key: str) -> Tensor:
            if key in computed:
                job, part = computed[key]
                return self.pieces.tensors(job)[part]
            if key not in kept:
                dtype, shape = plan.entries[key]
                return torch.empty(shape, dtype=dtype)  # a guard
            value = self._dense(key, dense)
            if not is_finite(value):
                not_finite.append(key)
            return value

        waiting = list(plan.jobs)
        for name, keys in plan.shards:
            if name not in self.written:
                not_finite.clear()
                path, size = self.work / name, plan.files[name]
                found = write_tensors_to(path, {k: plan.entries[k] for k in keys}, tensor)
                if path.stat().st_size != size:
                    raise FolderError(f"{path} has {path.stat().st_size} bytes where the plan says {size}")
                facts = {
                    "bytes": size,
                    "sha256": found.sha256,
                    "tensors": dict(found.tensors),
                    "not_finite": [*not_finite],
                }
                self.written[name] = facts
                write_file(self.work / WRITTEN, json.dumps(self.written))
            self._hold()
            waiting = [job for job in waiting if not self.pieces.move(job)]
            if progress:
                progress(name)
        if len(plan.shards) > 1:
            index = {
                "metadata": {"total_size": plan.tensor_bytes},
                "weight_map": {k: n for n, ks in plan.shards for k in ks},
            }
            write_file(self.work / INDEX, json.dumps(index, indent=1))

    def _hold(self) -> None:
        """Tell the pieces which weight files are whole."""
        self.pieces.files = {
            key: self.work / name for name, keys in self.plan.shards if name in self.written for key in keys
        }

    def _dense(self, key: str, dense: Callable[[str], Tensor]) -> Tensor:
        """Return a tensor that stays dense as it is written."""
        dtype, shape = self.plan.entries[key]
        value = dense(key).detach().to("cpu", dtype)
        if tuple(value.shape) != shape:
            raise FolderError(f"{key}: the plan says {list(shape)}, the source has {list(value.shape)}")
        return value.contiguous()

    def write(self, name: str, content: str | bytes) -> None:
        write_file(self.work / name, content)

    def copy(self, files: Mapping[str, Path]) -> None:
        """Copy files: path inside the folder -> file. Pickled weights that get the name of safetensors become such."""
        for name, file in files.items():
            place = self.work / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors") and file.suffix != ".safetensors":
                write_tensors(place, {k: t.contiguous() for k, t in PickleSource([file]).items()})
            else:
                copy_file(file, place)

    @property
    def not_finite(self) -> set[str]:
        """The dense tensors that hold NaN or infinite values where they come from."""
        return {name for facts in self.written.values() for name in facts["not_finite"]}

    def broken(self) -> set[str]:
        """Return the names of parameters that held NaN or infinite values. In a buffer, such as a mask, they are meant."""
        return self.not_finite - {s.name for s in self.plan.skips if s.buffer}

    def files(self) -> dict[str, Path]:
        """Return path inside the folder -> file, of everything that stays in it when it is finished."""
        inside = {p.relative_to(self.work).as_posix(): p for p in sorted(self.work.rglob("*")) if p.is_file()}
        return {n: p for n, p in inside.items() if n not in self._left() and not p.is_relative_to(self.pieces.folder)}

    def _left(self) -> tuple[str, ...]:
        """Return the records that are of the making only."""
        return (ORIGIN, WRITTEN) if self.keeps_plan else (ORIGIN, WRITTEN, PLAN)

    def finish(self) -> Path:
        """Write the manifest, remove what is of the making only (late, since a run may be killed while it hashes), rename."""
        if not self.is_complete:
            source = self.source and {**self.source, "tensors": self._fitted_to()}
            made = made_now(self.plan, source)
            write_manifest(self.work, self.files(), sorted(self.not_finite - self.broken()), made, self.written)
        swap.remove(self.pieces.folder)
        for name in self._left():
            swap.remove(self.work / name)
        swap.put_in_place(self.work, self.out)
        return self.out

    def _fitted_to(self) -> dict[str, str]:
        found = {job.name: self.pieces.facts(job).get("source") for job in self.plan.jobs}
        return {name: known for name, known in found.items() if known is not None}


FINITE = 1 << 22  # numbers looked at together


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinite values."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    parts = torch.split(tensor.reshape(-1), FINITE)
    return all(bool(torch.isfinite(p.float() if p.is_floating_point() else p).all()) for p in parts)
