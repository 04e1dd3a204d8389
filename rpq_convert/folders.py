"""Evaluate, tune and recalibrate a converted folder against its dense checkpoint.

The file is long because each command reads, locks, runs and writes here, in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpq_convert.checkpoint.finding import DEFAULT
from rpq_convert.checkpoint.finding import at_hand as fetched
from rpq_convert.checkpoint.kinship import check_base
from rpq_convert.checkpoint.loading import load
from rpq_convert.checkpoint.metadata import add_evaluation
from rpq_convert.checkpoint.opening import Factory, Opened, open_checkpoint
from rpq_convert.checkpoint.saving import save
from rpq_convert.checkpoint.verifying import audit
from rpq_convert.conversion.options import TimeOptions
from rpq_convert.conversion.recalibration import recalibrate
from rpq_convert.core.options import shown
from rpq_convert.core.results import Answer, Evaluation
from rpq_convert.errors import EvaluateError, SourceError
from rpq_convert.evaluation.answers import batch_answers, nearest_answers, text_answers
from rpq_convert.evaluation.evaluate import evaluate
from rpq_convert.evaluation.layers import layer_errors
from rpq_convert.evaluation.pairs import evaluate_pairs
from rpq_convert.evaluation.pooling import Pooled, gives_vectors
from rpq_convert.evaluation.tasks import evaluate_tasks
from rpq_convert.hf.model_card import base_in
from rpq_convert.inputs.files import read_inputs, read_text, text_inputs, tokenizer_of
from rpq_convert.inputs.items import Calibration, prepare
from rpq_convert.inputs.synthetic import check_own_inputs, own_inputs
from rpq_convert.report.schema import Report
from rpq_convert.running.progress import Progress, Say, counted
from rpq_convert.storage.delivery import delivered
from rpq_convert.storage.files import files_beside, refuse_links
from rpq_convert.storage.lock import locked
from rpq_convert.storage.options import HubOptions, SourceOptions
from rpq_convert.storage.records import REPORT, read_manifest
from rpq_convert.storage.room import check_apart, check_free
from rpq_convert.storage.sources import called, is_name
from rpq_convert.storage.swap import remove, tuning_of
from rpq_convert.tuning.blocks import tune_blocks_with
from rpq_convert.tuning.checkpoint import Checkpoint, content
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

    @classmethod
    def at_hand(
        cls, base: str | Path, folder: str | Path, factory: str | Factory | None = None, hub: HubOptions = DEFAULT
    ) -> WithBase:
        """Return both on this machine; what is a repository of the hub is fetched.

        Args:
            hub: how the hub is asked; a revision is the folder's.
        """
        plain = replace(hub, revision=None)
        return cls(fetched(base, plain, base=True), fetched(folder, hub), factory)

    def check(self) -> str:
        """Refuse a base of another class or shape; return why one that fits cannot be the base, or an empty text."""
        return check_base(self.base, self.folder, self.factory)

    def empty(self) -> Any:
        """Return the dense model without its weights."""
        options = SourceOptions(factory=self.factory, allow_pickle=self.factory is None)
        return open_checkpoint(self.base, options, need="headers").model

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
            raise SourceError(f"{called(self.base)}: {str(e).strip().splitlines()[0]}") from None

    def note(self, model: Any, command: str, asked: dict[str, Any]) -> None:
        """Keep for the next report and card what was done to the folder: a command, and what it was given."""
        factory = self.factory if isinstance(self.factory, str) else None
        base, folder = (called(Path(place).resolve()) for place in (self.base, self.folder))
        base = base if is_name(base) else Path(base).name
        step = {
            "command": command, "base": base, "folder": Path(folder).name,
            "options": {k: v for k, v in {**asked, "factory": factory}.items() if v},
        }  # fmt: skip
        model._rpq_options["later"] = [*model._rpq_options.get("later", ()), step]


@dataclass(frozen=True)
class Measured:
    """What a model is evaluated on: one of a text, pairs, inputs and tasks.

    Args:
        text: a causal language model predicts windows of it. Of any other text model the outputs for its lines are compared: logits, or
            embeddings, pooled as the base's folder says.
        pairs: CSV of sentence, sentence, score: the rank correlation of the cosine of two embeddings, or of what a cross-encoder
            gives, with the score.
        inputs: .safetensors of named arguments, for any model; with `labels`, the accuracy of a classifier. Or a folder of pictures.
        tasks: names of tasks of lm-eval. include: a folder of tasks of your own.
        window, limit: tokens of one window, and at most so many windows, lines, samples or questions of a task.
        field: the column of texts in a table; see `read_text`.
    """

    text: Path | None = None
    pairs: Path | None = None
    inputs: Path | None = None
    tasks: tuple[str, ...] = ()
    include: Path | None = None
    window: int = 512
    limit: int | None = None
    field: str | None = None

    @property
    def on(self) -> Path | None:
        """The file or folder, if it is one."""
        return self.text or self.pairs or self.inputs

    @property
    def name(self) -> str:
        """What a report calls it."""
        return ", ".join(self.tasks) if self.on is None else self.on.name


def evaluate_folder(
    which: WithBase,
    on: Measured,
    *,
    layers: bool = False,
    answers: int = 0,
    keep: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a converted folder against its dense checkpoint.

    Args:
        layers: measure the error that each converted layer adds as well.
        answers: show what both say to so many of the inputs.
        keep: write what was found into the folder's report and model card.
        say: told what was read. progress: told what is done now, how much is done, and how much it all is.

    Raises:
        SourceError: a folder cannot be read, or the base has no tokenizer.
        EvaluateError: nothing to measure on, or outputs that are no answers to show.
    """
    if sum(map(bool, (on.text, on.pairs, on.inputs, on.tasks))) != 1:
        raise EvaluateError("give one thing to measure on: a text, pairs, inputs or tasks")
    folder = Path(which.folder)
    if keep:  # said before hours of measuring, not after
        if not (folder / REPORT).is_file():
            raise SourceError(f"{folder} has no {REPORT} to write into; leave out keep=True")
        read_manifest(folder)
    dense, converted = which.load()
    if on.tasks:
        found = evaluate_tasks(dense, converted, tokenizer_of(which.base), on.tasks, limit=on.limit, include=on.include)
    else:
        found, batches, shown = _measured(dense, converted, which.base, on, answers, say, progress)
        if layers:
            found = replace(found, layers=layer_errors(dense, converted, batches))
        found = replace(found, answers=tuple(shown))
    if keep:
        add_evaluation(folder, on.name, found)
    return found


