"""Model card: the README.md of an output folder, as the hub renders it.

Its metadata name the base model and its licence. Its text shows the code that loads this kind of model, the size of every
tensor, and the command that made it. The base's own card stays readable: the card links to it. Where the base is not a
repository of the hub, its card is kept as README.base.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rpq_convert.hf.commands import BESIDE, commands
from rpq_convert.hf.hub import Repository
from rpq_convert.report.schema import Report
from rpq_convert.report.verdict import POOR, RUINED, verdict
from rpq_convert.showing import markdown_text, printable
from rpq_convert.storage.records import CARD, CHART
from rpq_convert.storage.remote import Remote
from rpq_convert.version import __version__

BASE_CARD = "README.base.md"
ALT = "Error and bits per weight of every layer, in the model's order"
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # what the hub allows as a name
TAGS = ["rpq", "quantization", "product-quantization"]
KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the base's metadata
TRANSFORMERS = """\
import rpq_convert  # teaches transformers to read RPQ weights
from transformers import {names}

model = {auto}.from_pretrained("{place}")
"""
PLAIN = """\
import rpq_convert as rpq

# factory: the function that builds the dense model; its weights are never allocated
model = rpq.load("{place}", factory={factory})
"""
# A file in the folder -> the class that reads it.
COMPANIONS = {
    "processor_config.json": "AutoProcessor",
    "preprocessor_config.json": "AutoImageProcessor",
    "tokenizer_config.json": "AutoTokenizer",
    "tokenizer.json": "AutoTokenizer",
}


@dataclass(frozen=True)
class Base:
    """What a model was converted from, as far as its card may say.

    Args:
        name, commit: of a repository of the hub.
        source: as the command that converts names it; empty for a model in memory.
        factory: that builds the model, where one was given.
        card: the README.md of a folder that is no repository.
        metadata: what is kept of the base's.
        allow_pickle, state_dict: how its weights were read. asked: options of the command beside those of plan and source.
    """

    name: str = ""
    commit: str = ""
    source: str = ""
    factory: str = ""
    card: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    allow_pickle: bool = False
    state_dict: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What a report keeps: from where the checkpoint came, and how it was read; empty for a model in memory."""
        found = {
            "name": self.source, "factory": self.factory, "revision": self.commit, "allow_pickle": self.allow_pickle,
            "state_dict": self.state_dict, "asked": dict(self.asked),
        }  # fmt: skip
        return {k: v for k, v in found.items() if v} if self.source else {}


def base_in(folder: Path, repository: Remote | None = None, factory: str | Callable[..., Any] | None = None) -> Base:
    """Return the base that a checkpoint's folder describes. A converted folder describes its own base."""
    found, card = _read(folder / CARD), folder / CARD
    kept = {k: found[k] for k in KEPT if k in found}
    if is_ours(card):
        return Base(name=str(found.get("base_model", "")), metadata=kept)
    named = factory if isinstance(factory, str) else _named(factory) if factory else ""
    if isinstance(repository, Repository):
        return Base(repository.name, repository.commit, repository.name, named, metadata=kept)
    name = folder.resolve().name if repository is None else repository.name
    return Base("", "", name, named, card if card.is_file() else None, kept)


def _named(factory: Any) -> str:
    """Return a function's name as a factory is named; of a partial function that of what it calls."""
    inner = getattr(factory, "func", factory)
    return f"{getattr(inner, '__module__', '')}:{getattr(inner, '__qualname__', type(inner).__name__)}"


def base_of(name: str) -> Base:
    """Return the base of a model in memory, if the hub's cache shows that it came from the repository of this name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return Base()
    if not isinstance(file, str):
        return Base()
    folder = Path(file).parent
    return replace(base_in(folder, Repository(name, folder, {})), source="")


def is_ours(card: Path) -> bool:
    """Say whether a README.md is the card of a converted model."""
    return "rpq" in _read(card).get("tags", ())


def _read(card: Path) -> dict[str, Any]:
    """Return the texts and lists of texts in a card's YAML block; an empty dict for a card that cannot be read."""
    from huggingface_hub import metadata_load

    if not card.is_file():
        return {}
    try:
        found = metadata_load(card) or {}
    except Exception:  # YAML's errors are of many kinds, and a base's broken card is no reason to stop
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) or _texts(v)}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def model_card(
    report: Report,
    config: Mapping[str, Any] | None,
    place: str,
    files: Collection[str] = (),
    base: Base | None = None,
) -> str:
    """Return the README.md of an output folder.

    Args:
        report: its size audit.
        config: the config.json of a transformers model; None for any other.
        place: the name in the loading code: the folder, after a push the repository.
        files: names of the files in the folder.
        base: what was converted.
    """
    from huggingface_hub import ModelCardData

    base = base or Base()
    auto, task = "", None
    if config is not None:
        from rpq_convert.hf.tasks import task_of

        auto, task = task_of(config)
        auto = auto if auto.isidentifier() else "AutoModel"  # it is written into code
    facts = {"pipeline_tag": task, **base.metadata}
    if base.name:
        facts |= {"base_model": base.name, "base_model_relation": "quantized"}
    header = ModelCardData(library_name="transformers" if auto else "rpq-convert", tags=TAGS, **facts).to_yaml()
    parts = [
        f"---\n{header}\n---",
        f"# {markdown_text(report.title)}, product-quantized",
        f"{_origin(base)} Its weights are uint8 codes and small codebooks (rpq-convert), expanded when used or computed on.",
        f"```python\n{loading(auto, place, files, base)}```",
        SIZE,
        *([f"![{ALT}]({CHART})"] if CHART in files else []),
        report.to_markdown(),
        "## How it was made",
        *_made(report, place),
        f"Made with rpq-convert {__version__}, torch {version('torch')}"
        + (f", transformers {version('transformers')}." if auto else "."),
    ]
    card = "\n\n".join(parts) + "\n"
    return with_quality(card, report) if report.evaluations else card


