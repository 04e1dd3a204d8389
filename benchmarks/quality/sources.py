"""Sources: the files that the caller names. Nothing that is measured on is ever fitted on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sources:
    """Paths.

    Args:
        fit, test: plain text, WikiText-2's validation and test part.
        pairs: csv of STS-B's test pairs: sentence, sentence, score.
        pictures: folder of Fashion-MNIST's four .gz files.
    """

    fit: Path | None = None
    test: Path | None = None
    pairs: Path | None = None
    pictures: Path | None = None
