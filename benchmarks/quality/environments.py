"""Environments: every tool gets the one that its requirements file describes, since they ask for clashing versions."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"


class CannotInstall(RuntimeError):
    """pip's last words."""


@cache
def python_of(name: str | None, work: Path) -> str:
    """Return the interpreter of an environment, made when it is not there; None is the one that runs this."""
    if name is None:
        return sys.executable
    folder = work / "environments" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {name}.txt into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS / f"{name}.txt")],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise CannotInstall(done.stderr.strip().splitlines()[-1])
        (folder / "ready").touch()
    return str(python)