QUALITY, SIZE = "## Quality", "## Size"  # headings


def with_quality(card: str, report: Report) -> str:
    """Return a card that shows the report's evaluations before its size table, in the place of those it showed."""
    rows = [
        f"| {markdown_text(e['on'])} | {markdown_text(e['kind'])}, {e['samples']:,} | {markdown_text(name.replace('_', ' '))} | {value:.4f} |"
        for e in report.evaluations
        for name, value in e["metrics"].items()
    ]
    table = ["| measured on | what | metric | value |", "|---|---|---|---:|", *rows]
    judged = verdict(report)
    bad = "**Warning**: " if judged is not None and judged.level in (POOR, RUINED) else ""
    said = [] if judged is None else [f"> {bad}{markdown_text(str(judged))}", ""]
    section = "\n".join([QUALITY, "", *said, *table])
    card = _with_index(card, report)
    before, found, rest = card.partition(f"\n{QUALITY}\n")
    if found:
        _, heading, after = rest.partition("\n## ")
        return f"{before}\n{section}\n{heading}{after}"
    before, found, rest = card.partition(f"\n{SIZE}\n")
    return f"{before}\n{section}\n{found}{rest}" if found else f"{card.rstrip()}\n\n{section}\n"


METRIC_TYPES = {"spearman": "spearmanr", "top1_agreement": "accuracy"}  # ours -> the hub's, where it has another name
TASK_TYPES = {"language model": "text-generation", "sentence pairs": "sentence-similarity"}


def _with_index(card: str, report: Report) -> str:
    """Return a card whose metadata hold the report's evaluations as the hub reads them (`model-index`)."""
    from huggingface_hub import EvalResult, ModelCard

    found: Any = ModelCard(card, ignore_metadata_errors=True)
    task = found.data.get("pipeline_tag")
    results = [
        EvalResult(
            task_type=task or TASK_TYPES.get(e["kind"], "other"), dataset_type="custom", dataset_name=printable(e["on"]),
            metric_type=METRIC_TYPES.get(name, name), metric_name=name.replace("_", " "), metric_value=round(value, 6),
        )
        for e in report.evaluations
        for name, value in e["metrics"].items()
        if math.isfinite(value) and not name.startswith("base_")
    ]  # fmt: skip
    if results:
        found.data.model_name, found.data.eval_results = printable(report.title), results
    return str(found)


def _origin(base: Base) -> str:
    if base.name and not REPOSITORY.fullmatch(base.name):
        return f"Converted from {markdown_text(base.name)}."
    if base.name:
        url = f"https://huggingface.co/{base.name}"
        at = f", commit [{base.commit[:12]}]({url}/tree/{base.commit})" if base.commit else ""
        return f"Converted from [{base.name}]({url}){at}: see there for what it is meant for and how it was trained."
    if base.card:
        return f"Converted from {markdown_text(base.source)}, whose own card is [{BASE_CARD}]({BASE_CARD})."
    return f"Converted from {markdown_text(base.source)}." if base.source else ""


def loading(auto: str, place: str, files: Collection[str], base: Base) -> str:
    """Return the code that loads the folder, by the Auto class of a transformers model or by a factory."""
    if not auto:
        return PLAIN.format(place=place, factory=f'"{base.factory}"' if base.factory else "build_model")
    beside = dict.fromkeys(reader for file, reader in COMPANIONS.items() if file in files)
    if "AutoProcessor" in beside:  # it holds the others
        beside = {"AutoProcessor": None}
    code = TRANSFORMERS.format(names=", ".join((auto, *beside)), auto=auto, place=place)
    return code + "".join(f'{_variable(r)} = {r}.from_pretrained("{place}")\n' for r in beside)


def _variable(reader: str) -> str:
    return "tokenizer" if reader == "AutoTokenizer" else "processor"


def _made(report: Report, place: str) -> list[str]:
    """Return the commands, or the call for a model in memory, and what was measured."""
    given = {
        k: v
        for k, v in report.options.items()
        if k not in BESIDE and v not in (None, False, [], ()) and (k, v) != ("seed", 0)
    }
    calibration, tuning = report.options.get("calibration"), report.options.get("tuning")
    said = []
    if ran := commands(report.options, place):
        said.append("```\n" + "\n".join(ran) + "\n```")
    elif given:
        inputs = ", calibration=inputs" if calibration else ""
        said.append(f"```python\nrpq.convert(model, {', '.join(f'{k}={v!r}' for k, v in given.items())}{inputs})\n```")
    if calibration:
        said.append(f"Calibrated on {calibration['items']} inputs (sha256 {calibration['sha256']}).")
    if tuning:
        loss = f"held-out loss {tuning['before']:.4g} before, {tuning['after']:.4g} after"
        said.append(f"Tuned against the dense model, {tuning['steps']} steps: {loss}.")
    return said
