"""What a file may not say: every field of its data made wrong in every way, and what the refusal must say."""

import copy
import json
import re
from dataclasses import MISSING, fields

import pytest
from torch import nn

from rpq_convert.core.spec import Spec
from rpq_convert.planning.plan import Job, Skip
from rpq_convert.planning.rules import SETTINGS
from rpq_convert.report.schema import Row
from rpq_convert.schemas.checking import MAX_NESTING

MANIFEST = "rpq_manifest.json"

# What fields hold that anything may stand in, and fields whose numbers have no limits.
FREE = re.compile(r"options\.|metadata|library_name|quantization_config\.(plan_sha256|version)$")
UNLIMITED = re.compile(r"metrics\.|history\[\d+\]\[1\]|^seen\[\d\]\[2\]$|max_shard_size|seed$")


def nested(depth=MAX_NESTING + 8):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def spots(value, path=()):
    """Yield the path of every field; of long lists the first and the last entry."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from spots(value[key], (*path, key))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} & set(range(len(value)))):
            yield from spots(value[i], (*path, i))


def shown(path):
    steps = [f".{s}" if isinstance(s, str) and s.isidentifier() else f"[{json.dumps(s)}]" for s in path]
    return "".join(steps).removeprefix(".")


def at(data, path):
    for step in path:
        data = data[step]
    return data


def wrong_values(value, name):
    """Yield what must not stand where `value` stands."""
    yield "nested", nested()
    if FREE.search(name):
        return
    yield "wrong type", [3] if isinstance(value, dict) else {"x": 3}
    if isinstance(value, (str, bool)):
        yield "wrong type", 3.5
    elif isinstance(value, (int, float)):
        yield "wrong type", "3"
        yield "bool for a number", True
        if not UNLIMITED.search(name):
            yield "huge", 10**30 if isinstance(value, int) else 10**400
            yield "negative", -1
            yield "not a number", float("nan")


def mutations(data):
    """Yield (what, path, data with one field made wrong): all must be refused."""
    for path in spots(data):
        for what, value in wrong_values(at(data, path), shown(path)):
            changed = copy.deepcopy(data)
            at(changed, path[:-1])[path[-1]] = value
            yield what, path, changed


def removals(data):
    """Yield (what, path, data with one field removed or null): refused, unless a default or null stands for it."""
    for path in spots(data):
        if FREE.search(shown(path)) or isinstance(path[-1], int):
            continue
        without, null = copy.deepcopy(data), copy.deepcopy(data)
        del at(without, path[:-1])[path[-1]]
        at(null, path[:-1])[path[-1]] = None
        yield from (("missing", path, without), ("null", path, null))


def refused(error, action, file, path, what):
    with pytest.raises(error) as caught:
        action()
    said = str(caught.value)
    assert type(caught.value) is error and "\n" not in said and len(said) < 600, said
    assert file in said and ("nested more than" if what == "nested" else shown(path)) in said, (what, path, said)


def net():
    return nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


# Fields that need not be there, or may be null.
def defaults(*classes):
    return {f.name for c in classes for f in fields(c) if f.default is not MISSING} - {"aliases"}


OPTIONAL = {
    "plan": defaults(Spec, Job, Skip), "report": {*defaults(Row), "predicted_bytes", "version", "evaluations", "options", "summary", "worst_layer"},
    "config": {*defaults(Spec), "zero_row", "plan_sha256", "version"}, "preset": {*SETTINGS, "description", "settings", "rules"},
    "manifest": {"tensors", "made", "source", "sample", "reproducible"}, "index": set(),
    "piece": {"worst", "output_error", "worst_output", "source"}, "tuning": set(),
    "sensitivities": set(), "source": {"seen", "sha256", "sample", "tensors"}, "written": {"tensors", "not_finite"}, "lock": set(),
}  # fmt: skip
NULLABLE = {
    "plan": {"padding_idx", "scales", "input_scales", "rate"}, "config": {"scales", "input_scales", "rate", "zero_row", "guard"},
    "piece": {"error", "zero_row", "inputs", "worst", "output_error", "worst_output", "source"}, "manifest": {"made", "source", "sample"},
    "source": {"sha256", "sample"},
    "report": {"expected_error", "error", "seconds", "dead", "inputs", "worst", "output_error", "worst_output", "memory_bytes", "worst_layer",
               "predicted_bytes"},
}  # fmt: skip
MAPPINGS = ("modules", "tied", "files", "tensors", "metrics", "weight_map")  # whose entries have names of their own


def may_be_missing(name, path):
    entry = (
        (len(path) > 1 and path[-2] in MAPPINGS) or name == "sensitivities" or (name == "written" and len(path) == 1)
    )
    return entry or path[-1] in OPTIONAL[name]


def allowed(name, what, path):
    return may_be_missing(name, path) if what == "missing" else path[-1] in NULLABLE.get(name, ())


def wrong(name, data):
    """Yield (what, path, data) of everything that must be refused."""
    yield from mutations(data)
    yield from (m for m in removals(data) if not allowed(name, *m[:2]))
