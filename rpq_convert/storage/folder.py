"""Open the weights of a folder or of one file."""

from __future__ import annotations

from pathlib import Path

from rpq_convert.errors import SourceError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.files import is_inside, refuse_links, weight_files
from rpq_convert.storage.pickles import PickleSource
from rpq_convert.storage.reader import SafetensorsSource, read_header


def open_folder(
    folder: str | Path, *, allow_pickle: bool = False, named: str | None = None, key: str | None = None
) -> SafetensorsSource | PickleSource:
    """Open the weights of a folder (one file, or shards and an index), or a single file.

    Args:
        allow_pickle: whether pickled files are read, by torch's weights-only reader.
        named: the file that config.json names as the weights, if it does.
        key: as for `PickleSource`.

    Raises:
        SourceError: no weights, a missing shard, an index that disagrees with the headers or leaves the folder, or
            only pickled weights while `allow_pickle` is False.
    """
    folder = Path(folder)
    if folder.is_file():
        if folder.suffix == ".safetensors":
            return SafetensorsSource([read_header(folder)])
        if not allow_pickle:
            raise SourceError(f"{folder} is not a safetensors file; a pickled one needs allow_pickle=True")
        return PickleSource([folder], key)
    if not folder.is_dir():
        raise SourceError(f"{folder} does not exist")
    refuse_links(folder)
    names = {p.name for p in folder.iterdir() if p.is_file()}
    chosen = weight_files(names, folder, allow_pickle=allow_pickle, named=named)
    index = read_index(folder / chosen[0]) if chosen[0].endswith(".json") else None
    paths = [_inside(folder, n) for n in (chosen if index is None else sorted(set(index.values())))]
    if pickled := [p for p in paths if p.suffix != ".safetensors"]:
        if not allow_pickle:
            raise SourceError(f"{pickled[0]} is not a safetensors file; a pickled one needs allow_pickle=True")
        if len(pickled) < len(paths):
            raise SourceError(f"{folder}: its index names pickled files and others, such as {pickled[0].name}")
        return PickleSource(paths, key)
    return SafetensorsSource((read_header(p) for p in paths), index, folder)


def read_index(path: Path) -> dict[str, str]:
    """Return the map from tensors to files of an index.

    Raises:
        SourceError: it is none.
    """
    return read_json(path, kinds.INDEX, SourceError)["weight_map"]  # type: ignore[no-any-return]


def _inside(folder: Path, name: str) -> Path:
    """Return a shard's path, refusing one that leaves the folder."""
    if "/" in name or not is_inside(name):
        raise SourceError(f"{folder}: the index names {name!r}, which leaves the folder")
    if not (folder / name).is_file():
        raise SourceError(f"{folder / name} is missing, the index names it")
    return folder / name
