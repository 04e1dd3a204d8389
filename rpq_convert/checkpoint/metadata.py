"""What an RPQ folder holds beside its weights: config.json, report, model card.

`config.json` holds everything from which the model is rebuilt, and never a name of code to run. The report's bytes are those of
the files as written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rpq_convert.core.results import MEASURED, Evaluation
from rpq_convert.errors import SourceError
from rpq_convert.hf.composite import with_description
from rpq_convert.hf.model_card import BASE_CARD, Base, is_ours, model_card, with_quality
from rpq_convert.planning.plan import Plan
from rpq_convert.report import charts
from rpq_convert.report.schema import FileRow, Report, read_report
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.schemas.kinds import FORMAT_VERSION
from rpq_convert.storage.assembly import write_file
from rpq_convert.storage.lock import locked
from rpq_convert.storage.manifest import amend, made_now, write_manifest
from rpq_convert.storage.records import CARD, CHART, CONFIG, PLAN, REPORT
from rpq_convert.storage.writer import Folder
from rpq_convert.version import __version__


def make_report(
    plan: Plan,
    facts: Mapping[str, Mapping[str, Any]],
    title: str,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """Return the plan's report with what the fits measured, and what was measured of the whole model."""
    rows = []
    for row in plan.rows():
        measured: dict[str, Any] = {k: facts[row.name].get(k) for k in MEASURED} if row.name in facts else {}
        rows.append(replace(row, **measured))
    report = replace(plan.report(title), rows=tuple(rows), evaluations=tuple(evaluations))
    return replace(report, warnings=(*report.warnings, *_calibrated(plan, report)))


def _calibrated(plan: Plan, report: Report) -> list[str]:
    """Return warnings about layers with too few calibration inputs."""
    seen = {row.name: row.inputs for row in report.rows if row.inputs}
    if not seen:
        return []
    said = []
    unseen = [j.name for j in plan.jobs if j.name not in seen and not j.is_random and "Embedding" not in j.layer]
    if unseen:
        names = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
        said.append(f"not reached by calibration, fitted to the weights alone: {names}")
    channels = {j.name: j.weight_view.matrix_shape(j.shape, "in")[1] for j in plan.jobs}
    few = [name for name, inputs in seen.items() if inputs < channels[name]]
    if few:
        worst = min(few, key=lambda name: seen[name] / channels[name])
        said.append(
            f"{len(few)} layers saw fewer inputs than they have input channels ({worst}: {seen[worst]} for "
            f"{channels[worst]}); give more calibration samples"
        )
    return said


