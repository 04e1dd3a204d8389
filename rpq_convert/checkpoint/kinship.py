"""Kinship: whether a dense checkpoint can be what a converted folder was made from.

Class and shapes are compared by configs and headers, before a weight is read. Two models of one class and shape are told apart by a
few of their weights: even one bit keeps a cosine of 0.6 to the weight that it came from, and unrelated weights have one near 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rpq_convert.checkpoint.opening import Factory, Opened, open_checkpoint
from rpq_convert.checkpoint.restoring import decoded
from rpq_convert.core import description
from rpq_convert.errors import SourceError
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.sources import called, read_config
from rpq_convert.storage.unpacking import checked

FEW, LARGE = 3, 1024  # how many weights are read, and of how many numbers each at least
UNRELATED = 0.2  # cosine below which weights have nothing to do with each other


def check_base(base: str | Path, folder: str | Path, factory: str | Factory | None = None) -> str:
    """Refuse a base of another class or shape; say whether one that fits cannot be the base all the same.

    Args:
        base, folder: the dense checkpoint and the converted one, on this machine.
        factory: builds a model that is not transformers'.

    Returns:
        A sentence that says why it cannot be the base; empty where it can.

    Raises:
        SourceError: it cannot be read, or is of another class or shape.
    """
    config, source = read_config(Path(folder)), open_folder(folder)
    names = called(base), called(folder)
    contents = description.read_all(config["quantization_config"])
    coded, infos = contents.modules, source.infos
    opened = _opened(base, Path(folder), factory)
    shapes = {name: tuple(s.shape) for s in opened.slots() for name in (s.name, *s.aliases)}
    mine = {name: tuple(what.shape) for name, what in coded.items()}
    mine |= {n: tuple(i.shape) for n, i in infos.items() if n in shapes and not contents.is_guard(n, i)}
    for name, shape in mine.items():
        if shapes.get(name) != shape:
            there = f"is {list(shapes[name])} there" if name in shapes else "is not there"
            raise SourceError(
                f"{names[0]} cannot be the base of {names[1]}: {name} {there}, and {list(shape)} in {names[1]}"
            )
    weights = checked(source, contents)
    found = {name: _cosine(decoded(weights, name, coded[name]), opened.source[name]) for name in _some(mine, coded)}
    if not found or max(found.values()) >= UNRELATED:
        return ""
    name, cosine = max(found.items(), key=lambda item: item[1])
    return (
        f"{names[0]} is not what {names[1]} was made from: their weights do not correlate (cosine {cosine:.2f} in {name}), so two "
        "different models are compared"
    )


def _opened(base: str | Path, folder: Path, factory: str | Factory | None) -> Opened:
    """Return the base with an empty model of the folder's class."""
    options = SourceOptions(factory=factory, allow_pickle=factory is None)
    if factory is not None:
        return open_checkpoint(base, options)
    from rpq_convert.hf import loading

    own, its = loading.load_config(folder), loading.load_config(base)
    kinds = [" ".join(c.architectures or ()) or type(c).__name__ for c in (its, own)]
    names = called(base), called(folder)
    if its.model_type != own.model_type:
        raise SourceError(
            f"{names[0]} cannot be the base of {names[1]}: it is a {kinds[0]}, and {names[1]} a {kinds[1]}"
        )
    its.architectures = own.architectures
    try:
        return open_checkpoint(base, options, model=loading.build_empty(its))
    except SourceError as e:
        if kinds[0] == kinds[1]:
            raise
        raise SourceError(f"{names[0]} is a {kinds[0]} and {names[1]} a {kinds[1]}: {e}") from None


def _some(shapes: dict[str, tuple[int, ...]], coded: Any) -> list[str]:
    """Return a few converted weights, the smallest that are not too small to tell anything."""
    sizes = {name: torch.Size(shapes[name]).numel() for name in coded}
    return sorted((n for n in sizes if sizes[n] >= LARGE), key=lambda n: sizes[n])[:FEW]


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().float(), b.flatten().float(), 0))
