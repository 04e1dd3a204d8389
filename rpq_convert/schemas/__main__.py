"""Write the JSON Schema of every kind of file: `python -m rpq_convert.schemas docs/schemas`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from rpq_convert.schemas.kinds import PUBLISHED


def texts() -> dict[str, str]:
    """Return file name -> JSON Schema."""
    found = {}
    for name, kind in PUBLISHED.items():
        schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind.title}
        found[f"{name}.json"] = json.dumps(schema | msgspec.json.schema(kind.type), indent=1) + "\n"
    return found


def main(folder: str) -> None:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (place / name).write_text(text, "utf8")


if __name__ == "__main__":
    main(*sys.argv[1:])
