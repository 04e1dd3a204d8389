"""The output folder: written under a temporary name, renamed when complete, resumable before.

Everything is written to `<out>.partial/`. Finished jobs are in its `pieces/`, one small safetensors file each, written to a
temporary name, synced and renamed. A killed run continues after its last finished job. Weight files are then assembled from
the pieces, one tensor in memory at a time. At the end the folder gets its real name, so a folder without `.partial` is always
complete. Rejected: writing shards directly, which loses up to a shard's work to a kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpq_convert.core import description
from rpq_convert.core.results import Encoded
from rpq_convert.core.safetensors import SAFETENSORS_NAMES
from rpq_convert.errors import FolderError
from rpq_convert.kernels.rans import packed, unpacked
from rpq_convert.planning.plan import Job, Plan
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check, parse_json, read_json
from rpq_convert.storage.assembly import write_tensors_to, writing
from rpq_convert.storage.files import INDEX
from rpq_convert.storage.pickles import PickleSource
from rpq_convert.storage.records import MANIFEST, ORIGIN, PLAN, read_manifest, sha256
from rpq_convert.storage.room import check_free, check_room

AGAIN = "; delete it and run the same command again"  # what to do about a piece that does not serve


class Folder:
    """One output folder in the making.

    Args:
        out: the final path.
        plan: what will be written. An unfinished run with another plan is never continued.
        origin: what the source is (names, sizes, times). An unfinished run of another source is never continued.
        overwrite: replace an existing folder, once the new one is complete, and discard an unfinished run.

    Raises:
        FolderError: `out` exists, or an unfinished run of another plan does.
    """

    def __init__(self, out: str | Path, plan: Plan, *, overwrite: bool = False, origin: str = "") -> None:
        self.out, self.plan, self.overwrite = Path(out), plan, overwrite
        self.not_finite: set[str] = set()  # dense tensors that hold NaN or infinite values where they come from
        for key, (dtype, _) in plan.entries.items():
            if dtype not in SAFETENSORS_NAMES:
                raise FolderError(
                    f"{key} is {dtype}, which safetensors cannot hold; cast it, or register it with persistent=False"
                )
        self.work = work_of(self.out)
        check_free(self.out, overwrite=overwrite)
        stored = self.work / PLAN
        self.origin = self.work / ORIGIN
        self.pieces = self.work / "pieces"
        if self._begun():
            same = stored.is_file() and stored.read_text("utf8", errors="replace") == plan.to_json()
            fresh = self.origin.is_file() and self.origin.read_text("utf8", errors="replace") == origin
            if not (same and fresh) and not overwrite:
                self._check_records(stored)
                what = "of a source that has changed since" if same else f"with other settings{self._others(stored)}"
                raise FolderError(f"{self.work} holds an unfinished run {what}; delete it, or pass overwrite=True")
            if not (same and fresh):
                shutil.rmtree(self.work)
        check_room(self.out, bytes_to_write(self.out, plan))
        self.work.mkdir(parents=True, exist_ok=True)
        write_file(self.origin, origin)
        write_file(stored, plan.to_json())
        self.pieces.mkdir(exist_ok=True)

    def _begun(self) -> bool:
        """Return whether an earlier run left work that would be lost; one that failed at its start left none."""
        if not self.work.exists():
            return False
        early = {f"{ORIGIN}.partial", f"{PLAN}.partial", ORIGIN, PLAN, self.pieces.name}
        others = any(p.name not in early for p in self.work.iterdir())
        return others or any(self.pieces.glob("*.safetensors"))

    def forget(self) -> None:
        """Remove a run that failed before anything was done; what was done is kept for the next one."""
        if self.work.exists() and not self._begun():
            shutil.rmtree(self.work)

    def _others(self, stored: Path) -> str:
        """Say which settings an unfinished run had, where they can be told."""
        before = read_json(stored, kinds.PLAN, FolderError)["options"] if stored.is_file() else {}
        now = json.loads(self.plan.to_json())["options"]
        names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
        told = [f"{n} {'other data' if n == 'calibration' else before.get(n)}" for n in names[:3]]
        return f" ({', '.join(told)}); repeat them to go on" if told else "; repeat them to go on"

    def _check_records(self, stored: Path) -> None:
        """Refuse an unfinished run whose records are damaged, before it is said to be of another plan or source."""
        hint = "; delete the folder, or pass overwrite=True"
        if stored.is_file():
            read_json(stored, kinds.PLAN, FolderError, hint)
        if self.origin.is_file() and self.origin.stat().st_size:  # empty: a model in memory
            read_json(self.origin, kinds.ORIGIN, FolderError, hint)

    def _piece(self, name: str) -> Path:
        return self.pieces / (hashlib.sha256(name.encode()).hexdigest()[:32] + ".safetensors")

    def put(self, job: Job, encoded: Encoded) -> None:
        """Store a finished job, completely or not at all."""
        facts = {"name": encoded.name, "zero_row": encoded.zero_row, **encoded.measured}
        tensors = packed(job.spec, job.weight_view, job.shape, encoded.tensors)
        write_tensors(self._piece(job.name), tensors, {"rpq": json.dumps(facts)})

    def get(self, job: Job) -> Encoded | None:
        """Return a finished job of this or an earlier run, or None."""
        path = self._piece(job.name)
        if not path.is_file():
            return None
        try:
            tensors = unpacked(job.spec, job.weight_view, job.shape, self._stored(job))
        except ValueError as e:
            raise FolderError(f"{path} of {job.name}: {e}{AGAIN}") from None
        return Encoded(tensors=tensors, **self.facts(job))

    def _stored(self, job: Job) -> dict[str, Tensor]:
        """Return a finished job's tensors as files hold them; they must be what the job describes."""
        path, expected = self._piece(job.name), job.spec.stored(job.weight_view, job.shape)
        try:
            tensors = load_file(path)  # mapped: read where they are used
        except SafetensorError as e:
            raise FolderError(f"{path} of {job.name} is damaged: {e}{AGAIN}") from None
        inputs = job.weight_view.matrix_shape(job.shape, "in")[1]
        wrong = description.misfit(expected, tensors) or description.misplaced(
            expected, tensors.get("positions"), inputs
        )
        if wrong:
            raise FolderError(f"{path} of {job.name}: {wrong}{AGAIN}")
        return tensors

    def facts(self, job: Job) -> dict[str, Any]:
        """Return what a finished job measured, without reading its tensors."""
        path = self._piece(job.name)
        try:
            with safe_open(path, "pt") as f:
                text = (f.metadata() or {}).get("rpq", "")
        except SafetensorError as e:
            raise FolderError(f"{path} of {job.name} is damaged: {e}{AGAIN}") from None
        facts: dict[str, Any] = parse_json(text, kinds.PIECE, path, FolderError, AGAIN)
        check(facts, kinds.PIECE, path, FolderError, AGAIN)
        if facts["name"] != job.name:
            raise FolderError(f"{path} is a piece of {facts['name']}, not of {job.name}{AGAIN}")
        return facts

    def done(self, job: Job) -> bool:
        return self._piece(job.name).is_file()

    def write_weights(self, dense: Callable[[str], Tensor], progress: Callable[[str], None] | None = None) -> None:
        """Assemble the weight files; `dense(name)` gives what stays dense."""
        plan = self.plan
        computed = {f"{j.name}_rpq.{p}": (j, p) for j in plan.jobs for p in j.nbytes}
        kept = {s.name for s in plan.skips}

        def tensor(key: str) -> Tensor:
            if key in computed:
                job, part = computed[key]
                return self._stored(job)[part]
            dtype, shape = plan.entries[key]
            if key not in kept:
                return torch.empty(shape, dtype=dtype)  # a guard
            value = dense(key).detach().to("cpu", dtype)
            if tuple(value.shape) != shape:
                raise FolderError(f"{key}: the plan says {list(shape)}, the source has {list(value.shape)}")
            self._note(key, value)
            return value.contiguous()

        for name, keys in plan.shards:
            path = self.work / name
            if path.is_file() and path.stat().st_size == plan.files[name]:  # of a run that was killed
                with safe_open(path, "pt") as f:
                    for key in kept.intersection(keys):
                        self._note(key, f.get_tensor(key))
                continue
            partial = path.with_name(path.name + ".partial")
            write_tensors_to(partial, {k: plan.entries[k] for k in keys}, tensor)
            _replace(partial, path)
            if path.stat().st_size != plan.files[name]:
                raise FolderError(f"{path} has {path.stat().st_size} bytes where the plan says {plan.files[name]}")
            if progress:
                progress(name)
        if len(plan.shards) > 1:
            index = {
                "metadata": {"total_size": plan.tensor_bytes},
                "weight_map": {k: n for n, ks in plan.shards for k in ks},
            }
            write_file(self.work / INDEX, json.dumps(index, indent=1))

    def _note(self, key: str, value: Tensor) -> None:
        if not is_finite(value):
            self.not_finite.add(key)

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
                shutil.copyfile(file, place)

    def broken(self) -> set[str]:
        """Return the names of parameters that held NaN or infinite values. In a buffer, such as a mask, they are meant."""
        return self.not_finite - {s.name for s in self.plan.skips if s.buffer}

    def files(self) -> dict[str, Path]:
        """Return path inside the folder -> file, of everything that stays in it when it is finished."""
        inside = {p.relative_to(self.work).as_posix(): p for p in sorted(self.work.rglob("*")) if p.is_file()}
        return {n: p for n, p in inside.items() if n != ORIGIN and not p.is_relative_to(self.pieces)}

    def finish(self) -> Path:
        """Write the manifest, remove the pieces (late, since a run may be killed while it hashes), rename."""
        masks = sorted(self.not_finite - self.broken())
        write_manifest(self.work, self.files(), masks)
        shutil.rmtree(self.pieces)
        self.origin.unlink()
        old = self.out.with_name(self.out.name + ".old.partial")
        if self.out.exists():
            _remove(old)  # of a run that was killed right here
            os.replace(self.out, old)
        os.replace(self.work, self.out)
        _remove(old)
        _sync(self.out.parent)
        return self.out


