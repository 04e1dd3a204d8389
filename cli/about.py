"""The commands that tell: presets, and the environment."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from . import options as o
from .app import examples, group
from .errors import catching


@group.command(epilog=examples("rpq presets", "rpq presets 4bit > mine.toml"))
@catching
def presets(name: Annotated[str | None, Argument(metavar="[NAME]", help="Print this preset's TOML.")] = None) -> None:
    """List the presets, or print one as a start for your own."""
    from importlib.resources import files

    from rpq_convert.planning.rules import load_preset, preset_names

    if name is None:
        for known in preset_names():
            print(f"{known:<12} {load_preset(known).description}")
        return
    load_preset(name)
    path: Any = Path(name) if name.endswith(".toml") else files("rpq_convert.configs") / f"{name}.toml"
    print(path.read_text("utf8").rstrip("\n"))


@group.command(epilog=examples("rpq env"))
@catching
def env(json: o.Json = False) -> None:
    """Show versions and the machine, and say how to fix a torchvision that does not fit torch."""
    from .environment import facts

    found = facts()
    if json:
        print(jsonlib.dumps(found, indent=1))
    else:
        for key, value in found.items():
            print(f"{key:<14} {value}")
