"""Pieces: the finished jobs of an unfinished output folder, one safetensors file each.

A piece carries the hash of what it holds, and of the tensor that it was fitted to. A rerun takes it only where both are right: a damaged one
is fitted again, and says so. Once its tensors are in weight files they leave the piece (`move`), so that the disk holds them once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rpq_convert.core import description
from rpq_convert.core.results import Encoded
from rpq_convert.errors import FolderError
from rpq_convert.kernels.rans import packed, unpacked
from rpq_convert.planning.plan import Job
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check, parse_json
from rpq_convert.showing import notice
from rpq_convert.storage.assembly import raw, write_tensors, write_tensors_to

NAME = "pieces"


class Damaged(ValueError):
    """A piece is not what a run has written."""


class Pieces:
    """The finished jobs of one unfinished folder.

    Args:
        work: the folder.
    """

    def __init__(self, work: Path) -> None:
        self.folder = work / NAME
        self.checked: set[str] = set()  # jobs whose pieces were read and are whole
        self.files: dict[str, Path] = {}  # key -> the whole weight file that holds it

    def path(self, job: Job) -> Path:
        return self.folder / (hashlib.sha256(job.name.encode()).hexdigest()[:32] + ".safetensors")

    def put(self, job: Job, encoded: Encoded, source: str | None = None) -> None:
        """Store a finished job, completely or not at all.

        Args:
            source: hash of the tensor that it was fitted to.
        """
        tensors = packed(job.spec, job.weight_view, job.shape, encoded.tensors)
        tensors = {part: t.detach().contiguous() for part, t in tensors.items()}
        facts = json.dumps({"name": encoded.name, "zero_row": encoded.zero_row, "source": source, **encoded.measured})
        entries = {part: (t.dtype, tuple(t.shape)) for part, t in tensors.items()}
        metadata = {"rpq": facts, "sha256": sealed(facts, tensors)}
        write_tensors_to(self.path(job), entries, tensors.__getitem__, metadata)

    def move(self, job: Job) -> bool:
        """Remove a job's tensors from its piece, if weight files hold all of them; return whether they do."""
        if not all(key in self.files for key in _keys(job).values()):
            return False
        with safe_open(self.path(job), "pt") as f:
            metadata = f.metadata()
        if metadata.get("moved") is None:
            facts = metadata["rpq"]
            write_tensors(self.path(job), {}, {"rpq": facts, "sha256": sealed(facts, {}), "moved": "true"})
        return True

    def done(self, job: Job) -> bool:
        """Return whether a job is finished. A damaged piece is removed, which is said."""
        if job.name in self.checked:
            return True
        if not self.path(job).is_file():
            return False
        try:
            self._read(job)
        except Damaged as e:
            notice(f"{self.path(job)} of {job.name} is damaged ({e}); the weight is fitted again")
            self._drop(job)
            return False
        return True

    def get(self, job: Job) -> Encoded | None:
        """Return a finished job of this or an earlier run, or None."""
        if not self.done(job):
            return None
        tensors, facts = self._whole(job)
        facts.pop("source", None)
        return Encoded(tensors=unpacked(job.spec, job.weight_view, job.shape, tensors), **facts)

    def tensors(self, job: Job) -> dict[str, Tensor]:
        """Return a finished job's tensors as files hold them, mapped: they are read where they are used.

        Raises:
            FolderError: the piece was damaged meanwhile; it is removed.
        """
        return self._whole(job)[0]

    def facts(self, job: Job) -> dict[str, Any]:
        """Return what a finished job measured, and as `source` the hash of the tensor that it was fitted to."""
        return self._whole(job)[1]

    def _whole(self, job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            return self._read(job)
        except Damaged as e:
            self._drop(job)
            raise FolderError(
                f"{self.path(job)} of {job.name} is damaged: {e}; run the same command again, it is fitted again"
            ) from None

    def _drop(self, job: Job) -> None:
        self.path(job).unlink(missing_ok=True)
        self.checked.discard(job.name)

    def _read(self, job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a piece's tensors and facts; the whole of it is checked when it is read for the first time."""
        path = self.path(job)
        try:
            with safe_open(path, "pt") as f:
                metadata = f.metadata() or {}
                tensors = {part: f.get_tensor(part) for part in f.keys()}  # noqa: SIM118 - it is no mapping
            text, seal = metadata.get("rpq", ""), metadata.get("sha256")
            if metadata.get("moved") is not None and seal == sealed(text, {}):
                tensors = self._moved(job)
                seal = sealed(text, tensors) if job.name not in self.checked else seal
        except (SafetensorError, OSError) as e:
            raise Damaged(str(e)) from None
        if job.name not in self.checked:
            if seal != sealed(text, tensors):
                raise Damaged("its content is not what was written")
            self._check(job, tensors)
        facts: dict[str, Any] = parse_json(text, kinds.PIECE, path, Damaged)
        check(facts, kinds.PIECE, path, Damaged)
        if facts["name"] != job.name:
            raise Damaged(f"it is a piece of {facts['name']}")
        self.checked.add(job.name)
        return tensors, facts

    def _moved(self, job: Job) -> dict[str, Tensor]:
        """Return the tensors that have left a piece, from the weight files, which were compared with their hashes."""
        found = {}
        for part, key in _keys(job).items():
            if key not in self.files:
                raise Damaged("the weight file that holds its tensors is not whole")
            with safe_open(self.files[key], "pt") as f:
                found[part] = f.get_tensor(key)
        return found

    def _check(self, job: Job, tensors: Mapping[str, Tensor]) -> None:
        expected, inputs = job.spec.stored(job.weight_view, job.shape), job.weight_view.matrix_shape(job.shape, "in")[1]
        wrong = description.misfit(expected, tensors)
        if wrong := wrong or description.misplaced(expected, tensors.get("positions"), inputs):
            raise Damaged(wrong)


def _keys(job: Job) -> dict[str, str]:
    """Return part -> key of a job's tensors in weight files."""
    return {part: f"{job.name}_rpq.{part}" for part in job.spec.stored(job.weight_view, job.shape)}


def sealed(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a piece: of its facts, and of its tensors with names, types and shapes."""
    found = hashlib.sha256(facts.encode())
    for part, tensor in sorted(tensors.items()):
        found.update(json.dumps([part, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(raw(tensor))
    return found.hexdigest()