def work_of(out: Path) -> Path:
    """Return where an output folder is written before it is complete."""
    return out.with_name(out.name + ".partial")


def bytes_to_write(out: str | Path, plan: Plan) -> int:
    """Return the bytes that a plan still needs on the disk: its pieces and its weight files, but for what an earlier run wrote."""
    work = work_of(Path(out))
    there = sum(p.stat().st_size for p in work.rglob("*.safetensors")) if work.is_dir() else 0
    return max(0, plan.file_bytes + sum(sum(j.nbytes.values()) for j in plan.jobs) - there)


def write_manifest(folder: Path, files: Mapping[str, Path], not_finite: Sequence[str] = ()) -> None:
    """Write size and sha256 of files into a folder's manifest.

    Args:
        files: path inside the folder -> file. not_finite: buffers, such as masks, that are meant to hold NaN or infinite values.
    """
    found = {n: {"bytes": p.stat().st_size, "sha256": sha256(p)} for n, p in files.items() if n != MANIFEST}
    odd = {"not_finite": [*not_finite]} if not_finite else {}
    write_file(folder / MANIFEST, json.dumps({"files": found, **odd}, indent=1))


FINITE = 1 << 22  # numbers looked at together


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinite values."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    parts = torch.split(tensor.reshape(-1), FINITE)
    return all(bool(torch.isfinite(p.float() if p.is_floating_point() else p).all()) for p in parts)


def amend(folder: Path, texts: Mapping[str, str]) -> None:
    """Rewrite text files of a finished folder and their entries in its manifest."""
    manifest = read_manifest(folder)
    for name, text in texts.items():
        write_file(folder / name, text)
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(dict(tensors), partial, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as e:  # the library wraps the operating system's errors in its own
        partial.unlink(missing_ok=True)
        raise FolderError(f"cannot write {path}: {e}") from e
    _replace(partial, path)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file; a killed run leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    _replace(partial, path)


def _replace(partial: Path, path: Path) -> None:
    _sync(partial)
    os.replace(partial, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
