"""Open the weights of a folder or of one file."""

from __future__ import annotations

from pathlib import Path

from rpq_convert.errors import SourceError
from rpq_convert.storage.files import weight_paths
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
    paths, index = weight_paths(folder, allow_pickle=allow_pickle, named=named)
    if any(p.suffix != ".safetensors" for p in paths):
        return PickleSource(paths, key)
    return SafetensorsSource((read_header(p) for p in paths), index, folder)
