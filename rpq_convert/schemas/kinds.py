"""One schema per kind of file that rpq-convert reads. `docs/schemas/` holds them as JSON Schema (`python -m rpq_convert.schemas`).

A struct with `forbid_unknown_fields` describes values whose every field changes what weights mean: an unknown field was written by a
newer version, and must not be passed over. The other structs ignore what they do not know. The file is long because all kinds are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

MAX_NUMBERS = 1 << 48  # numbers of one tensor
MAX_AXES = 32
FORMAT_VERSION = 1  # of plans and of converted folders

Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=1, le=MAX_NUMBERS)]
NotNegative = Annotated[float, Meta(ge=0)]
Finite = Annotated[float, Meta(ge=0, le=1e300)]
Shape = Annotated[list[Size], Meta(max_length=MAX_AXES)]
Axis = Literal["out", "in"]
Float = Literal["float32", "float16", "bfloat16", "float64"]
CodebookDtype = Literal["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"]
Rotation = Literal[0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
Fit = Literal["kmeans", "additive", "ecvq", "random"]
Storage = Literal["bytes", "rans"]


def _check_numbers(shape: Sequence[int]) -> None:
    if math.prod(shape) > MAX_NUMBERS:
        raise ValueError(f".shape must have a product of at most {MAX_NUMBERS:,}")


class SpecEntry(Struct, forbid_unknown_fields=True):
    """How one parameter is stored (`rpq_convert.core.spec.Spec`)."""

    dim: Count
    books: Count = 1
    stages: Count = 1
    axis: Axis = "out"
    codebook_dtype: CodebookDtype = "float16"
    scales: Float | None = None
    layout: Literal["blocks", "rows"] = "blocks"
    rotation: Rotation = 0
    outliers: Size = 0
    outlier_dtype: Float = "float16"
    input_scales: Float | None = None
    storage: Storage = "bytes"
    rate: Annotated[float, Meta(gt=0, le=8.08)] | None = None


class JobEntry(Struct, forbid_unknown_fields=True):
    """One parameter to convert (`rpq_convert.planning.plan.Job`)."""

    name: str
    aliases: list[str]
    layer: str
    shape: Shape
    dtype: Float
    view: str
    spec: SpecEntry
    fit: Fit
    seed: Size
    rule: str
    padding_idx: Size | None = None
    reproducible: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self.shape)


class SkipEntry(Struct, forbid_unknown_fields=True):
    """One parameter or buffer that stays dense (`rpq_convert.planning.plan.Skip`)."""

    name: str
    aliases: list[str]
    layer: str
    shape: Shape
    dtype: str
    reason: str
    buffer: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self.shape)


class DroppedEntry(Struct, forbid_unknown_fields=True):
    """A tensor of the source that is left out, and why (`rpq_convert.report.schema.Dropped`)."""

    name: str
    shape: Shape
    dtype: str
    reason: str


class PlanFile(Struct):
    """rpq_plan.json: what happens to every parameter. Unknown fields beside these are ignored."""

    format_version: Literal[1]
    jobs: list[JobEntry]
    skips: list[SkipEntry]
    options: dict[str, Any]
    max_shard_size: Annotated[int, Meta(ge=1)]
    warnings: list[str]
    dropped: list[DroppedEntry] = []
    parts: list[str] = []


class RowEntry(Struct, forbid_unknown_fields=True):
    """What happened to one tensor (`rpq_convert.report.schema.Row`)."""

    name: str
    layer: str
    shape: Shape
    dtype: str
    decision: Literal["rpq", "dense", "buffer"]
    reason: str
    dense_bytes: Size
    aliases: list[str]
    codebook_bytes: Size = 0
    code_bytes: Size = 0
    scale_bytes: Size = 0
    outlier_bytes: Size = 0
    other_bytes: Size = 0
    spec: str = ""
    expected_error: NotNegative | None = None
    error: NotNegative | None = None
    seconds: NotNegative | None = None
    dead: Size | None = None
    inputs: Size | None = None
    worst: NotNegative | None = None
    output_error: NotNegative | None = None
    worst_output: NotNegative | None = None
    memory_bytes: Size | None = None

    def __post_init__(self) -> None:
        _check_numbers(self.shape)


class FileEntry(Struct, forbid_unknown_fields=True):
    """A file of the folder, and its size."""

    name: str
    bytes: Size


class EvaluationEntry(Struct):
    """What was measured: on what, of which kind, on how many samples. Metrics may be infinite or NaN.

    `layers`: path of a converted weight -> relative squared error that it adds to its layer's output.
    """

    on: str
    kind: str
    samples: Size
    metrics: dict[str, float]
    layers: dict[str, float] = {}


class WorstEntry(Struct, forbid_unknown_fields=True):
    """The row with the largest error, and what that is the error of."""

    name: str
    of: Literal["output", "weight"]
    value: NotNegative


class SummaryEntry(Struct, forbid_unknown_fields=True):
    """What follows from a report's rows (`rpq_convert.report.schema.Report.summary`); it is written for readers and never read."""

    bytes: Size
    dense_bytes: Size
    bits_per_weight: NotNegative
    held_bytes: Size
    output_error: NotNegative | None = None
    error: NotNegative | None = None
    worst_layer: WorstEntry | None = None
    worst_output: WorstEntry | None = None