def quantization_config(plan: Plan, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of config.json from which the model is rebuilt."""
    modules = {
        j.name: {
            **j.spec.to_dict(), "view": j.view, "shape": list(j.shape), "dtype": j.dtype,
            "zero_row": facts[j.name].get("zero_row"),
        }
        for j in plan.jobs
    }  # fmt: skip
    return {
        "quant_method": "rpq",
        "format_version": FORMAT_VERSION,
        "modules": modules,
        "tied": {a: x.name for items in (plan.jobs, plan.skips) for x in items for a in x.aliases},
        "guard": plan.guards[0] if plan.guards else None,
        "plan_sha256": plan.sha256,
        "version": __version__,
    }


def write_rest(
    folder: Folder,
    config: Mapping[str, Any] | None,
    facts: Mapping[str, Mapping[str, Any]],
    title: str,
    base: Base | None = None,
    *,
    extra: Sequence[str] = (),
    extra_state: Mapping[str, Any] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """Write config, report and model card beside the weights, and finish the folder.

    Args:
        config: the config.json of a transformers model. facts: what the fits measured. title: of the report. base: for the card.
        extra: tensors that the model has no place for. extra_state: states of modules that are no tensors.
        evaluations: what was measured of the model.
    """
    plan = folder.plan
    merged: dict[str, Any] = dict(config or {"library_name": "rpq-convert"})
    if plan.options.get("dtype") and config is not None:
        merged["dtype"] = plan.options["dtype"]
        merged.pop("torch_dtype", None)
    elif "model_type" in merged and not (merged.get("dtype") or merged.get("torch_dtype")):
        first = plan.jobs[0].dtype if plan.jobs else plan.skips[0].dtype
        merged["dtype"] = first  # transformers would take the first tensor's, which is a codebook's
    beside = {"extra": [*extra], "extra_state": dict(extra_state or {})}
    described = quantization_config(plan, facts) | {k: v for k, v in beside.items() if v}
    folder.write(CONFIG, json.dumps(with_description(merged, described), indent=1))
    report = _sourced(make_report(plan, facts, title, evaluations=evaluations), base)
    if charts.has_depths(report):
        folder.write(CHART, charts.by_depth(report).png())
    if base is not None and base.card is not None:
        shutil.copyfile(base.card, folder.work / BASE_CARD)
    own = base is not None and base.factory  # whatever its config says, transformers does not build it
    folder.write(CARD, model_card(report, None if own else config, folder.out.name, folder.files(), base))
    sizes = tuple(FileRow(name, p.stat().st_size) for name, p in folder.files().items() if name != REPORT)
    report = replace(report, files=sizes)
    if odd := sorted(folder.broken()):
        said = f"NaN or infinite values, as where they come from: {', '.join(odd[:4])}"
        report = replace(report, warnings=(*report.warnings, said))
    folder.write(REPORT, report.to_json())
    folder.finish()
    return report


def _sourced(report: Report, base: Base | None) -> Report:
    """Return the report with what its card needs to say how the folder is made again."""
    known = base.record if base is not None else {}
    return replace(report, options={**report.options, "source": known}) if known else report


def renew(
    folder: Path,
    plan: Plan,
    facts: Mapping[str, Mapping[str, Any]],
    title: str,
    base: Base | None,
    not_finite: Sequence[str] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write plan, report, model card and manifest of weights that another library wrote, over those of an earlier model.

    A card that is not ours stays. No card is in the manifest: that library may add to it later.

    Args:
        not_finite: as in the manifest. The others: as for `write_rest`.
    """
    config = read_json(folder / CONFIG, kinds.CONFIG, SourceError)
    write_file(folder / PLAN, plan.to_json())
    report = make_report(plan, facts, title, evaluations=evaluations)
    (folder / CHART).unlink(missing_ok=True)
    if charts.has_depths(report):
        write_file(folder / CHART, charts.by_depth(report).png())
    files = {p.name: p for p in sorted(folder.iterdir()) if p.is_file()}
    if CARD not in files or is_ours(files[CARD]):
        write_file(folder / CARD, model_card(report, config, folder.resolve().name, files, base))
        files[CARD] = folder / CARD
    sizes = tuple(FileRow(name, p.stat().st_size) for name, p in sorted(files.items()) if name != REPORT)
    written = sum(f.bytes for f in sizes if f.name.endswith(".safetensors"))
    report = replace(report, files=sizes, predicted_bytes=written)
    write_file(folder / REPORT, report.to_json())
    listed = {name: p for name, p in (files | {REPORT: folder / REPORT}).items() if name != CARD}
    write_manifest(folder, listed, not_finite, made_now(plan))


def add_evaluation(folder: Path, on: str, found: Evaluation) -> Report:
    """Write what was measured into a folder's report and model card, and return the report. It replaces an earlier result on the same data.

    Args:
        on: the name of what was measured on, such as a file's.
    """
    with locked(folder):
        report = with_evaluation(read_report(folder / REPORT), on, found)
        card = folder / CARD
        amend(folder, {REPORT: report.to_json(), CARD: with_quality(card.read_text("utf8"), report)})
    return report


def with_evaluation(report: Report, on: str, found: Evaluation) -> Report:
    """Return a report with what was measured, in the place of an earlier result on the same data."""
    others = [e for e in report.evaluations if (e["on"], e["kind"]) != (on, found.kind)]
    entry = {"on": on, "kind": found.kind, "samples": found.samples, "metrics": dict(found.metrics)}
    if found.layers:
        entry["layers"] = dict(found.layers)
    return replace(report, evaluations=(*others, entry))
