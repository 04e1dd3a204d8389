"""Files that weights are read from, on this machine or at an address, by ranges of bytes. Free of torch.

Small ranges of a file at an address are read by blocks, since a checkpoint has many small tensors beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from rpq_convert.errors import SourceError
from rpq_convert.storage.addresses import Address, asking, mark_of, retried
from rpq_convert.storage.room import check_room

PART, BLOCK = 1 << 26, 1 << 22  # bytes of one transfer at most; of a block
BLOCKS = 4  # that are kept


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file at an address. Safe to use from several threads and, pickled, from several processes.

    Args:
        address: of the file. size: in bytes. place: where it lies on this machine once it was fetched.
    """

    address: Address
    size: int
    place: Path

    def __str__(self) -> str:
        return str(self.address)

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from start to end.

        Raises:
            SourceError: the store refuses, or the file has ended before.
        """
        if end - start >= BLOCK:
            return self.transfer(start, end)
        first, data = start // BLOCK, b""
        for number in range(first, -(-end // BLOCK)):
            data += _block(self, number)
        return _whole(data[start - first * BLOCK : end - first * BLOCK], self, start, end)

    def transfer(self, start: int, end: int) -> bytes:
        """Return the bytes from start to end by a request of their own. Of a server that sends whole files alone it is fetched first."""
        if self.place.is_file():
            return read_span(self.place, start, end)
        system, path = self.address.store()
        with asking(self.address):
            data: bytes = retried(lambda: system.cat_file(path, start=start, end=end))
        if len(data) > end - start:
            return read_span(self.fetched(), start, end)
        return _whole(data, self, start, end)

    def mark(self) -> str:
        """Return what its store says now that tells it from a file that takes its place; what was kept of it is read again."""
        _block.cache_clear()
        system, path = self.address.store()
        system.invalidate_cache()
        with asking(self.address):
            info = retried(lambda: system.info(path))
        return f"{info.get('size')} {mark_of(info)}"

    def fetched(self) -> Path:
        """Return it on this machine, where it takes its name when it is whole.

        Raises:
            SourceError: what the store refuses. FolderError: no room.
        """
        if not self.place.is_file():
            system, path = self.address.store()
            self.place.parent.mkdir(parents=True, exist_ok=True)
            check_room(self.place.parent, self.size)
            partial = self.place.with_name(self.place.name + ".partial")
            with asking(self.address):
                retried(lambda: system.get_file(path, str(partial)))
            if (size := partial.stat().st_size) != self.size:
                raise SourceError(
                    f"{self} has {size:,} bytes where its store said {self.size:,}; was the file changed?"
                )
            partial.replace(self.place)
        return self.place


File = Path | RemoteFile


@lru_cache(BLOCKS)
def _block(file: RemoteFile, number: int) -> bytes:
    return file.transfer(number * BLOCK, min(file.size, (number + 1) * BLOCK))


def size_of(file: File) -> int:
    """Return a file's bytes."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def read_span(file: File, start: int, end: int) -> bytes:
    """Return the bytes of a file from start to end.

    Raises:
        SourceError: it has ended before.
    """
    if isinstance(file, RemoteFile):
        return file.read(start, end)
    with open(file, "rb") as f:
        f.seek(start)
        return _whole(f.read(end - start), file, start, end)


def _whole(data: bytes, file: File, start: int, end: int) -> bytes:
    if len(data) != end - start:
        raise SourceError(f"{file} ended after {len(data):,} of {end - start:,} bytes; was the file changed?")
    return data
