"""Origin: what weights come from, told by content. Free of torch.

A source that was copied or touched is the same source, and one that holds other numbers is another, whatever its size and its times. Every
weight file is known by its size, its header and a sample of every tensor; a few milliseconds for a checkpoint of any size. Times decide only
how closely is looked: where they have changed since, the weights that were fitted are compared one by one. Of a file at an address no
sample is read: what its store says of it (an ETag, a hash, a time) takes the place of both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rpq_convert.storage.headers import Placed
from rpq_convert.storage.records import sha256
from rpq_convert.storage.remote_file import PART, File, RemoteFile, read_span, size_of

SAMPLE = 512  # bytes in the middle of every tensor
EDGE, PLACES = (
    1 << 16,
    256,
)  # of a pickled file: bytes at both ends, where its table of contents is, and samples between them


@dataclass(frozen=True)
class Origin:
    """The weight files of a source.

    Args:
        spans: file -> where its tensors lie, as bytes from start to end; none of a pickled file.
        repository, revision: of the hub, where they come from there.
    """

    spans: Mapping[File, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    repository: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, infos: Iterable[Placed], repository: str | None = None, revision: str | None = None) -> Origin:
        """Return the origin of tensors that know their files."""
        spans: dict[File, list[tuple[int, int]]] = {}
        for info in infos:
            own = spans.setdefault(info.file, [])
            if info.file.suffix == ".safetensors":
                own.append((info.start, info.end))  # type: ignore[attr-defined]
        return cls({f: tuple(sorted(spans[f])) for f in sorted(spans, key=str)}, repository, revision)

    def record(self, *, whole: bool = False) -> dict[str, Any]:
        """Return what a manifest keeps of it; files have no paths there.

        Args:
            whole: hash every byte as well.
        """
        found = {
            "repository": self.repository,
            "revision": self.revision,
            "files": [self._file(f, whole) for f in self.spans],
        }
        return {k: v for k, v in found.items() if v is not None}

    def seen(self) -> list[list[Any]]:
        """Return path, size and time of every file: what tells that nobody has touched them."""
        return [_seen(f) for f in self.spans]

    def _file(self, path: File, whole: bool) -> dict[str, Any]:
        size, spans = size_of(path), self.spans[path]
        if spans:
            head = min(start for start, _ in spans)
            sampled = [((a + b) // 2, min(SAMPLE, b - (a + b) // 2)) for a, b in spans]
        else:
            head = min(EDGE, size)
            sampled = [(size * i // PLACES, SAMPLE) for i in range(PLACES)] + [(max(0, size - EDGE), EDGE)]
        header = hashlib.sha256(read_span(path, 0, head))
        facts: dict[str, Any] = {"name": path.name, "bytes": size, "header": header.hexdigest()}
        if isinstance(path, RemoteFile):
            return facts | {"mark": path.mark()} | ({"sha256": _sha256_of(path)} if whole else {})
        sample = hashlib.sha256()
        with open(path, "rb") as f:
            for at, length in sampled:
                f.seek(at)
                sample.update(f.read(length))
        return facts | {"sample": sample.hexdigest()} | ({"sha256": sha256(path)} if whole else {})


def _seen(file: File) -> list[Any]:
    """Return name, size and time of a file; of one at an address, a number of what its store says in place of the time."""
    if isinstance(file, RemoteFile):
        return [str(file), file.size, int(hashlib.sha256(file.mark().encode()).hexdigest()[:12], 16)]
    return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def _sha256_of(file: RemoteFile) -> str:
    found = hashlib.sha256()
    for at in range(0, file.size, PART):
        found.update(file.transfer(at, min(file.size, at + PART)))
    return found.hexdigest()


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two records of a source, or an empty text. Where it was found does not matter.

    A hash of all bytes is compared where both have one.
    """
    old, new = ({f["name"]: f for f in record["files"]} for record in (before, now))
    if old.keys() != new.keys():
        return f"{sorted(old.keys() ^ new.keys())[0]} is in one of them only"
    for name, facts in old.items():
        for what in ("bytes", "header", "sample", "sha256"):
            if what in facts and what in new[name] and facts[what] != new[name][what]:
                return f"{name} has another {'size' if what == 'bytes' else 'content'}"
    return ""
