"""Records: the small files of a converted folder, and its manifest. Free of torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rpq_convert.errors import VerifyError
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json

PLAN, REPORT, MANIFEST = "rpq_plan.json", "rpq_report.json", "rpq_manifest.json"
CONFIG, CARD, CHART = "config.json", "README.md", "rpq_chart.png"
ORIGIN, WRITTEN = "rpq_source.json", "rpq_written.json"  # only in unfinished folders


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest.

    Raises:
        VerifyError: there is none, or it is broken.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise VerifyError(f"{path} is missing: the folder was not finished by rpq-convert")
    return read_json(path, kinds.MANIFEST, VerifyError)  # type: ignore[no-any-return]


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
