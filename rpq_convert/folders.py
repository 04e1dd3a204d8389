"""What is done to a converted folder: it is evaluated, tuned, and recalibrated, each against its dense checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rpq_convert.checkpoint.loading import load
from rpq_convert.checkpoint.metadata import add_evaluation
from rpq_convert.checkpoint.opening import Factory, open_checkpoint
from rpq_convert.checkpoint.saving import save
from rpq_convert.checkpoint.verifying import audit
from rpq_convert.conversion.recalibration import recalibrate
from rpq_convert.core.results import Evaluation
from rpq_convert.errors import EvaluateError, FolderError, SourceError
from rpq_convert.evaluation.evaluate import evaluate
from rpq_convert.evaluation.layers import layer_errors
from rpq_convert.evaluation.pairs import Pooled, Say, evaluate_pairs, progress_lines
from rpq_convert.hf.loading import extra_files
from rpq_convert.hf.model_card import base_in
from rpq_convert.inputs.files import read_inputs, read_text, tokenizer_of
from rpq_convert.inputs.synthetic import own_inputs
from rpq_convert.report.schema import Report
from rpq_convert.storage.options import SourceOptions
from rpq_convert.storage.reader import refuse_links
from rpq_convert.storage.writer import REPORT, read_manifest
from rpq_convert.tuning.blocks import tune_blocks_with
from rpq_convert.tuning.options import TuneOptions
from rpq_convert.tuning.tune import Tuning, tune_with


def evaluate_folder(
    base: str | Path,
    folder: str | Path,
    *,
    text: Path | None = None,
    pairs: Path | None = None,
    inputs: Path | None = None,
    factory: str | Factory | None = None,
    window: int = 512,
    windows: int | None = None,
    layers: bool = False,
    keep: bool = False,
    say: Say | None = None,
) -> Evaluation:
    """Evaluate a converted folder against its dense checkpoint.

    Args:
        base, folder: the dense checkpoint and its conversion.
        text: a causal language model predicts windows of it; of any other text model the mean-pooled embeddings of its lines
            are compared.
        pairs: csv of sentence, sentence, score: how well the cosine of two embeddings ranks as the score does.
        inputs: .safetensors of named arguments, for any model; with `labels`, the accuracy of a classifier. Or a folder of pictures.
        factory: builds a model that is not transformers'.
        window, windows: tokens of one window, and at most so many windows, lines or samples.
        layers: measure the error that each converted layer adds as well.
        keep: write what was found into the folder's report and model card.

    Raises:
        SourceError: a folder is not what it should be, or the base has no tokenizer. EvaluateError: nothing to measure on.
    """
    given = {"text": text, "pairs": pairs, "inputs": inputs}
    on = [path for path in given.values() if path is not None]
    if len(on) != 1:
        raise EvaluateError("give one thing to measure on: a text, pairs or inputs")
    if keep and not (Path(folder) / REPORT).is_file():  # said before hours of measuring, not after
        raise SourceError(f"{folder} has no {REPORT} to write into; leave out --save")
    if keep:
        read_manifest(Path(folder))
    dense, converted = _both(base, folder, factory)
    if text is not None and converted.can_generate():
        words = tokenizer_of(base)
        ids = words(read_text(text), return_tensors="pt", add_special_tokens=False).input_ids[0]
        ids = ids[: windows * window] if windows else ids
        found = evaluate(
            dense, converted, ids, window=window, progress=progress_lines(say, "windows", len(ids) // window)
        )
        batches: list[Any] = [{"input_ids": part[None]} for part in ids[: 4 * window].split(window)]
    elif pairs is not None:
        found, batches = evaluate_pairs(dense, converted, base, pairs, window, windows, say)
    else:
        batches = read_inputs(on[0], base, model=dense, window=window, samples=windows, labels=True)
        told = progress_lines(say, "batches", len(batches))
        a, b = (dense, converted) if text is None else (Pooled(dense), Pooled(converted))
        found = evaluate(a, b, batches, progress=told)
    if layers:
        found = replace(found, layers=layer_errors(dense, converted, batches))
    if keep:
        add_evaluation(Path(folder), on[0].name, found)
    return found


def _both(base: str | Path, folder: str | Path, factory: str | Factory | None) -> tuple[Any, Any]:
    """Return the dense model and the converted one."""
    converted: Any = load(folder, factory=factory)
    converted._rpq_options = {}
    if (Path(folder) / REPORT).is_file():
        converted._rpq_options = dict(audit(folder).options)  # for the next report and card
    if factory is not None:
        return open_checkpoint(base, SourceOptions(factory=factory)).filled().eval(), converted
    refuse_links(base)
    try:
        return type(converted).from_pretrained(base, trust_remote_code=False).eval(), converted
    except (OSError, ValueError) as e:
        raise SourceError(f"{base}: {str(e).strip().splitlines()[0]}") from None


def tune_folder(
    base: str | Path,
    folder: str | Path,
    out: str | Path,
    data: Path,
    options: TuneOptions,
    *,
    factory: str | Factory | None = None,
    window: int = 256,
    samples: int = 512,
    blocks: int = 0,
    overwrite: bool = False,
    say: Say | None = None,
) -> Tuning:
    """Tune a converted folder against its dense checkpoint, into another folder.

    Args:
        base, folder, out: the dense checkpoint, its conversion, and the folder to make.
        data, window, samples, factory: as for `read_inputs` and `load`.
        blocks: steps on each block alone, before all are tuned together; with the same options, but the loss.
        overwrite: replace `out`.
        options: how. A killed run goes on when it is repeated; blocks are tuned again first.

    Raises:
        SourceError, FolderError: as `load` and `save`. CalibrationError: no data. TuneError: as `tune`.
    """
    place = _free(out, overwrite)
    dense, model = _both(base, folder, factory)
    items = read_inputs(data, base, model=dense, window=window, samples=samples)
    told = None if say is None else lambda step, loss: say(f"step {step}: loss {loss:.4g}")
    if blocks:
        for path, done in tune_blocks_with(replace(options, steps=blocks, loss="mse"), model, dense, items).items():
            if say is not None:
                say(f"{path}: {done}")
    file = place.with_name(place.name + ".tuning.safetensors")
    tuned = tune_with(options, model, dense, items, checkpoint=file, progress=told)
    model._rpq_options["tuning"] = {"steps": tuned.best, "before": tuned.before, "after": tuned.after}
    save(model, place, overwrite=overwrite, files=extra_files(folder), base=base_in(Path(folder)))
    return tuned


def recalibrate_folder(
    base: str | Path,
    folder: str | Path,
    out: str | Path,
    data: Path | None,
    *,
    factory: str | Factory | None = None,
    window: int = 512,
    samples: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Report:
    """Fit a converted folder to inputs, starting from its codebooks, into another folder.

    Args:
        base, folder, out, factory, overwrite: as for `tune_folder`.
        data, window, samples: as for `read_inputs`; no data for inputs that are made up (`own_inputs`).
        options: those of `recalibrate`.
    """
    place = _free(out, overwrite)
    dense, model = _both(base, folder, factory)
    some: dict[str, Any] = {} if samples is None else {"samples": samples}
    items = own_inputs(dense, **some) if data is None else read_inputs(data, base, model=dense, window=window, **some)
    recalibrate(model, dense, items, **options)
    return save(model, place, overwrite=overwrite, files=extra_files(folder), base=base_in(Path(folder)))


def _free(out: str | Path, overwrite: bool) -> Path:
    place = Path(out)
    if place.exists() and not overwrite:
        raise FolderError(f"{place} exists; choose another folder or pass --overwrite")
    return place
