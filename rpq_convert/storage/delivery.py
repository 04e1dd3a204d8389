"""Delivery: a folder that is written at an address. There it is whole, or it is not there.

A store cannot rename a folder. So the folder is made on this machine, as any other (writer.py), in `rpq-<number>/` of the working directory
or of RPQ_SCRATCH. Then its files are sent: weights first, `config.json` and the manifest last, without which no reader takes a folder for
a converted one. The local folder is deleted at the end. Whatever ends a run, the same command goes on with what is here: a finished local folder is
not made again, and a file that was sent, and that the store still has as it was, is not sent again.

While files are sent, `rpq_upload.json` lies there and names the run. A run that finds another's name before its last file ends with an error.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rpq_convert.errors import FolderError, SourceError
from rpq_convert.running.progress import Progress
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage import swap
from rpq_convert.storage.addresses import OBJECTS, Address, asking, destination, local_path, mark_of, retried
from rpq_convert.storage.files import WEIGHTS, is_inside
from rpq_convert.storage.lock import locked
from rpq_convert.storage.records import CONFIG, MANIFEST, read_manifest

UPLOAD = "rpq_upload.json"  # in the store, while a run sends files there
SENT = "sent.json"  # beside the local folder: what was sent
SCRATCH = "RPQ_SCRATCH"  # in the environment: the folder in which folders are made that are sent


@contextmanager
def delivered(out: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> Iterator[Path]:
    """Hold the lock of an output, give the local folder to write for it, and send that to its address once it is whole.

    Args:
        out: a path, which is given as it is, or an address.
        overwrite: replace what lies there. progress: told of what is sent.

    Raises:
        FolderError: another run has the lock, something is there already, or the store refuses.
    """
    address = destination(out)
    if address is None:
        with locked(place_of(out)):
            yield place_of(out)
        return
    with _made(address) as place:
        target = Target(address)
        target.check(overwrite=overwrite)
        if (place / MANIFEST).is_file():  # whole, but not sent: what makes it finds that nothing is left to do
            os.replace(place, swap.work_of(place))
        yield place
        target.send(place, progress)
        swap.remove(place.parent)


@contextmanager
def _made(address: Address) -> Iterator[Path]:
    """Hold the lock of the local folder in which what goes to an address is made."""
    place = made_in(address)
    try:
        with locked(place):
            yield place
    finally:
        with suppress(OSError):
            place.parent.rmdir()  # where nothing is in it


def place_of(out: str | Path) -> Path:
    """Return the local folder that is made for an output."""
    address = destination(out)
    return Path(local_path(out) or out) if address is None else made_in(address)


def made_in(address: Address) -> Path:
    """Return the local folder in which what goes to an address is made."""
    number = sha256(str(address).encode()).hexdigest()[:8]
    return Path(os.environ.get(SCRATCH, "."), f"rpq-{number}", address.name)


def send(folder: str | Path, address: Address, *, overwrite: bool = False, progress: Progress | None = None) -> None:
    """Send a finished folder to an address; one that was sent in part is completed.

    Raises:
        FolderError: something is there already, or the store refuses. VerifyError: the folder has no manifest.
    """
    with _made(address):
        target = Target(address)
        target.check(overwrite=overwrite)
        target.send(Path(folder), progress)
        target.record.unlink(missing_ok=True)


@dataclass
class Target:
    """A place of a store that a folder is sent to."""

    address: Address

    def __post_init__(self) -> None:
        with self._writing():
            self.system, self.root = self.address.store()
        self.record = made_in(self.address).parent / SENT
        self.run = json.dumps({"run": uuid.uuid4().hex})

    def check(self, *, overwrite: bool) -> None:
        """Refuse a place that holds a folder, or that cannot be written to, before hours of work.

        Raises:
            FolderError: what is in the way.
        """
        there = self._names()
        if not overwrite and UPLOAD not in there:
            if MANIFEST in there:
                raise FolderError(f"{self.address} already exists; choose another place or pass overwrite=True")
            if there:
                first = min(there)
                raise FolderError(
                    f"{self.address} holds {first}, which rpq-convert has not written; choose another place or pass overwrite=True"
                )
        if UPLOAD not in there:
            self._claim()  # can it be written to?
            self._remove(UPLOAD)

    def send(self, folder: Path, progress: Progress | None = None) -> None:
        """Send a whole folder; when this returns, the store has all of it.

        Raises:
            FolderError: the store refuses, or another run sends to this place. What was sent is not sent again by the next try.
        """
        files = read_manifest(folder)["files"]
        try:
            self._send(folder, files, progress)
        except FolderError as e:
            raise FolderError(f"{e}; {folder} is whole, and the same command, or rpq push, sends the rest") from None

    def _send(self, folder: Path, files: Mapping[str, Any], progress: Progress | None) -> None:
        from rpq_convert.storage.assembly import write_file  # which imports torch

        sent = read_json(self.record, kinds.SENT, FolderError) if self.record.is_file() else {}
        self._claim()
        for name in sorted(
            self._names(), key=lambda n: n != MANIFEST
        ):  # first of all: what lies there is whole no longer
            if name in (MANIFEST, CONFIG) or (name.endswith(WEIGHTS) and "/" not in name and name not in files):
                self._remove(name)
        total, done = sum(facts["bytes"] for facts in files.values()), 0
        for name in sorted(files, key=lambda n: (n == CONFIG, not n.endswith(WEIGHTS), n)):
            facts = files[name]
            if progress:
                progress(f"sending {name}", done, total)
            known = sent.get(name)
            if known is None or known["sha256"] != facts["sha256"] or known["mark"] != self._mark(name):
                sent[name] = {"sha256": facts["sha256"], "mark": self._put(name, folder / name)}
                write_file(self.record, json.dumps(sent))
            done += facts["bytes"]
        if self._claimed() != self.run:
            raise FolderError(
                f"another run is sending a folder to {self.address}; wait for it, or choose another place"
            )
        self._put(MANIFEST, folder / MANIFEST)
        self._remove(UPLOAD)

    def _names(self) -> set[str]:
        """Return the names of what lies there, in subfolders too, but no deeper."""

        def found() -> set[str]:
            self.system.invalidate_cache()
            try:
                paths = self.system.find(self.root, maxdepth=2)
            except FileNotFoundError:
                return set()
            names = {p.removeprefix(self.root).lstrip("/") for p in paths}
            return {n for n in names if is_inside(n)} or ({self.address.name} if names == {""} else set())

        with self._writing():
            return retried(found)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _mark(self, name: str) -> str | None:
        """Return what tells the file that the store has of this name from another; None where it has none."""
        with self._writing():
            self.system.invalidate_cache()
            try:
                info = retried(lambda: self.system.info(self._path(name)))
            except FileNotFoundError:
                return None
        return f"{info['size']} {mark_of(info)}"

    def _put(self, name: str, file: Path) -> str:
        """Send a file, and return its mark."""
        with self._writing():
            self._make_folder(name)
            retried(lambda: self.system.put_file(str(file), self._path(name)))
        mark, size = self._mark(name), file.stat().st_size
        if mark is None or not mark.startswith(f"{size} "):
            raise FolderError(f"{self.address}/{name} has {(mark or '0').split()[0]} bytes where {size} were sent")
        return mark

    def _claim(self) -> None:
        """Write whose run it is."""
        with self._writing():
            self._make_folder(UPLOAD)
            retried(lambda: self.system.pipe_file(self._path(UPLOAD), self.run.encode()))

    def _make_folder(self, name: str) -> None:
        if self.address.protocol not in OBJECTS:
            self.system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _claimed(self) -> str:
        with self._writing():
            self.system.invalidate_cache()
            try:
                return bytes(retried(lambda: self.system.cat_file(self._path(UPLOAD)))).decode(errors="replace")
            except FileNotFoundError:
                return ""

    def _remove(self, name: str) -> None:
        with self._writing():
            retried(lambda: self.system.rm_file(self._path(name)))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with asking(self.address):
                yield
        except SourceError as e:
            raise FolderError(str(e)) from None
