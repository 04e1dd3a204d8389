"""Files with anything in them: each is read as what it is, or refused in one line that names it. Minutes of it are for `make test-slow`."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import ROOT
from safetensors.torch import load_file, save_file
from wrong_files import net, spots

import rpq_convert as rpq
from rpq_convert.core import description
from rpq_convert.errors import CalibrationError, FolderError, PlanError, SourceError, VerifyError
from rpq_convert.inputs.files import read_inputs
from rpq_convert.report.schema import read_report
from rpq_convert.schemas import kinds
from rpq_convert.schemas.checking import read_json
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.sources import read_config
from rpq_convert.tuning.checkpoint import Checkpoint

KNOWN = (CalibrationError, FolderError, PlanError, SourceError, VerifyError, rpq.TuneError)
CORPUS = sorted((ROOT / "tests/corpus/records").iterdir())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6)
    | st.sampled_from(["..", "/", "F16", "out in", "rpq", "x" * 999, 10**8, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def use_plan(file):
    plan = rpq.Plan.from_dict(read_json(file, kinds.PLAN, PlanError), str(file))
    return plan.files, str(plan), plan.to_json()


def use_report(file):
    report = read_report(file)
    return str(report), report.to_html(), report._repr_html_()


def use_config(file):
    return description.read_all(read_config(file.parent)["quantization_config"])


def use_index(file):
    return sorted(open_folder(file.parent))


def use_data(file):
    return read_inputs(file, file.parent, model=net())


USES = {
    "plan": ("rpq_plan.json", use_plan),
    "report": ("rpq_report.json", use_report),
    "manifest": ("rpq_manifest.json", lambda file: rpq.verify(file.parent)),
    "config": ("config.json", use_config),
    "index": ("model.safetensors.index.json", use_index),
    "preset": ("own.toml", None),
    "sensitivities": ("sensitivities.json", lambda file: read_json(file, kinds.SENSITIVITIES, PlanError)),
    "tuning": ("all.safetensors", lambda file: Checkpoint(file).read("x")),
    "calibration": ("data.safetensors", use_data),
}
RECORDS = [name for name in USES if name not in ("preset", "tuning", "calibration")]


def tried(name, file):
    """Use a file; anything but an error of ours in one line is a fault. Return whether it was accepted."""
    try:
        USES[name][1](file)
    except KNOWN as e:
        assert "\n" not in str(e) and len(str(e)) < 1500, str(e)
        return False
    return True


@pytest.fixture(scope="module")
def place(whole, tmp_path_factory):
    """A copy of a folder in several files, whose records may be written over."""
    folder = tmp_path_factory.mktemp("fuzz") / "folder"
    return shutil.copytree(whole / "sharded", folder)


@pytest.mark.parametrize("file", CORPUS, ids=[f.name for f in CORPUS])
def test_corpus_is_refused_in_one_line(file, place):
    name = file.name.partition("-")[0]
    target = place / USES[name][0]
    before = target.read_bytes() if target.exists() else None
    shutil.copy(file, target)
    try:
        assert not tried(name, target)
    finally:
        target.unlink() if before is None else target.write_bytes(before)


def fuzz(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def mutated(name, place, records, count):
    """Try a record with other values in some of its places, and with other bytes."""
    data = records[name]
    file = place / USES[name][0]
    before = file.read_bytes() if file.exists() else None
    where = list(spots(data))
    text = json.dumps(data).encode()

    @fuzz(count)
    @given(edits=st.lists(st.tuples(st.integers(0, len(where) - 1), JSON, st.booleans()), min_size=1, max_size=3))
    def values(edits):
        changed = json.loads(text)
        for number, value, gone in edits:
            put(changed, where[number], value, gone)
        file.write_text(json.dumps(changed))
        tried(name, file)

    @fuzz(count)
    @given(
        edits=st.lists(
            st.tuples(st.integers(0, len(text) - 1), st.binary(max_size=4), st.integers(0, 3)), min_size=1, max_size=3
        )
    )
    def characters(edits):
        changed = text
        for at, new, gone in edits:
            changed = changed[:at] + new + changed[at + gone :]
        file.write_bytes(changed)
        tried(name, file)

    try:
        values()
        characters()
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def put(data, path, value, gone):
    """Replace or remove what lies at a path, if an earlier edit has left it there."""
    for step in path[:-1]:
        if not isinstance(data, (dict, list)) or (isinstance(data, dict) and step not in data):
            return
        if isinstance(data, list) and not (isinstance(step, int) and step < len(data)):
            return
        data = data[step]
    there = path and (
        (isinstance(data, dict) and path[-1] in data)
        or (isinstance(data, list) and isinstance(path[-1], int) and path[-1] < len(data))
    )
    if there and gone:
        del data[path[-1]]
    elif there:
        data[path[-1]] = value


@pytest.mark.parametrize("name", RECORDS)
def test_records_with_other_values(name, place, records):
    mutated(name, place, records, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_records_with_many_other_values(name, place, records):
    mutated(name, place, records, 300)


def other_bytes(name, file, count):
    """Try a file of tensors with other bytes in its header and after it."""
    raw = file.read_bytes()
    length = min(len(raw), 2000)

    @fuzz(count)
    @given(
        edits=st.lists(
            st.tuples(st.integers(0, length - 1), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3
        )
    )
    def run(edits):
        changed = raw
        for at, new, gone in edits:
            changed = changed[:at] + new + changed[at + gone :]
        file.write_bytes(changed)
        tried(name, file)

    run()


@pytest.mark.parametrize("count", [15, pytest.param(600, marks=pytest.mark.slow)])
def test_states_of_tuning_with_other_bytes(tmp_path, count):
    file = tmp_path / "all.safetensors"
    facts = {"mark": "x", "step": 3, "best_step": 2, "history": [[0, 1.5]], "since": 1, "share": 1.0, "began": 0}
    Checkpoint(file).write(facts, {"now": {"a": torch.zeros(3)}})
    assert tried("tuning", file)
    other_bytes("tuning", file, count)


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_data_with_other_bytes(whole, tmp_path, count):
    file = tmp_path / "data.safetensors"
    save_file(load_file(whole / "data.safetensors"), file)
    assert tried("calibration", file)
    other_bytes("calibration", file, count)
    for suffix, start in (("txt", "a few words\n"), ("jsonl", '{"text": "words"}\n'), ("csv", "text\nwords\n")):
        other = tmp_path / f"data.{suffix}"
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 256, 12, np.uint8).tobytes()
            other.write_bytes(start.encode()[: number % 20] + noise)
            tried("calibration", other)