class ReportFile(Struct, forbid_unknown_fields=True):
    """rpq_report.json: the size audit (`rpq_convert.report.schema.Report`)."""

    schema_version: Literal[1]
    title: str
    rows: list[RowEntry]
    files: list[FileEntry]
    warnings: list[str]
    options: dict[str, Any] = {}
    predicted_bytes: Size | None = None
    version: str = ""
    evaluations: list[EvaluationEntry] = []
    dropped: list[DroppedEntry] = []
    summary: SummaryEntry | UnsetType = UNSET


Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class FileFacts(Struct):
    """Size and SHA-256 of one file."""

    bytes: Size
    sha256: Sha256


class ManifestEntry(FileFacts):
    """Size and SHA-256 of one file, and of a weight file's tensors. Unknown fields are ignored.

    `earlier`: what a file that is being replaced was; until the replacement is done it may be either.
    """

    tensors: dict[str, Sha256] = {}
    earlier: FileFacts | None = None


class SourceFile(Struct):
    """A weight file of a source: size, SHA-256 of its header, of a sample of each tensor, and of all bytes where they were read.

    `mark`, in place of a sample, is what the store of a file at an address said of it: size and ETag, or what it has in its place.
    """

    name: str
    bytes: Size
    header: Sha256
    sample: Sha256 | None = None
    sha256: Sha256 | None = None
    mark: str | None = None


class SourceRecord(Struct):
    """What weights come from (`rpq_convert.storage.origin.Origin`). Unknown fields are ignored.

    `tensors`: parameter that was converted -> SHA-256 of what it was fitted to.
    """

    files: list[SourceFile]
    repository: str | None = None
    revision: str | None = None
    tensors: dict[str, Sha256] = {}


class OriginFile(SourceRecord):
    """rpq_source.json, in unfinished folders only: the source, and path, size and time of its files when they were last looked at."""

    seen: list[tuple[str, Size, int]] = []


class MadeEntry(Struct):
    """How a folder was made: the plan, the source, and what it was made with. Unknown fields are ignored.

    `processor` names the instructions that fits have used: between kinds of processors codes differ, unless they are `reproducible`.
    """

    plan: Sha256
    version: str
    processor: str
    source: SourceRecord | None = None
    reproducible: bool = False


class ManifestFile(Struct):
    """rpq_manifest.json: every other file of the folder, and how it was made. Unknown fields are ignored.

    `not_finite` names the buffers that held NaN or infinite values where they came from, such as attention masks.
    """

    files: dict[str, ManifestEntry]
    not_finite: list[str] = []
    made: MadeEntry | None = None


class WrittenEntry(ManifestEntry):
    """A weight file that an unfinished run has assembled; `not_finite` as in the manifest."""

    not_finite: list[str] = []


class ModuleEntry(SpecEntry, forbid_unknown_fields=True, kw_only=True):
    """One RPQ weight, from which it is rebuilt empty; unknown fields would change how codes decode, and are refused."""

    view: str
    shape: Annotated[list[Count], Meta(max_length=16)]
    dtype: Float
    zero_row: Size | None = None

    def __post_init__(self) -> None:
        _check_numbers(self.shape)


class Contents(Struct, kw_only=True):
    """What `quantization_config` says of the weights: every RPQ weight, names of tied ones, and the guard.

    `extra` names tensors that the model has no place for, `extra_state` holds what modules keep beside their tensors.
    """

    modules: dict[str, ModuleEntry]
    tied: dict[str, str]
    guard: str | None
    extra: list[str] = []
    extra_state: dict[str, Any] = {}


class Quantization(Contents, kw_only=True):
    """`quantization_config` of config.json. Unknown fields beside these are ignored."""

    quant_method: Literal["rpq"]
    format_version: Literal[1]
    plan_sha256: str | None = None
    version: str | None = None


class ConfigFile(Struct):
    """config.json of a converted folder, as far as rpq-convert reads it; transformers reads the rest."""

    quantization_config: Quantization
    model_type: str | None = None


class DenseConfigFile(Struct):
    """config.json of a checkpoint to convert, as far as rpq-convert reads it; transformers reads the rest."""

    quantization_config: dict[str, Any] | None = None
    transformers_weights: str | None = None


