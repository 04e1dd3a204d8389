"""Described: what a checkpoint's description may say, and which tensors fit it.

Compiled kernels trust shapes and dtypes. So each description is read here, and here alone, and every tensor is compared with
it before a kernel sees it. All checks use headers and meta tensors: nothing is allocated for a file that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rpq_convert.core.axes import WeightView
from rpq_convert.core.spec import CODEBOOK_DTYPES, DTYPES, Spec
from rpq_convert.errors import SourceError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check

LARGEST = 1 << 40  # numbers of one tensor
FLOATS = frozenset(CODEBOOK_DTYPES.values())
PARTS = ("codebooks", "codes", "scales", "input_scales", "outliers", "positions")  # in memory
STORED = (*PARTS, "stream", "frequencies")  # in files
OTHERS = ("view", "shape", "dtype", "zero_row")
Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Described:
    """One RPQ weight, as config.json describes it."""

    spec: Spec
    view: WeightView
    shape: tuple[int, ...]
    dtype: torch.dtype
    zero_row: int | None

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return part -> (dtype, shape) in memory."""
        return self.spec.tensors(self.view, self.shape)

    @property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return part -> (dtype, shape) in files."""
        return self.spec.stored(self.view, self.shape)


@dataclass(frozen=True)
class Contents:
    """What `quantization_config` says: every RPQ weight, names of tied ones, the first guard, and what lies beside the model's tensors."""

    modules: Mapping[str, Described]
    tied: Mapping[str, str]
    guard: str | None
    extra: Sequence[str] = ()
    extra_state: Mapping[str, Any] = field(default_factory=dict)

    def aliases(self) -> dict[str, list[str]]:
        """Return name -> its other names."""
        found: dict[str, list[str]] = {}
        for alias, name in self.tied.items():
            found.setdefault(name, []).append(alias)
        return found

    def renamed(self, name: Callable[[str], str]) -> Contents:
        """Return the same of other names."""
        modules = {name(k): described for k, described in self.modules.items()}
        tied = {name(alias): name(k) for alias, k in self.tied.items()}
        return replace(self, modules=modules, tied=tied, extra=[name(k) for k in self.extra])

    def is_guard(self, key: str, info: Any) -> bool:
        """Say whether an entry of a file's header is no tensor of the model, but the empty one under a converted one's name."""
        return key in self.modules and tuple(info.shape) == (0,)


def read(description: Any) -> Described:
    """Return a description, checked.

    Raises:
        ValueError: a field that is missing, unknown, of the wrong type, or out of its range.
    """
    check(description, kinds.MODULE, "the value", ValueError)
    return _described(description)


def read_all(config: Any) -> Contents:
    """Return a `quantization_config`, checked.

    Raises:
        SourceError: what is wrong, and of which weight.
    """
    check(config, kinds.CONTENTS, "quantization_config", SourceError)
    found = {}
    for name, description in config["modules"].items():
        try:
            found[name] = _described(description)
        except ValueError as e:
            raise SourceError(f"{name}: its description does not fit this version: {e}") from None
    tied = config["tied"]
    if both := sorted(set(found) & set(tied)):
        raise SourceError(f"{both[0]} is described, and tied to {tied[both[0]]} as well")
    return Contents(found, tied, config["guard"], config.get("extra", ()), config.get("extra_state", {}))


def _described(description: Mapping[str, Any]) -> Described:
    """Return a description whose fields have the right types; what they say together is checked here."""
    rest = dict(description)
    names, size, dtype, zero_row = (rest.pop(k, None) for k in OTHERS)
    shape, view = tuple(size), WeightView(names)
    view.check(shape)
    if len(shape) < 2 or not all(a.isidentifier() for a in view.axes):
        raise ValueError(f"view {names!r} does not name two or more axes")
    spec = Spec(**rest)
    stored = {"weight": shape, **{part: size for part, (_, size) in spec.tensors(view, shape).items()}}
    for part, size in stored.items():
        if math.prod(size) > LARGEST:
            raise ValueError(f"its {part} would hold {math.prod(size):,} numbers; at most {LARGEST:,}")
    if zero_row is not None and not (view.axes == ("out", "in") and zero_row < shape[0]):
        raise ValueError(f"zero_row {zero_row!r} is no row of a table {list(shape)}")
    return Described(spec, view, shape, DTYPES[dtype], zero_row)


def misfit(expected: Expected, found: Mapping[str, Any], *, exact: bool = True) -> str:
    """Return what is wrong with the tensors of one weight, or an empty text.

    Args:
        expected: part -> (dtype, shape). found: part -> anything with a dtype and a shape, such as an entry of a header.
        exact: dtypes are those of the spec, as in a file; in memory, floating-point parts may be of any float dtype.
    """
    for part, (dtype, shape) in expected.items():
        if part not in found:
            return f"{part} is missing from the weight files"
        has, size = found[part].dtype, tuple(found[part].shape)
        if size != shape or (has != dtype if exact or not dtype.is_floating_point else has not in FLOATS):
            return f"{part} is {list(size)} {has}, its description says {list(shape)} {dtype}"
    extra = [part for part in found if part not in expected]
    return f"{extra[0]} is there, and not in its description" if extra else ""


def misplaced(expected: Expected, positions: Tensor | None, inputs: int) -> str:
    """Return what is wrong with the positions of outliers, or an empty text."""
    if positions is None or "positions" not in expected or positions.is_meta or not positions.numel():
        return ""
    low, high = (int(v) for v in positions.detach().aminmax())
    return f"positions names inputs {low} to {high}, of {inputs}" if low < 0 or high >= inputs else ""


def of_weight(name: str, infos: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts that a checkpoint's table has of the weight `name`."""
    return {part: infos[key] for part in STORED if (key := f"{name}_rpq.{part}") in infos}


def check_stored(name: str, described: Described, source: Any) -> None:
    """Compare the tensors of a source with the description of the weight `name`; positions are read for it.

    Raises:
        SourceError: they do not fit.
    """
    expected = described.stored
    wrong = misfit(expected, of_weight(name, source.infos))
    if not wrong and "positions" in expected:
        inputs = described.view.matrix_shape(described.shape, "in")[1]
        wrong = misplaced(expected, source[f"{name}_rpq.positions"], inputs)
    if wrong:
        raise SourceError(f"{name}_rpq.{wrong}")


def check_place(name: str, described: Described, parameter: Tensor | None, where: str = "the model") -> None:
    """Compare a description with the parameter that it takes the place of.

    Raises:
        SourceError: there is none, or of another shape or kind.
    """
    if parameter is None:
        raise SourceError(f"{name}: {where} has no such parameter")
    if tuple(parameter.shape) != described.shape:
        raise SourceError(f"{name}: the checkpoint describes {list(described.shape)}, {where} {list(parameter.shape)}")
    if not parameter.is_floating_point():
        raise SourceError(f"{name}: {where} has {parameter.dtype}, which is not a floating-point parameter")


def check_dense(name: str, found: Any, wanted: Tensor) -> None:
    """Compare a dense tensor of a file with the model's.

    Raises:
        SourceError: of another shape, or of another kind: floating-point, complex, whole, boolean.
    """
    if tuple(found.shape) != tuple(wanted.shape):
        raise SourceError(f"{name}: the file has {list(found.shape)}, the model {list(wanted.shape)}")
    if _kind(found.dtype) != _kind(wanted.dtype):
        raise SourceError(f"{name}: the file has {found.dtype}, the model {wanted.dtype}")


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "boolean"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"
