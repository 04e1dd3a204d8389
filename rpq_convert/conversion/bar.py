"""The progress bar of a conversion in Python: in notebooks and on terminals, where nothing else was asked for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from rpq_convert.core.results import Encoded
from rpq_convert.planning.plan import Job, Plan

Progress = Callable[[Job, Encoded | None], None]


@contextmanager
def shown(progress: Progress | bool | None, plan: Plan) -> Iterator[Progress | None]:
    """Yield what is called with each job and its result: the given function, a bar, or None.

    Args:
        progress: a function; True for a bar, False for none; None for a bar where somebody sees it.
    """
    if callable(progress):
        yield progress
    elif progress is False or (progress is None and not (in_notebook() or sys.stderr.isatty())):
        yield None
    else:
        from tqdm import TqdmWarning

        with warnings.catch_warnings():  # without widgets a notebook gets the bar of terminals
            warnings.simplefilter("ignore", TqdmWarning)
            from tqdm.auto import tqdm
        total = sum(prod(j.shape) for j in plan.jobs)
        with tqdm(
            total=total, desc="converting", unit="weight", unit_scale=True, leave=False, dynamic_ncols=True
        ) as bar:

            def callback(job: Job, encoded: Encoded | None) -> None:
                bar.set_postfix_str(job.name[-30:], refresh=False)
                bar.update(prod(job.shape))

            yield callback


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")
