"""Evaluate, tune and recalibrate a converted folder against its dense checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpq_convert.checkpoint.loading import load
from rpq_convert.checkpoint.metadata import add_evaluation
from rpq_convert.checkpoint.opening import Factory, Opened, open_checkpoint
from rpq_convert.checkpoint.saving import save
from rpq_convert.checkpoint.verifying import audit
from rpq_convert.conversion.recalibration import recalibrate
from rpq_convert.core.options import shown
from rpq_convert.core.results import Evaluation
from rpq_convert.errors import EvaluateError, SourceError
from rpq_convert.evaluation.evaluate import evaluate
from rpq_convert.evaluation.layers import layer_errors
from rpq_convert.evaluation.pairs import evaluate_pairs
from rpq_convert.evaluation.pooling import Pooled
from rpq_convert.hf.model_card import base_in
from rpq_convert.inputs.files import read_inputs, read_text, tokenizer_of
from rpq_convert.inputs.items import Calibration, prepare
from rpq_convert.inputs.synthetic import own_inputs
from rpq_convert.report.schema import Report
from rpq_convert.running.progress import Progress, Say, counted
from rpq_convert.storage.files import files_beside, refuse_links
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.records import REPORT, read_manifest
from rpq_convert.storage.room import check_free
from rpq_convert.tuning.blocks import tune_blocks_with
from rpq_convert.tuning.options import TuneOptions
from rpq_convert.tuning.tune import Tuning, tune_with


@dataclass(frozen=True)
class WithBase:
    """A converted folder, and the dense checkpoint that it was made from.

    Args:
        factory: builds a model that is not transformers'.
    """

    base: str | Path
    folder: str | Path
    factory: str | Factory | None = None

    def load(self) -> tuple[Any, Any]:
        """Return the dense model and the converted one, in evaluation mode."""
        converted: Any = load(self.folder, factory=self.factory)
        converted._rpq_options = {}
        if (Path(self.folder) / REPORT).is_file():
            converted._rpq_options = dict(audit(self.folder).options)  # for the next report and card
        if self.factory is not None:
            return open_checkpoint(self.base, SourceOptions(factory=self.factory)).filled().eval(), converted
        refuse_links(self.base)
        try:
            return type(converted).from_pretrained(self.base, trust_remote_code=False).eval(), converted
        except (OSError, ValueError) as e:
            raise SourceError(f"{self.base}: {str(e).strip().splitlines()[0]}") from None

    def note(self, model: Any, command: str, asked: dict[str, Any]) -> None:
        """Keep for the next report and card what was done to the folder: a command, and what it was given."""
        factory = self.factory if isinstance(self.factory, str) else None
        step = {
            "command": command, "base": Path(self.base).resolve().name, "folder": Path(self.folder).resolve().name,
            "options": {k: v for k, v in {**asked, "factory": factory}.items() if v},
        }  # fmt: skip
        model._rpq_options["later"] = [*model._rpq_options.get("later", ()), step]


def evaluate_folder(
    which: WithBase,
    *,
    text: Path | None = None,
    pairs: Path | None = None,
    inputs: Path | None = None,
    window: int = 512,
    windows: int | None = None,
    field: str | None = None,
    layers: bool = False,
    keep: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a converted folder against its dense checkpoint.

    Args:
        text: a causal language model predicts windows of it; of any other text model the embeddings of its lines, pooled
            as the base's folder says, are compared.
        pairs: CSV of sentence, sentence, score: the rank correlation of the cosine of two embeddings, or of what a cross-encoder
            gives, with the score.
        inputs: .safetensors of named arguments, for any model; with `labels`, the accuracy of a classifier. Or a folder of pictures.
        field: the column of texts in a table; see `read_text`.
        window, windows: tokens of one window, and at most so many windows, lines or samples.
        layers: measure the error that each converted layer adds as well.
        keep: write what was found into the folder's report and model card.
        progress: told what is done now, how much is done, and how much it all is.

    Raises:
        SourceError: a folder cannot be read, or the base has no tokenizer.
        EvaluateError: nothing to measure on.
    """
    given = {"text": text, "pairs": pairs, "inputs": inputs}
    on = [path for path in given.values() if path is not None]
    if len(on) != 1:
        raise EvaluateError("give one thing to measure on: a text, pairs or inputs")
    folder = Path(which.folder)
    if keep:  # said before hours of measuring, not after
        if not (folder / REPORT).is_file():
            raise SourceError(f"{folder} has no {REPORT} to write into; leave out keep=True")
        read_manifest(folder)
    dense, converted = which.load()
    if text is not None and converted.can_generate():
        words = tokenizer_of(which.base)
        ids = words(read_text(text, field, words, say), return_tensors="pt", add_special_tokens=False).input_ids[0]
        ids = ids[: windows * window] if windows else ids
        found = evaluate(
            dense, converted, ids, window=window, progress=counted(progress, "windows", max(1, len(ids) // window))
        )
        batches: list[Any] = [{"input_ids": part[None]} for part in ids[: 4 * window].split(window)]
    elif pairs is not None:
        found, batches = evaluate_pairs(dense, converted, which.base, pairs, window, windows, progress)
    else:
        batches = read_inputs(
            on[0], which.base, model=dense, window=window, samples=windows, labels=True, field=field, told=say
        )
        told = counted(progress, "batches", len(batches))
        a, b = (dense, converted) if text is None else (Pooled(dense, which.base), Pooled(converted, which.base))
        found = evaluate(a, b, batches, progress=told)
    if layers:
        found = replace(found, layers=layer_errors(dense, converted, batches))
    if keep:
        add_evaluation(folder, on[0].name, found)
    return found


def tune_folder(
    which: WithBase,
    out: str | Path,
    data: Path,
    options: TuneOptions,
    *,
    window: int = 256,
    samples: int = 512,
    field: str | None = None,
    blocks: int = 0,
    overwrite: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Tune a converted folder against its dense checkpoint, into another folder.

    Args:
        out: the folder to make.
        data, window, samples, field: as for `read_inputs`.
        blocks: steps on each transformer block alone, before all are tuned together; the same options, except the loss.
        overwrite: replace `out`.
        options: how to tune. A killed run continues when it is repeated; blocks are then tuned again first.
        progress: as for `evaluate_folder`.

    Raises:
        SourceError, FolderError: as `load` and `save`. CalibrationError: no data. TuneError: as `tune`.
    """
    place = Path(out)
    check_free(place, overwrite=overwrite)
    dense, model = which.load()
    items = read_inputs(data, which.base, model=dense, window=window, samples=samples, field=field, told=say)
    if blocks:
        tune_blocks_with(replace(options, steps=blocks, loss="mse"), model, dense, items, progress=progress)
    asked = {"data": data.name, "window": window, "samples": samples, "text_field": field, "blocks": blocks}
    which.note(model, "tune", {**asked, **shown(options), "bfloat16": options.autocast is not None})
    return _tuned(model, dense, items, options, Path(which.folder), place, progress=progress, overwrite=overwrite)


def tune_written(
    opened: Opened, folder: Path, data: Calibration, options: TuneOptions, progress: Progress | None = None
) -> Tuning:
    """Tune a folder that was just written against the checkpoint that it was made from, in its place.

    Args:
        data: as for `rpq.convert(calibration=)`. options, progress: as for `tune_folder`.
    """
    dense = opened.give_filled().eval()
    model: Any = load(folder, factory=opened.options.factory).eval()
    model._rpq_options = dict(audit(folder).options)
    items = prepare(data, dense, "data")
    return _tuned(model, dense, items, options, folder, folder, progress=progress, overwrite=True)


def _tuned(
    model: Any, dense: Any, items: list[Any], options: TuneOptions, folder: Path, place: Path, *, progress: Progress | None,
    overwrite: bool,
) -> Tuning:  # fmt: skip
    """Tune the model of a folder, and write it to a place, with what lies beside the folder's weights."""

    def told(step: int, loss: float) -> None:
        if progress:
            progress(f"step {step} of {options.steps}: loss {loss:.4g}", step, options.steps)

    file = place.with_name(place.name + ".tuning.safetensors")
    tuned = tune_with(options, model, dense, items, checkpoint=file, progress=told)
    model._rpq_options["tuning"] = {"steps": tuned.best, "before": tuned.before, "after": tuned.after}
    save(model, place, overwrite=overwrite, files=files_beside(folder), base=base_in(folder))
    return tuned


def recalibrate_folder(
    which: WithBase,
    out: str | Path,
    data: Path | None,
    *,
    window: int = 512,
    samples: int | None = None,
    field: str | None = None,
    overwrite: bool = False,
    say: Say | None = None,
    **options: Any,
) -> Report:
    """Fit a converted folder to inputs, starting from its codebooks, into another folder.

    Args:
        out, overwrite: as for `tune_folder`.
        data, window, samples, field: as for `read_inputs`; None for synthetic inputs (`own_inputs`).
        options: those of `recalibrate`.
    """
    place = Path(out)
    check_free(place, overwrite=overwrite)
    dense, model = which.load()
    some: dict[str, Any] = {} if samples is None else {"samples": samples}
    items = (
        own_inputs(dense, **some)
        if data is None
        else read_inputs(data, which.base, model=dense, window=window, field=field, told=say, **some)
    )
    where = "self" if data is None else data.name
    asked = {
        "data": where,
        "samples": samples,
        "text_field": field,
        "calibration": "calibration" in model._rpq_options,
    }
    recalibrate(
        model, dense, items, **options | {"progress": options.get("progress") or False}
    )  # what is quiet stays so
    which.note(model, "recalibrate", asked)
    return save(model, place, overwrite=overwrite, files=files_beside(which.folder), base=base_in(Path(which.folder)))


def coded_sizes(folder: str | Path) -> dict[str, int]:
    """Return the number of parameters of every weight of a converted folder that is stored as codes; empty without a report."""
    if not (Path(folder) / REPORT).is_file():
        return {}
    return {row.name: row.params for row in audit(folder).rows if row.decision == "rpq"}
