"""Rules: which settings a parameter gets. First match wins; a rule that matched nothing is an error.

A rule's pattern is an exact name (`layers.0.fc1`, with or without `.weight`), a glob (`*.fc1`), `re:` and a regular
expression that must match the whole name, or `type:` and a class name (`type:Linear`, subclasses included). Presets are
TOML files in `configs/`: settings for everything, then rules.
"""

from __future__ import annotations

import fnmatch
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpq_convert.core.options import CODEBOOK_DTYPES, STORED_DTYPES, dtype_text, near, one_of
from rpq_convert.errors import PlanError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import check, read_text

if TYPE_CHECKING:  # rules are free of torch, so that the command line can read them at once
    from rpq_convert.planning.slots import Slot

# What a rule or a preset may set.
SETTINGS = {
    "bits": "code bits per weight; chooses dim and stages",
    "dim": "length of a sub-vector",
    "stages": "codewords summed for one sub-vector",
    "books": "codebooks: a number shared by the blocks, or 'blocks' for one each",
    "num_codebooks": "the seed's argument: one codebook for each of this many equal blocks; the cut length must divide",
    "axis": "cut axis, 'out' or 'in'",
    "codebook_dtype": "float32, float16, bfloat16, or float8_e4m3fn: one byte, for 2 bits and less, with scales",
    "scales": "dtype of one scale per output row, or 'none'",
    "input_scales": "dtype of one scale per input of a matrix, or 'none'",
    "rotation": "block-Hadamard rotation of the inputs: its size, or the largest power of two below that divides them",
    "outliers": "share of each output's weights, the largest, that is kept apart in 32 bits each: 0.005",
    "storage": "how files hold codes: bytes, or rans: entropy-coded, in any number of bits; one byte each in memory",
    "fit": "kmeans, additive, ecvq (entropy-constrained: storage rans) or random",
    "grow": "convert even where the layer would grow",
    "skip": "leave it dense",
    "view": "axis names of a raw parameter, e.g. 'expert out in'",
}

AXES = ("out", "in")
STORAGES = ("bytes", "rans")
FITS = ("kmeans", "additive", "ecvq", "random")  # the names of fit.FITTERS, which a plan must not import
CHOICES = {
    "axis": AXES,
    "fit": FITS,
    "storage": STORAGES,
    "codebook_dtype": CODEBOOK_DTYPES,
    "scales": (*STORED_DTYPES, "none"),
    "input_scales": (*STORED_DTYPES, "none"),
}


@dataclass(frozen=True)
class Rule:
    """Settings for the parameters that a pattern matches.

    Example:
        >>> Rule("type:Embedding", {"bits": 8})
    """

    match: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _checked(self.settings, f"rule {self.match!r}"))
        for key in ("skip", "grow"):
            if not isinstance(self.settings.get(key, False), bool):
                raise PlanError(f"rule {self.match!r}: {key} must be true or false, not {self.settings[key]!r}")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as e:
                raise PlanError(f"rule {self.match!r} is no regular expression: {e}") from None

    def matches(self, slot: Slot) -> bool:
        if self.match.startswith("type:"):
            wanted = self.match[5:]
            return any(k == wanted or k.rpartition(".")[2] == wanted for k in slot.kinds)
        names = [n for full in (slot.name, *slot.aliases) for n in (full, full.rpartition(".")[0])]
        if self.match.startswith("re:"):
            return any(re.fullmatch(self.match[3:], n) for n in names)
        if any(c in self.match for c in "*?["):
            return any(fnmatch.fnmatchcase(n, self.match) for n in names)
        return self.match in names


