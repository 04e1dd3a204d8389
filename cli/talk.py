"""Talk: what a command says on stderr while it works, and the log that `--log` keeps.

Every command has `--quiet`, `--verbose` and `--log`; `spoken` adds them, so that no command must mention them. With `--quiet` only
warnings and errors are said, and libraries are held to that too.
"""

import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from time import monotonic
from typing import IO, Annotated, Any

from typer import Option

from rpq_convert.showing import printable
from rpq_convert.storage.addresses import without_password

from .wording import as_flags

Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress; warnings and errors only on stderr.")]
Verbose = Annotated[bool, Option("--verbose", help="Say versions, what was chosen, and how long each part took.")]
Log = Annotated[
    Path | None,
    Option(metavar="FILE", help="Add what happens to a file, a line of JSON each: its begin and end, each fit of a weight, warnings."),
]  # fmt: skip
COMMON = {"quiet": (Quiet, False), "verbose": (Verbose, False), "log": (Log, None)}
LIBRARIES = ("transformers", "huggingface_hub", "torch", "datasets", "lm_eval")
HUSHED = {
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR",
    "LMEVAL_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@dataclass
class Talk:
    """How much is said, and where it is logged."""

    quiet: bool = False
    verbose: bool = False
    file: IO[str] | None = None
    began: float = field(default_factory=monotonic)


_now = Talk()


def is_quiet() -> bool:
    return _now.quiet


def say(text: str) -> None:
    """Say what goes on, unless `--quiet`."""
    if not _now.quiet:
        print(printable(text), file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """Say what only `--verbose` asks for."""
    if _now.verbose:
        say(text)


def warn(warned: tuple[str, ...]) -> None:
    for warning in warned:
        event("warning", text=warning)
        print(printable(f"warning: {as_flags(warning)}"), file=sys.stderr, flush=True)


def event(
    event: str,
    name: str | None = None,
    *,
    seconds: float | None = None,
    error: float | None = None,
    bytes: int | None = None,
    **more: Any,
) -> None:
    """Add a line to the log, if there is one.

    Args:
        name: of the weight, file or part. seconds: that it took. error: relative squared error. bytes: its size.
        more: other facts, as JSON values.
    """
    if _now.file is not None:
        facts: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "name": name,
        }
        facts |= {"seconds": None if seconds is None else round(seconds, 3), "error": error, "bytes": bytes, **more}
        print(json.dumps(facts), file=_now.file, flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Time a part of a command, for `--verbose` and the log."""
    began = monotonic()
    yield
    took = monotonic() - began
    detail(f"{name}: {took:.1f} s")
    event("phase", name, seconds=took)


def spoken(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--quiet`, `--verbose` and `--log`."""
    signature = inspect.signature(command, eval_str=True)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in COMMON.items()
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]

    @wraps(command)
    def speaking(**given: Any) -> Any:
        how = {name: given.pop(name) for name in COMMON}
        with talking(command.__name__, given, **how):
            return command(**given)

    shown = [*own, *common]
    speaking.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    speaking.__annotations__ = {p.name: p.annotation for p in shown}
    return speaking


@contextmanager
def talking(command: str, given: Mapping[str, Any], *, quiet: bool, verbose: bool, log: Path | None) -> Iterator[None]:
    """Talk as asked while a command runs, and log its beginning and its end."""
    global _now
    before, _now = _now, Talk(quiet, verbose)
    try:
        if log is not None:
            _now.file = log.open("a", encoding="utf8")
        with _libraries(quiet=quiet), _notices():
            _begin(command, given)
            yield
        took = monotonic() - _now.began
        event("done", command, seconds=took)
        detail(f"{command} took {took:.1f} s in all")
    except BaseException as e:
        event("failed", command, seconds=monotonic() - _now.began, text=f"{type(e).__name__}: {e}")
        raise
    finally:
        if _now.file is not None:
            _now.file.close()
        _now = before


def _begin(command: str, given: Mapping[str, Any]) -> None:
    if _now.file is None and not _now.verbose:
        return
    from .environment import versions

    known = versions()
    told = {k: without_password(str(v)) for k, v in given.items() if k != "token" and v not in (None, False, [], ())}
    event("begun", command, options=told, versions=known)
    detail(", ".join(f"{name} {version}" for name, version in known.items()))


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn((record.getMessage(),))


@contextmanager
def _notices() -> Iterator[None]:
    """Say what the library notices (`showing.notice`) as warnings."""
    logger, handler = logging.getLogger("rpq_convert"), _Notices()
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@contextmanager
def _libraries(*, quiet: bool) -> Iterator[None]:
    """Hold back what libraries print by themselves: their bars where no terminal shows them, with `--quiet` all but errors."""
    wanted = {**(HUSHED if quiet else {}), **(NO_BARS if quiet or not sys.stderr.isatty() else {})}
    before = {name: os.environ.get(name) for name in wanted}
    loggers = [logging.getLogger(name) for name in LIBRARIES] if quiet else []
    levels = [logger.level for logger in loggers]
    bars: Any = sys.modules.get("transformers.utils.logging") if wanted else None  # it reads the environment once
    shown = bars is not None and bars.is_progress_bar_enabled()
    with warnings.catch_warnings():
        os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if shown:
            bars.disable_progress_bar()
        if quiet:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            if shown:
                bars.enable_progress_bar()
