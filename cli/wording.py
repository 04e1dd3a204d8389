"""What the library says in Python's words, said in the command line's: `overwrite=True` becomes `--overwrite`."""

import re
from dataclasses import fields

from rpq_convert.conversion.options import RunOptions
from rpq_convert.planning.options import PlanOptions
from rpq_convert.planning.rules import SETTINGS
from rpq_convert.storage.options import SourceOptions
from rpq_convert.tuning.options import TuneOptions

OPTIONS = {
    f.name: f.metadata.get("flag") or f.name.replace("_", "-")
    for kind in (PlanOptions, SourceOptions, RunOptions, TuneOptions)
    for f in fields(kind)
} | {"overwrite": "overwrite", "calibration": "calibrate", "field": "text-field"}
PHRASES = {
    "pass private=True": "leave out --public",
    "pass private=False": "pass --public",
    "leave out keep=True": "leave out --save",
    ", or for pictures own_inputs(model, shape=(channels, height, width))": " as a .safetensors file",
}
KEYWORD = re.compile(r"(?<![\w:,'\"])([a-z_]+)=(True|'[^']*')")  # one inside a rule's text follows a colon or a comma


def as_flags(text: str) -> str:
    """Return a sentence of the library with its keywords as options of a command."""
    for phrase, said in PHRASES.items():
        text = text.replace(phrase, said)
    return KEYWORD.sub(_flag, text)


def _flag(found: re.Match[str]) -> str:
    name, value = found[1], found[2].strip("'")
    if name in OPTIONS:
        return f"--{OPTIONS[name]}" + ("" if value == "True" else f" {value}")
    return f"--rule '*:{name}={value}'" if name in SETTINGS else found[0]
