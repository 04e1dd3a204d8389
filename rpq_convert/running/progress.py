"""Progress: how long work tells what is done."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]
Progress = Callable[[str, float, float], None]  # what is done now, how much of it all is done, and how much it all is


def counted(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    """Return what is called with a count of things done, and tells it as `3 of 20 windows`."""
    return None if progress is None else lambda done: progress(f"{done} of {total} {what}", done, total)
