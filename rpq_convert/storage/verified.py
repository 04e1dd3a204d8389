"""Verified: tensors that are compared with the manifest's hashes when they are read, and files that must stay as they are meanwhile.

Hashing takes about a second for a gigabyte, as reading does. `verify=False` or RPQ_VERIFY=0 in the environment leave it out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.storage.assembly import digest
from rpq_convert.storage.reader import Over
from rpq_convert.storage.records import MANIFEST, read_manifest, sha256

WITHOUT = "; take the folder from where it came, or pass verify=False (RPQ_VERIFY=0 in the environment)"


class VerifiedSource(Over):
    """A source whose tensors have known hashes.

    Args:
        source: with `infos`. known: name -> SHA-256 of its bytes.
    """

    def __init__(self, source: Any, known: Mapping[str, str]) -> None:
        self.source, self.known, self.infos = source, known, source.infos

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.source[name]
        if name in self.known and digest(tensor) != self.known[name]:
            raise SourceError(f"{self.infos[name].file}: {name} is damaged, it is not what the manifest says{WITHOUT}")
        return tensor


def verified(source: Any, folder: Path, verify: bool | None = None) -> Any:
    """Return a folder's tensors so that each is compared with the manifest when it is read.

    Args:
        verify: whether; by default unless RPQ_VERIFY=0 is in the environment. Tensors that the manifest has no hash of are passed over.

    Raises:
        SourceError: the manifest is damaged.
    """
    known = {name: d for entry in _files(folder, verify).values() for name, d in entry.get("tensors", {}).items()}
    return VerifiedSource(source, known) if known else source


def check_weights(files: Iterable[str | Path], verify: bool | None = None) -> None:
    """Compare weight files with the manifest beside them, where there is one.

    Raises:
        SourceError: which file is damaged.
    """
    for file in map(Path, files):
        facts = _files(file.parent, verify).get(file.name)
        if facts and (file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]):
            raise SourceError(f"{file} is damaged, it is not what the manifest says{WITHOUT}")


@contextmanager
def unchanged(files: Iterable[str | Path]) -> Iterator[None]:
    """Refuse what was read of files that were replaced or changed meanwhile: it may be half of the one and half of the other.

    Raises:
        SourceError: which file.
    """
    before = signatures(files)
    try:
        yield
    except (SourceError, OSError):
        check_signatures(before)  # which explains the error
        raise
    check_signatures(before)


def signatures(files: Iterable[str | Path]) -> dict[Path, tuple[int, ...]]:
    """Return what tells a file from any that takes its place."""
    return {path: _signature(path) for path in map(Path, files)}


def check_signatures(before: Mapping[Path, tuple[int, ...]]) -> None:
    """Raise a SourceError where files are not those that they were."""
    for path, known in before.items():
        if _signature(path) != known:
            raise SourceError(f"{path} was replaced while it was read; read it again")


def _signature(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _files(folder: Path, verify: bool | None) -> dict[str, dict[str, Any]]:
    wanted = os.environ.get("RPQ_VERIFY") != "0" if verify is None else verify
    if not wanted or not (folder / MANIFEST).is_file():
        return {}
    try:
        return read_manifest(folder)["files"]  # type: ignore[no-any-return]
    except VerifyError as e:
        raise SourceError(f"{e}{WITHOUT}") from None