def _checked(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings with dtypes as text; refuse one that is unknown, or a word that is none of its choices."""
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise PlanError(
            f"{where} sets {', '.join(unknown)}{near(unknown[0], SETTINGS)}; known settings: {', '.join(SETTINGS)}"
        )
    named = {k: dtype_text(v) for k, v in settings.items() if k in ("codebook_dtype", "scales", "input_scales")}
    checked = {**settings, **named}
    for name, choices in CHOICES.items():
        if checked.get(name) is not None:
            one_of(f"{where}: {name}", checked[name], choices, PlanError)
    return checked


@dataclass(frozen=True)
class Preset:
    name: str
    description: str
    settings: Mapping[str, Any]
    rules: tuple[Rule, ...] = ()


def as_rules(given: Any) -> tuple[Rule, ...]:
    """Return rules as people give them: one or several, each as `as_rule` takes it; or patterns and their settings in one mapping."""
    if isinstance(given, (str, Rule)) or (isinstance(given, Mapping) and "match" in given):
        return (as_rule(given),)
    if isinstance(given, Mapping):
        if plain := [p for p, settings in given.items() if not isinstance(settings, Mapping)]:
            raise PlanError(
                f"rules {dict(given)!r}: give {plain[0]!r} settings, such as {{'bits': 8}}, or the rule a 'match'"
            )
        return tuple(Rule(pattern, settings) for pattern, settings in given.items())
    return tuple(as_rule(rule) for rule in given)


def as_rule(rule: Rule | Mapping[str, Any] | str) -> Rule:
    """Accept a Rule, a mapping with `match` and settings, or their text, `PATTERN:key=value,key=value`."""
    if isinstance(rule, Rule):
        return rule
    rest = parse_rule(rule) if isinstance(rule, str) else dict(rule)
    if "match" not in rest:
        raise PlanError(f"rule {dict(rest)!r} has no 'match'")
    return Rule(rest.pop("match"), rest)


def parse_rule(text: str) -> dict[str, Any]:
    """Turn `PATTERN:key=value,key=value` into a rule. The last colon divides, so `type:Linear:bits=4` is meant well.

    Raises:
        PlanError: it is not written so.
    """
    pattern, colon, settings = text.rpartition(":")
    if not colon or not pattern or not settings:
        raise PlanError(f"rule {text!r} is not PATTERN:key=value,key=value")
    rule: dict[str, Any] = {"match": pattern}
    for item in settings.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals and key in ("skip", "grow"):
            value = "true"
        elif not equals or not key or not value:
            raise PlanError(f"rule {text!r}: {item!r} is not key=value")
        if key == "match":
            raise PlanError(f"rule {text!r} sets match; the pattern goes before the colon")
        rule[key] = _value(value)
    return rule


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def preset_names() -> list[str]:
    files = resources.files("rpq_convert.configs").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def check_preset(name: Any) -> Any:
    """Return the file of a preset, given by its name in `configs/` or by its path.

    Raises:
        PlanError: there is none; it lists those that there are.
    """
    if not isinstance(name, str):
        raise PlanError(f"preset must be a name or the path of a .toml file, not {name!r}")
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise PlanError(f"preset file {name} does not exist")
        return Path(name)
    known = preset_names()
    if name not in known:
        raise PlanError(
            f"unknown preset {name!r}{near(name, known)}; presets: {', '.join(known)}, or the path of a .toml file{_or_file(name)}"
        )
    return resources.files("rpq_convert.configs") / f"{name}.toml"


def load_preset(name: str) -> Preset:
    """Read a preset by its name in `configs/`, or a TOML file by its path."""
    path = check_preset(name)
    try:
        data = tomllib.loads(read_text(path, kinds.PRESET, PlanError))
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise PlanError(f"{name} is not a preset: it is not valid TOML: {e}") from None
    check(data, kinds.PRESET, name, PlanError)
    rules = tuple(as_rule(r) for r in data.get("rules", ()))
    return Preset(name, data.get("description", ""), data.get("settings", {}), rules)


def _or_file(name: str) -> str:
    return f", which ends in .toml: {name} does not" if Path(name).is_file() else ""


def settings_for(slot: Slot, base: Mapping[str, Any], rules: Iterable[Rule]) -> tuple[dict[str, Any], Rule | None]:
    """Return the settings of a slot: the base, overlaid by the first rule that matches; and that rule."""
    for rule in rules:
        if rule.matches(slot):
            return overlay(base, rule.settings), rule
    return dict(base), None


SIZES = ("bits", "dim", "num_codebooks")


def overlay(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others; a new size (bits, dim or num_codebooks) replaces the old one whole."""
    merged = dict(base)
    if any(k in new for k in SIZES):
        for k in (*SIZES, "stages"):
            merged.pop(k, None)
    return merged | dict(new)


@dataclass(frozen=True)
class Settings:
    """The settings of one parameter, base and rules laid over each other; SETTINGS says what each means.

    Args:
        own_bits: whether a rule of the user's sets `bits`.
    """

    bits: float | None = None
    dim: int | None = None
    stages: int = 1
    books: int | str = 1
    num_codebooks: int | None = None
    axis: str | None = None
    codebook_dtype: str = "float16"
    scales: str = "none"
    input_scales: str | None = None
    rotation: int = 0
    outliers: float = 0
    storage: str | None = None
    fit: str | None = None
    grow: bool = False
    skip: bool = False
    view: str | None = None
    own_bits: bool = False

    @property
    def coded(self) -> bool:
        """Whether files hold codes entropy-coded."""
        return (
            self.storage in ("rans", None) and self.fit in ("ecvq", None) and (self.storage, self.fit) != (None, None)
        )

    def sized(self, bits: float) -> Settings:
        """Return the same with another size."""
        return replace(self, bits=bits, dim=None, stages=1, num_codebooks=None)


def split_bits(bits: float) -> tuple[int, int]:
    """Return (dim, stages) with the most code bits per weight that do not exceed `bits`; fewer stages first.

    Three stages at dim 8 are 3 bits; what one codebook gives exactly (8, 4, 2, 1, 0.5) gets one.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0.05 <= bits <= 8:
        raise PlanError(f"bits must be a number between 0.05 and 8, not {bits!r}")
    options = [(8 * s / d, -s, d) for s in (1, 2, 3) for d in (*range(1, 17), 32, 64, 128) if s == 1 or d <= 8]
    best = max((o for o in options if o[0] <= bits + 1e-9), default=None)
    if best is None:
        return round(8 / bits), 1
    return best[2], -best[1]


def mixes(bits: float) -> bool:
    """Say whether it takes several rates to have these bits; what no mix can have is left to `split_bits` to refuse."""
    try:
        dim, stages = split_bits(bits)
    except PlanError:
        return False
    return 0.5 < bits < 8 and not math.isclose(8 * stages / dim, bits, rel_tol=2e-3)
