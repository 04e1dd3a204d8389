"""Every error that the library raises on purpose. Free of torch, so that the command line can name them at once."""

from __future__ import annotations

from rpq_convert.showing import one_line


class SourceError(ValueError):
    """A checkpoint is missing, broken or does not fit."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))  # it may quote what a file says


class HubError(SourceError):
    """The hub refuses something, or was not reached."""


class PlanError(ValueError):
    """A plan cannot be made from what was asked."""


class NothingToRun(PlanError):
    """A model without inputs to run it on."""


class EncodeError(ValueError):
    """A tensor cannot be encoded as its job says."""


class FolderError(OSError):
    """The output folder exists already, or it is not what it should be."""


class TimeLimitReached(RuntimeError):
    """A run stopped because its time was up; what it has done is kept, and the same call goes on."""


class VerifyError(ValueError):
    """A checkpoint folder is damaged."""


class CalibrationError(ValueError):
    """The calibration data cannot serve."""


class EvaluateError(ValueError):
    """The models or the data cannot be compared."""


class TuneError(ValueError):
    """The model or the data cannot be tuned on."""