def _measured(
    dense: Any, converted: Any, base: str | Path, on: Measured, count: int, say: Say | None, progress: Progress | None
) -> tuple[Evaluation, list[Any], list[Answer]]:
    """Return what was measured, the batches that it was measured on, and the answers to some of them."""
    if on.pairs is not None:
        return evaluate_pairs(dense, converted, base, on.pairs, on.window, on.limit, progress, count)
    if on.text is None:
        batches = read_inputs(
            on.inputs or "",
            base,
            model=dense,
            window=on.window,
            samples=on.limit,
            labels=True,
            field=on.field,
            told=say,
        )
        found = evaluate(dense, converted, batches, progress=counted(progress, "batches", len(batches)))
        return found, batches, batch_answers(dense, converted, batches, count) if count else []
    words = tokenizer_of(base)
    text = read_text(on.text, on.field, words, say)
    lines = text.splitlines()
    if converted.can_generate() and not converted.config.is_encoder_decoder:
        ids = words(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        ids = ids[: on.limit * on.window] if on.limit else ids
        told = counted(progress, "windows", max(1, len(ids) // on.window))
        found = evaluate(dense, converted, ids, window=on.window, progress=told)
        batches = [{"input_ids": part[None]} for part in ids[: 4 * on.window].split(on.window)]
        return found, batches, text_answers(dense, converted, lines, words, count) if count else []
    batches = text_inputs(text, dense, words, on.window, slice(on.limit))
    pooled = gives_vectors(dense, batches[0])
    a, b = (Pooled(dense, base), Pooled(converted, base)) if pooled else (dense, converted)
    found = evaluate(a, b, batches, progress=counted(progress, "batches", len(batches)))
    shown = nearest_answers if pooled else text_answers
    return found, batches, shown(a, b, lines, words, count) if count else []


@dataclass(frozen=True)
class Given:
    """Data that a folder is tuned or fitted on.

    Args:
        path: as for `read_inputs`; None for synthetic inputs (`own_inputs`).
        window, samples: tokens of one sample of text, and at most so many samples; the default of what makes them where it is None.
        field: the column of texts in a table.
    """

    path: Path | None
    window: int = 512
    samples: int | None = None
    field: str | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """What the card of a folder says of them."""
        name = "self" if self.path is None else Path(self.path).name
        return {"data": name, "samples": self.samples, "text_field": self.field}

    def check(self, which: WithBase) -> None:
        """Refuse synthetic inputs that cannot be made, before any weight is read."""
        if self.path is None:
            check_own_inputs(which.empty())

    def inputs(self, dense: Any, base: str | Path, say: Say | None) -> list[Any]:
        """Return the inputs of a dense model; `say` is told what was read."""
        some: dict[str, Any] = {} if self.samples is None else {"samples": self.samples}
        if self.path is None:
            return own_inputs(dense, **some)
        return read_inputs(self.path, base, model=dense, window=self.window, field=self.field, told=say, **some)


def tune_folder(
    which: WithBase,
    out: str | Path,
    data: Given,
    options: TuneOptions,
    *,
    blocks: int = 0,
    overwrite: bool = False,
    run: TimeOptions | None = None,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Tune a converted folder against its dense checkpoint, into another folder.

    Args:
        out: the folder to make.
        data: what to tune on.
        blocks: steps on each transformer block alone, before all are tuned together; the same options, except the loss.
        overwrite: replace `out`.
        options: how to tune. A killed run continues when it is repeated, from the last evaluation of a block or of the whole.
        run: when to stop.
        progress: as for `evaluate_folder`.

    Raises:
        SourceError, FolderError: as `load` and `save`. CalibrationError: no data. TuneError: as `tune`.
        TimeLimitReached: what is done is kept.
    """
    with delivered(out, overwrite=overwrite) as place:  # from the beginning: hours of tuning would be lost at the end
        check_apart(which.base, place)
        check_free(place, overwrite=overwrite)
        data.check(which)
        dense, model = which.load()
        items = data.inputs(dense, which.base, say)
        kept = _checkpoint(place, dense, run)
        if blocks:
            alone = replace(options, steps=blocks, loss="mse")
            tune_blocks_with(alone, model, dense, items, checkpoint=kept, progress=progress)
        asked = {**data.asked, "window": data.window, "blocks": blocks, **shown(options)}
        which.note(model, "tune", {**asked, "bfloat16": options.autocast is not None})
        return _tuned(
            model, dense, items, options, Path(which.folder), place, kept, progress=progress, overwrite=overwrite
        )


def tune_written(
    opened: Opened, folder: Path, data: Calibration, options: TuneOptions, run: TimeOptions | None = None,
    progress: Progress | None = None,
) -> Tuning:  # fmt: skip
    """Tune a folder that was just written against the checkpoint that it was made from, in its place.

    Args:
        data: as for `rpq.convert(calibration=)`. options, run, progress: as for `tune_folder`.
    """
    dense = opened.give_filled().eval()
    with locked(folder):
        model: Any = load(folder, factory=opened.options.factory).eval()
        model._rpq_options = dict(audit(folder).options)
        items = prepare(data, dense, "data")
        kept = _checkpoint(folder, dense, run)
        return _tuned(model, dense, items, options, folder, folder, kept, progress=progress, overwrite=True)


def _checkpoint(place: Path, dense: Any, run: TimeOptions | None) -> Checkpoint:
    """Return where the tuning of a folder keeps its state."""
    run = run or TimeOptions()
    return Checkpoint(tuning_of(place), content(dense), is_over=lambda: run.is_over)


def _tuned(
    model: Any, dense: Any, items: list[Any], options: TuneOptions, folder: Path, place: Path, kept: Checkpoint, *,
    progress: Progress | None, overwrite: bool,
) -> Tuning:  # fmt: skip
    """Tune the model of a folder, and write it to a place, with what lies beside the folder's weights."""

    def told(step: int, loss: float) -> None:
        if progress:
            progress(f"step {step} of {options.steps}: loss {loss:.4g}", step, options.steps)

    tuned = tune_with(options, model, dense, items, checkpoint=kept.part("all.safetensors", kept.of), progress=told)
    model._rpq_options["tuning"] = {"steps": tuned.best, "before": tuned.before, "after": tuned.after}
    save(model, place, overwrite=overwrite, files=files_beside(folder), base=base_in(folder))
    remove(tuning_of(place))
    return tuned


def recalibrate_folder(
    which: WithBase,
    out: str | Path,
    data: Given,
    *,
    overwrite: bool = False,
    say: Say | None = None,
    **options: Any,
) -> Report:
    """Fit a converted folder to inputs, starting from its codebooks, into another folder.

    Args:
        out, data, overwrite, say: as for `tune_folder`.
        options: those of `recalibrate`.
    """
    with delivered(out, overwrite=overwrite) as place:
        check_apart(which.base, place)
        check_free(place, overwrite=overwrite)
        data.check(which)
        dense, model = which.load()
        inputs = data.inputs(dense, which.base, say)
        recalibrate(
            model, dense, inputs, **options | {"progress": options.get("progress") or False}
        )  # what is quiet stays so
        which.note(model, "recalibrate", {**data.asked, "calibration": "calibration" in model._rpq_options})
        return save(
            model, place, overwrite=overwrite, files=files_beside(which.folder), base=base_in(Path(which.folder))
        )


def coded_sizes(folder: str | Path) -> dict[str, int]:
    """Return the dense bytes of every weight of a converted folder that is stored as codes; empty without a report."""
    if not (Path(folder) / REPORT).is_file():
        return {}
    return {row.name: row.dense_bytes for row in audit(folder).rows if row.decision == "rpq"}
