"""Unpacking: a folder's tensors as they are in memory, whatever its files hold in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core import description
from rpq_convert.core.description import Contents
from rpq_convert.errors import SourceError
from rpq_convert.kernels.rans import unpacked


class UnpackedSource(Mapping[str, Tensor]):
    """A source whose entropy-coded codes are `<name>_rpq.codes`, decoded when they are read.

    Args:
        source: with `infos`, whose RPQ weights fit their descriptions (`description.check_stored`).
    """

    def __init__(self, source: Any, contents: Contents) -> None:
        self.source, self.coded = source, {}
        self.infos = dict(source.infos)
        for name, what in contents.modules.items():
            if what.spec.rate is None:
                continue
            stream = self.infos.pop(f"{name}_rpq.stream")
            del self.infos[f"{name}_rpq.frequencies"]
            key = f"{name}_rpq.codes"
            self.infos[key] = replace(stream, name=key, dtype=torch.uint8, shape=what.tensors["codes"][1])
            self.coded[key] = name, what

    def __len__(self) -> int:
        return len(self.infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __contains__(self, key: object) -> bool:
        return key in self.infos

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.coded:
            return self.source[key]  # type: ignore[no-any-return]
        name, what = self.coded[key]
        parts = {part: self.source[f"{name}_rpq.{part}"] for part in ("stream", "frequencies")}
        try:
            return unpacked(what.spec, what.view, what.shape, parts)["codes"]
        except ValueError as e:
            raise SourceError(f"{self.source.infos[f'{name}_rpq.stream'].file}: {name}_rpq.stream: {e}") from None


def checked(source: Any, contents: Contents) -> Any:
    """Return a source whose RPQ weights fit their descriptions, unpacked.

    Raises:
        SourceError: they do not.
    """
    for name, what in contents.modules.items():
        description.check_stored(name, what, source)
    return UnpackedSource(source, contents)
