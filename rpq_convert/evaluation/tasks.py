"""Tasks of lm-eval (EleutherAI's harness), where it is installed: the scores of the base and of the converted model.

Nothing slow is imported before the models are scored, so that commands can check what they were asked at once.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpq_convert.errors import EvaluateError, SourceError

if TYPE_CHECKING:
    from rpq_convert.core.results import Evaluation

NEEDED = 'tasks need lm-eval: pip install "rpq-convert[tasks]"'


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> None:
    """Refuse tasks where lm-eval is not installed, and a folder of tasks that is not there.

    Raises:
        EvaluateError, SourceError: what is missing, and what to do.
    """
    if not [t for t in tasks if t.strip()]:
        raise EvaluateError("no task is named; give some, such as hellaswag,arc_easy")
    if find_spec("lm_eval") is None:
        raise EvaluateError(NEEDED)
    if include is not None and not include.is_dir():
        raise SourceError(f"{include} is no folder of tasks")


def evaluate_tasks(
    dense: Any,
    converted: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: Path | None = None,
) -> Evaluation:
    """Score two causal language models on tasks of lm-eval.

    Args:
        tokenizer: of both.
        tasks: names, as `lm_eval ls tasks` lists them.
        limit: at most so many questions of each task.
        include: a folder of tasks of your own.

    Returns:
        `TASK METRIC` and `base_TASK METRIC` -> score; the number of questions.

    Raises:
        EvaluateError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    check_tasks(tasks, include)
    if not dense.can_generate() or dense.config.is_encoder_decoder:
        raise EvaluateError(f"tasks are for causal language models; {type(dense).__name__} is none")
    from rpq_convert.core.results import Evaluation
    from rpq_convert.hf.hub import hold_back_if_silent

    hold_back_if_silent()  # before datasets is imported, which looks once
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [t for t in tasks if not manager.match_tasks([t])]:
        raise EvaluateError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    found = []
    for model in (dense, converted):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, prefix_token_id=_first(tokenizer))
        try:
            with _bars():
                found.append(
                    simple_evaluate(
                        model=harness,
                        tasks=[*tasks],
                        limit=limit,
                        task_manager=manager,
                        bootstrap_iters=0,
                        log_samples=False,
                    )
                )
        except (OSError, ConnectionError, ValueError) as e:  # of data sets: no connection, no such repository
            logging.getLogger(__name__).debug("lm-eval failed", exc_info=True)
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise EvaluateError(f"{', '.join(tasks)} could not be run; its data comes from the hub: {reason}") from None
    base, mine = ({**_scores(f["results"])} for f in found)
    metrics = {name: value for k, v in mine.items() for name, value in ((k, v), (f"base_{k}", base[k]))}
    count = sum(n["effective"] for n in found[1]["n-samples"].values())
    return Evaluation("tasks", metrics, int(count))


def _bars() -> AbstractContextManager[Any]:
    """Hold bars back where TQDM_DISABLE asks for it, which lm-eval does not heed."""
    return redirect_stderr(io.StringIO()) if os.environ.get("TQDM_DISABLE") == "1" else nullcontext()


def _first(tokenizer: Any) -> int:
    """Return the token before a text, for tokenizers that have neither a first nor a last one as well."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in known if token is not None), 0)


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return `TASK METRIC` -> score, without standard errors."""
    return {
        f"{task} {key.partition(',')[0]}": float(value)
        for task, scores in results.items()
        for key, value in scores.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key and "_stderr" not in key
    }