class Settings(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a preset sets for every parameter (`rpq_convert.planning.rules.SETTINGS`)."""

    bits: Annotated[float, Meta(ge=0.05, le=8)] | UnsetType = UNSET
    dim: Count | UnsetType = UNSET
    stages: Count | UnsetType = UNSET
    books: Literal["blocks"] | Count | UnsetType = UNSET
    num_codebooks: Count | UnsetType = UNSET
    axis: Axis | UnsetType = UNSET
    codebook_dtype: CodebookDtype | UnsetType = UNSET
    scales: Literal["float32", "float16", "bfloat16", "float64", "none"] | UnsetType = UNSET
    input_scales: Literal["float32", "float16", "bfloat16", "float64", "none"] | UnsetType = UNSET
    rotation: Size | UnsetType = UNSET
    outliers: Annotated[float, Meta(ge=0, le=0.1)] | UnsetType = UNSET
    storage: Storage | UnsetType = UNSET
    fit: Fit | UnsetType = UNSET
    grow: bool | UnsetType = UNSET
    skip: bool | UnsetType = UNSET
    view: str | UnsetType = UNSET


class RuleEntry(Settings, forbid_unknown_fields=True, kw_only=True):
    """A pattern, and what a preset sets for the parameters that it matches."""

    match: str


class PresetFile(Struct, forbid_unknown_fields=True):
    """A preset: a TOML file of `description`, `[settings]` and `[[rules]]`."""

    description: str = ""
    settings: Settings | UnsetType = UNSET
    rules: list[RuleEntry] = []


class PieceFacts(Struct, forbid_unknown_fields=True):
    """What a finished job measured, in the metadata of its piece in an unfinished folder; `source` is the hash of what it was fitted to."""

    name: str
    error: NotNegative | None
    dead: Size
    seconds: NotNegative
    zero_row: Size | None
    inputs: Size | None
    worst: NotNegative | None = None
    output_error: NotNegative | None = None
    worst_output: NotNegative | None = None
    source: Sha256 | None = None


class TuningFacts(Struct):
    """The state of a tuning run, in the metadata of its checkpoint. Unknown fields are ignored."""

    mark: str
    step: Size
    best_step: Size
    history: list[tuple[Size, float]]
    since: Size
    share: Annotated[float, Meta(gt=0, le=1)]
    began: Size


class IndexFile(Struct):
    """model.safetensors.index.json: which file holds which tensor. Unknown fields are ignored."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


class ModulesEntry(Struct):
    """A module of sentence-transformers, in modules.json: the subfolder that holds it. Unknown fields are ignored."""

    path: str = ""


class SentEntry(Struct):
    """A file that was sent to an address: what it was, and what the store said of it afterwards."""

    sha256: Sha256
    mark: str


class LockFile(Struct):
    """Who writes an output folder, in the lock file beside it. Unknown fields are ignored."""

    pid: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
    host: str
    command: str
    since: str


Bits = Annotated[str, Meta(pattern=r"^[0-9]{1,3}(\.[0-9]{1,9})?$")]
Losses = dict[str, Finite | Annotated[dict[Bits, Finite], Meta(min_length=1)]]


@dataclass(frozen=True)
class Kind:
    """A kind of file: what messages call it, its type, and what its format calls an object."""

    title: str
    type: Any
    table: str = "an object"


PLAN = Kind("a plan", PlanFile)
REPORT = Kind("a report", ReportFile)
MANIFEST = Kind("a manifest", ManifestFile)
CONFIG = Kind("the config of a converted folder", ConfigFile)
DENSE_CONFIG = Kind("the config of a checkpoint", DenseConfigFile)
CONTENTS = Kind("a description of RPQ weights", Contents)
MODULE = Kind("a description of an RPQ weight", ModuleEntry)
PRESET = Kind("a preset", PresetFile, "a table")
SENSITIVITIES = Kind("a table of sensitivities", Losses)
PIECE = Kind("a finished piece", PieceFacts)
ORIGIN = Kind("a record of source files", OriginFile)
WRITTEN = Kind("a record of weight files", dict[str, WrittenEntry])
INDEX = Kind("an index of weight files", IndexFile)
MODULES = Kind("a list of modules", list[ModulesEntry])
TUNING = Kind("the state of a tuning run", TuningFacts)
LOCK = Kind("a lock", LockFile)
SENT = Kind("a record of files that were sent", dict[str, SentEntry])

PUBLISHED = {
    "plan": PLAN, "report": REPORT, "manifest": MANIFEST, "config": CONFIG, "preset": PRESET, "sensitivities": SENSITIVITIES,
    "piece": PIECE, "source": ORIGIN, "written": WRITTEN, "lock": LOCK, "index": INDEX, "tuning": TUNING,
}  # fmt: skip
