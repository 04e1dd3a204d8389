"""Errors become exit codes: one table, and one place that catches.

What is not in the table is a bug, and keeps its traceback. Typer would catch Ctrl-C by itself; it is caught here first,
because only here is it known that the run can go on.
"""

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from rpq_convert import errors
from rpq_convert.showing import one_line

from .talk import spoken
from .wording import as_flags


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): it ends as with ctrl-C."""


CODES: dict[type[BaseException], int] = {
    errors.PlanError: 3,
    errors.CalibrationError: 4,
    errors.EncodeError: 4,
    errors.EvaluateError: 4,
    errors.SourceError: 4,
    errors.TuneError: 4,
    OSError: 4,
    errors.VerifyError: 5,
    errors.TimeLimitReached: 6,
    Terminated: 143,
    KeyboardInterrupt: 130,
}
RESUMABLE = "run the same command again to go on"


def code_of(error: BaseException) -> int | None:
    """Return the exit code of an error, by its nearest class in the table, or None for a bug."""
    return 4 if _is_dead_worker(error) else next((CODES[c] for c in type(error).__mro__ if c in CODES), None)


def _is_dead_worker(error: BaseException) -> bool:
    """Whether a process of a pool died; told by the module that would be slow to import for its name."""
    pool = sys.modules.get("concurrent.futures.process")
    return pool is not None and isinstance(error, pool.BrokenProcessPool)


def sentence(error: BaseException) -> str:
    """Return the one line that says what went wrong."""
    if isinstance(error, KeyboardInterrupt):
        return f"{'terminated' if isinstance(error, Terminated) else 'interrupted'}; {RESUMABLE}"
    if isinstance(error, errors.TimeLimitReached):
        return f"{as_flags(one_line(str(error)))}; {RESUMABLE}"
    if _is_dead_worker(error):
        return f"error: a worker process died, perhaps for want of memory; {RESUMABLE}"
    text = as_flags(one_line(str(error))) or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"error: disk full: {text}; free some space and {RESUMABLE}"
    return f"error: {text}"


def catching(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: known errors become one line on stderr and their exit code; RPQ_TRACEBACK=1 adds the traceback."""
    command = spoken(command)

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            heed_termination()
            if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without "…" shows "?"
                sys.stdout.reconfigure(errors="replace")
            result = command(*args, **kwargs)
            flush()
            return result
        except BrokenPipeError:  # `rpq plan … | head`: Typer ends quietly
            raise
        except (Exception, KeyboardInterrupt) as e:
            code = code_of(e)
            if code is None:
                raise
            if os.environ.get("RPQ_TRACEBACK") == "1":
                traceback.print_exc()
            print(sentence(e), file=sys.stderr, flush=True)
            raise typer.Exit(code) from None

    return guarded


def heed_termination() -> None:
    """Let SIGTERM end the command as ctrl-C does, unless whoever started it has decided otherwise."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(*_: Any) -> None:
    raise Terminated


def flush() -> None:
    """Write what stdout still holds while a failure has an exit code; Python's own flush at exit comes too late."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - takes the flush at exit
        raise
