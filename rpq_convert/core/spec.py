"""Spec: everything that decides the tensors of one RPQ weight, as one frozen value.

From a spec, a view and a shape follow the shapes, dtypes and bytes of `codebooks`, `codes` and `scales`, in memory and in files.
Nothing is measured on data, so the size of a checkpoint is known before a weight is read: where files hold codes entropy-coded, their
length is the spec's rate, which the fit keeps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rpq_convert.core import options, rans
from rpq_convert.core.axes import WeightView, check_axis

CODEWORDS = 256  # a code is one byte
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in options.STORED_DTYPES}
CODEBOOK_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in options.CODEBOOK_DTYPES}
LAYOUTS = ("blocks", "rows")
STORAGES = ("bytes", "rans")
ROTATIONS = (0, *(2**k for k in range(3, 13)))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of a plain name such as `"float32"`; a name that is not a dtype is an error."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype")
    return found


@dataclass(frozen=True)
class Spec:
    """How one parameter is stored.

    Args:
        dim: length of a sub-vector; code bits per weight are `8 * stages / dim`.
        books: how many codebooks the blocks share; `books == blocks` is one for every block, 1 one for all.
        stages: codewords that are summed for one sub-vector.
        axis: which axis is cut, `"out"` or `"in"`.
        codebook_dtype: dtype of the stored codewords.
        scales: dtype of one scale per output row, or None for no scales.
        layout: `"blocks"` stores codes as [blocks, n], `"rows"` as [n, blocks], where a row is one read (embeddings).
        rotation: size of the block-Hadamard rotation of the input axis (rotation.py), a power of two; 0 is none.
        outliers: how many weights of each output are kept apart, as numbers of their own beside the codes.
        outlier_dtype: dtype of those numbers.
        input_scales: dtype of one scale per input, which the layer multiplies its inputs by, or None for no such scales.
        storage: how files hold codes: `"bytes"`, one for each, or `"rans"`, entropy-coded (rans.py). In memory they are bytes.
        rate: with `"rans"`, the bits of a code in files.
    """

    dim: int
    books: int = 1
    stages: int = 1
    axis: str = "out"
    codebook_dtype: str = "float16"
    scales: str | None = None
    layout: str = "blocks"
    rotation: int = 0
    outliers: int = 0
    outlier_dtype: str = "float16"
    input_scales: str | None = None
    storage: str = "bytes"
    rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "books", "stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        check_axis(self.axis)
        dtypes = {
            "codebook_dtype": CODEBOOK_DTYPES,
            **dict.fromkeys(("scales", "outlier_dtype", "input_scales"), DTYPES),
        }
        for name, value, known in ((name, getattr(self, name), known) for name, known in dtypes.items()):
            if value not in known and not (name in ("scales", "input_scales") and value is None):
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.codebook_dtype == "float8_e4m3fn" and self.scales is None:
            raise ValueError("float8_e4m3fn codebooks need scales: by themselves they reach no weight below 0.002")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        if self.rotation not in ROTATIONS:
            raise ValueError(
                f"rotation must be 0 or a power of two from {ROTATIONS[1]} to {ROTATIONS[-1]}, not {self.rotation!r}"
            )
        if not isinstance(self.outliers, int) or isinstance(self.outliers, bool) or self.outliers < 0:
            raise ValueError(f"outliers must be a whole number, 0 for none, not {self.outliers!r}")
        if self.outliers and self.rotation:
            raise ValueError("a rotation spreads outliers over its inputs: ask for one of the two")
        if self.input_scales and self.rotation:
            raise ValueError("a rotation mixes inputs that have scales of their own: ask for one of the two")
        if self.storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, not {self.storage!r}")
        if (self.storage == "rans") != (self.rate is not None):
            raise ValueError("storage 'rans' needs a rate, the bits of a code, and no other storage has one")
        if self.rate is not None and not 0 < self.rate <= rans.MOST_BITS:
            raise ValueError(f"rate must be a number above 0 and at most {rans.MOST_BITS}, not {self.rate!r}")

    @property
    def bits(self) -> float:
        """Code bits per weight in files, codebooks and scales not counted."""
        return (8 if self.rate is None else self.rate) * self.stages / self.dim

    def blocks(self, view: WeightView, shape: tuple[int, ...]) -> int:
        return math.ceil(view.matrix_shape(shape, self.axis)[1] / self.dim)

    def tensors(self, view: WeightView, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return name -> (dtype, shape) of the tensors in memory; one stage has no stage axis."""
        n, _ = view.matrix_shape(shape, self.axis)
        blocks = self.blocks(view, shape)
        inputs = view.matrix_shape(shape, "in")[1]
        if self.rotation and inputs % self.rotation:
            raise ValueError(f"a rotation of {self.rotation} for {inputs} inputs, which it does not divide")
        if self.books > blocks:
            raise ValueError(f"{self.books} codebooks for {blocks} blocks; use at most {blocks}")
        stage = (self.stages,) if self.stages > 1 else ()
        grid = (blocks, n) if self.layout == "blocks" else (n, blocks)
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codebooks": (CODEBOOK_DTYPES[self.codebook_dtype], (*stage, self.books, CODEWORDS, self.dim)),
            "codes": (torch.uint8, stage + grid),
        }
        if self.scales is not None:
            stored["scales"] = (DTYPES[self.scales], view.scale_shape(shape))
        if self.input_scales is not None:
            if "expert" in view.axes:
                raise ValueError("experts have no scales of their inputs")
            stored["input_scales"] = (DTYPES[self.input_scales], (inputs,))
        if self.outliers:
            outputs = view.matrix_shape(shape, "in")[0]
            if "expert" in view.axes or self.outliers > inputs // 2:
                raise ValueError(
                    f"{self.outliers} outliers of {inputs} inputs of {view.names!r}; at most half, and none of experts"
                )
            stored["outliers"] = (DTYPES[self.outlier_dtype], (outputs, self.outliers))
            stored["positions"] = (torch.int16 if inputs <= 1 << 15 else torch.int32, (outputs, self.outliers))
        return stored

    def stored(self, view: WeightView, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return name -> (dtype, shape) of the tensors in files: a stream and its frequencies may stand for the codes."""
        found = self.tensors(view, shape)
        if self.rate is not None:
            _, codes = found.pop("codes")
            found["stream"] = torch.uint8, (rans.stream_bytes(self.rate, math.prod(codes)),)
            found["frequencies"] = torch.int16, (rans.SYMBOLS,)
        return found

    def nbytes(self, view: WeightView, shape: tuple[int, ...]) -> dict[str, int]:
        """Return name -> bytes of the tensors in files."""
        return {k: d.itemsize * math.prod(s) for k, (d, s) in self.stored(view, shape).items()}

    def memory_bytes(self, view: WeightView, shape: tuple[int, ...]) -> int:
        """Return the bytes of all tensors in memory."""
        return sum(d.itemsize * math.prod(s) for d, s in self.tensors(view, shape).values())

    def expected_error(self, view: WeightView, shape: tuple[int, ...]) -> float:
        """Return the relative squared error that a fit of Gaussian weights is expected to leave.

        Rate-distortion with the space-filling loss of k-means in `dim` dimensions, fitted to Lloyd-Max (dim 1: 2.72 *
        4**-bits) and to k-means on Gaussian samples at dim 2 to 16, times the share of points that are not their own
        codeword. Summed codewords lose more the higher their rate (fitted to SmolLM2's layers, 3 to 6 bits). Entropy-coded
        single weights lose a quarter of a bit, less at low rates, whatever their number.
        """
        if self.rate is not None:
            lost: float = min(1.0, (1 + 0.425 * (1 - math.exp(-2 * self.rate))) * 4.0**-self.rate)
            return lost
        n, length = view.matrix_shape(shape, self.axis)
        points = max(1, n * math.ceil(length / self.dim) / self.books)
        loss = 1 + 1.72 / self.dim**0.8 if self.stages == 1 else max(1.45, 0.15 + 0.5 * self.bits)
        rounding: float = min(1.0, loss * 4.0**-self.bits)
        return rounding * max(0.0, 1 - CODEWORDS / points)

    def describe(self) -> str:
        """Return a short text such as `dim 4, 1 book, row scales float16`."""
        parts = [f"dim {self.dim}", f"{self.books} book" + "s" * (self.books > 1)]
        if self.stages > 1:
            parts.append(f"{self.stages} stages")
        parts.append(f"cut {self.axis}")
        parts.append(self.codebook_dtype)
        if self.scales:
            parts.append(f"row scales {self.scales}")
        if self.input_scales:
            parts.append(f"input scales {self.input_scales}")
        if self.rotation:
            parts.append(f"rotation {self.rotation}")
        if self.outliers:
            parts.append(f"{self.outliers} outlier{'s' * (self.outliers > 1)} a row")
        if self.rate is not None:
            parts.append(f"entropy-coded in {self.rate:g} bits")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; without those that earlier versions do not know, where they say nothing."""
        found = asdict(self)
        later = {"input_scales": None, "storage": "bytes", "rate": None}
        return {k: v for k, v in found.items() if k not in later or v != later[k]}
