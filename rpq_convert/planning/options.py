"""PlanOptions: everything that may be asked of a plan. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from rpq_convert.core.options import ALWAYS, DTYPES, NEVER, check_values, dtype_text, setting
from rpq_convert.core.options import record as recorded
from rpq_convert.core.sizes import parse_size
from rpq_convert.errors import PlanError
from rpq_convert.planning.rules import AXES, FITS, STORAGES, Rule, as_rules, check_preset, mixes, split_bits

if TYPE_CHECKING:
    import torch

Given = (
    str | Mapping[str, Any] | Rule
)  # a rule as people write it: "type:Embedding:bits=8", {"match": "type:Embedding", "bits": 8}

SIZE, WHAT = "Size and quality", "What to convert"
DEFAULT_PRESET = "5bit"  # the smallest within 10 % of SmolLM2-135M: docs/default-preset.md
DEFAULT_SHARD = "5GB"
MEASURED = "measured"
SHARED_BY = ("shape", MEASURED)
# Between these bits files hold codes entropy-coded where only `bits` are given: the best quality for their bytes (docs/decisions.md).
CODED_FROM, MOST_CODED = 3.0, 7.0
DECIDING = ("preset", "bits", "target_size", "max_error", "codebooks", "dim")  # the sizes, one of them at a time


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is converted, and to which size.

    One of `preset`, `bits`, `target_size`, `max_error`, `codebooks` and `dim` decides the sizes; with none of them the default
    preset does.

    Raises:
        PlanError: settings that contradict each other, or a value outside its range.
    """

    preset: str | None = setting(
        None,
        "A preset's name (`rpq presets` says what each keeps) or a .toml file; 5bit by default, 6 times smaller than float32.",
        record=ALWAYS,
        panel=SIZE,
    )
    bits: float | None = setting(
        None,
        "Code bits per weight in files on average, 0.05 to 8; from 3 to 7 entropy-coded there, and one byte each in memory.",
        record=ALWAYS, panel=SIZE,
    )  # fmt: skip
    target_size: str | int | None = setting(
        None,
        "Bytes of all weight files, e.g. 50MB: the size of each layer is chosen so that they fit.",
        record=NEVER, metavar="SIZE", panel=SIZE,
    )  # fmt: skip
    max_error: float | None = setting(
        None,
        "Largest expected relative squared error of any layer; each layer gets the smallest size below it.",
        record=NEVER, panel=SIZE,
    )  # fmt: skip
    sensitivity: str | Mapping[str, Any] | None = setting(
        None,
        "What bits are shared by: JSON of name to number, shapes alone (the default for --bits), or measured: the model is run (for a budget).",
        record=NEVER, metavar="FILE|shape|measured", panel=SIZE,
    )  # fmt: skip
    dim: int | None = setting(None, "Length of a sub-vector.", least=1, record=ALWAYS, panel=SIZE)
    codebooks: str | int | None = setting(
        None,
        "'heads': sub-vectors as long as an attention head; or N codebooks per weight.",
        record=ALWAYS, metavar="heads|N", panel=SIZE,
    )  # fmt: skip
    axis: Literal["out", "in"] | None = setting(
        None, "Axis that sub-vectors run along, where both are possible.", choices=AXES, record=ALWAYS, panel=SIZE
    )
    fit: str | None = setting(
        None,
        "How codebooks are found; random draws them, by a config alone where there are no weights.",
        choices=FITS, record=ALWAYS, panel=SIZE,
    )  # fmt: skip
    seed: int = setting(0, "Decides every random number.", least=0, record=ALWAYS, panel=SIZE)
    reproducible: bool = setting(
        False,
        "The same bytes on every processor, in up to twice the time; for fits to weights alone.",
        panel=SIZE,
    )
    stages: int | None = setting(
        None, "With `dim`: how many codewords are summed for one sub-vector.", panel=SIZE, flag=None
    )
    rotation: int | None = setting(
        None,
        "Size of a block-Hadamard rotation of the inputs, 0 for none; the preset's by default.",
        least=0,
        panel=SIZE,
    )
    outliers: float | None = setting(
        None,
        "Share of each output's weights, the largest, that is kept apart, in 32 bits each: 0.005.",
        least=0,
        most=0.1,
        panel=SIZE,
    )
    storage: str | None = setting(
        None,
        "How files hold codes: bytes, as small in memory, or entropy-coded (rans): the best quality for a file's bytes. rans with bits from 3 to 7.",
        choices=STORAGES,
        panel=SIZE,
    )
    grow: bool = setting(False, "Convert layers that would grow as well.", record=ALWAYS, panel=SIZE)
    dtype: Literal["float32", "float16", "bfloat16"] | None = setting(
        None,
        "Dtype of what stays dense and of decoded weights; as stored by default.",
        choices=DTYPES,
        record=ALWAYS,
        panel=SIZE,
    )
    include: tuple[str, ...] = setting(
        (), "Convert only these; repeatable.", record=ALWAYS, metavar="PATTERN", panel=WHAT
    )
    exclude: tuple[str, ...] = setting(
        (), "Leave these dense; repeatable.", record=ALWAYS, metavar="PATTERN", panel=WHAT
    )
    rules: tuple[Rule, ...] = setting(
        (),
        "Settings for matching parameters; repeatable, first match wins.",
        record=ALWAYS, metavar="PATTERN:KEY=VALUE,…", panel=WHAT, flag="rule",
    )  # fmt: skip
    max_shard_size: str | int = setting(DEFAULT_SHARD, "Largest weight file.", metavar="SIZE", panel=SIZE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", as_rules(self.rules))
        for name in ("include", "exclude"):
            given: str | Iterable[str] = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "dtype", dtype_text(self.dtype))
        check_values(self, PlanError)
        if self.preset is not None:
            check_preset(self.preset)
        self._check_sizes()
        if self.storage is not None and self.fit is not None and (self.storage == "rans") != (self.fit == "ecvq"):
            raise PlanError(
                f"fit={self.fit!r} and storage={self.storage!r} exclude each other: ecvq is the fit for rans"
            )
        if self.coded and (self.dim is not None or self.codebooks is not None):
            raise PlanError("entropy-coded weights take bits, a preset or a target_size, not dim or codebooks")
        if self.reproducible and self.measures:
            raise PlanError(
                "reproducible needs sensitivities that are given: a model is run to measure them, and processors round that in other "
                "ways; give sensitivity='shape', or a mapping"
            )
        if isinstance(self.sensitivity, str) and self.sensitivity not in SHARED_BY:
            raise PlanError(
                f"sensitivity must be 'shape', 'measured' or a mapping from names to numbers, not {self.sensitivity!r}"
            )
        if self.max_error is not None and self.fit == "random":
            raise PlanError(
                "max_error is of a fit, and fit='random' draws codebooks without looking at weights; leave one out"
            )

    @property
    def coded(self) -> bool:
        """Whether files are to hold codes entropy-coded, in any number of bits: where that is asked for, or best for the bits."""
        if self.storage is not None or self.fit is not None:
            return self.storage == "rans" or self.fit == "ecvq"
        return self.bits is not None and CODED_FROM <= self.bits <= MOST_CODED

    @property
    def shares(self) -> bool:
        """Whether entropy-coded parameters share an average of bits."""
        return self.coded and self.bits is not None

    @property
    def budgets(self) -> dict[str, Any]:
        """What the size of each parameter is chosen by: name -> value; empty where one size serves all."""
        mixed = self.bits if self.bits is not None and not self.coded and mixes(self.bits) else None
        asked = {"target_size": self.target_size, "max_error": self.max_error, "bits": mixed}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def chooses(self) -> bool:
        """Whether sizes are chosen by what the model is sensitive to."""
        return self.shares or bool(self.budgets.keys() - {"max_error"})

    @property
    def measures(self) -> bool:
        """Whether the model is run to measure what it is sensitive to."""
        if self.sensitivity is None:
            return bool(self.budgets.keys() - {"max_error"}) and self.fit != "random"
        return self.sensitivity == MEASURED

    def check_used(self) -> None:
        """Refuse what serves a curve, and does nothing for a single plan.

        Raises:
            PlanError: sensitivities without sizes to choose.
        """
        if self.sensitivity is not None and not self.chooses:
            raise PlanError("sensitivity serves a target_size or an average of bits; give one of them")

    def _check_sizes(self) -> None:
        given = [n for n in DECIDING if getattr(self, n) is not None]
        if len(given) > 1:
            raise PlanError(f"give one of {', '.join(given)}, not several: each decides the sizes")
        if self.stages is not None and self.dim is None:
            raise PlanError("stages needs dim: together they are the bits per weight")
        if self.bits is not None:
            split_bits(self.bits)
        for size in (self.target_size, self.max_shard_size):
            if size is not None:
                parse_size(size)
        if self.codebooks is not None and self.codebooks != "heads":
            try:
                int(self.codebooks)
            except (ValueError, TypeError):
                raise PlanError(f"codebooks must be 'heads' or a number, not {self.codebooks!r}") from None

    def as_json(self, name: str) -> Any:
        """Return the value of a field as a JSON value that means the same when it is given again."""
        value = getattr(self, name)
        if name == "rules":
            return [{"match": rule.match, **rule.settings} for rule in self.rules]
        return list(value) if isinstance(value, tuple) else value

    def record(self) -> dict[str, Any]:
        """Return what was asked, for plans and reports, as JSON values."""
        found = recorded(self) | {"rules": self.as_json("rules")}
        if all(found[k] is None for k in ("preset", "bits", "dim", "codebooks")):
            found["preset"] = DEFAULT_PRESET
        return found


class PlanKeywords(TypedDict, total=False):
    """What callers may give for the fields of `PlanOptions`, for type checkers."""

    preset: str | None
    bits: float | None
    target_size: str | int | None
    max_error: float | None
    sensitivity: str | Mapping[str, Any] | None
    dim: int | None
    codebooks: str | int | None
    axis: Literal["out", "in"] | None
    fit: str | None
    seed: int
    reproducible: bool
    stages: int | None
    rotation: int | None
    outliers: float | None
    storage: Literal["bytes", "rans"] | None
    grow: bool
    dtype: str | torch.dtype | None
    include: str | Iterable[str]
    exclude: str | Iterable[str]
    rules: Given | Iterable[Given]
    max_shard_size: str | int
