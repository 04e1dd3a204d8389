"""Every kind of file at its schema: every field made wrong in every way is named, and the schemas are those of what they describe."""

import copy
import json
import subprocess
import sys
from dataclasses import MISSING, fields

import jsonschema
import msgspec
import pytest
from paths import ROOT
from wrong_files import allowed, at, mutations, refused, removals

from rpq_convert.core.results import Encoded
from rpq_convert.core.spec import Spec
from rpq_convert.errors import SourceError
from rpq_convert.planning.plan import Job, Plan, Skip
from rpq_convert.planning.rules import SETTINGS
from rpq_convert.report.schema import FileRow, Report, Row
from rpq_convert.schemas import kinds
from rpq_convert.schemas.__main__ import texts
from rpq_convert.schemas.checking import check

DOCS = ROOT / "docs" / "schemas"


@pytest.mark.parametrize("name", kinds.PUBLISHED)
def test_every_wrong_field_is_named(records, name):
    kind, data = kinds.PUBLISHED[name], records[name]
    check(data, kind, "the file", SourceError)
    count = 0
    for what, path, changed in mutations(data):
        refused(SourceError, lambda c=changed: check(c, kind, "the file", SourceError), "the file", path, what)
        count += 1
    assert count >= 15


@pytest.mark.parametrize("name", kinds.PUBLISHED)
def test_what_is_missing_or_null_is_named_unless_it_has_a_default(records, name):
    kind, data = kinds.PUBLISHED[name], records[name]
    for what, path, changed in removals(data):
        if allowed(name, what, path):
            check(changed, kind, "the file", SourceError)
        else:
            refused(SourceError, lambda c=changed: check(c, kind, "the file", SourceError), "the file", path, what)


@pytest.mark.parametrize("name", ["plan", "report", "config", "preset", "piece"])
def test_an_unknown_field_is_named_where_it_would_change_the_meaning(records, name):
    inside = {
        "plan": ("jobs", 0, "spec"), "report": ("rows", 0), "preset": ("settings",), "piece": (),
        "config": ("quantization_config", "modules", "1.weight"),
    }[name]  # fmt: skip
    changed = copy.deepcopy(records[name])
    at(changed, inside)["newer"] = 1
    kind = kinds.PUBLISHED[name]
    refused(SourceError, lambda: check(changed, kind, "f", SourceError), "f", (*inside, "newer"), "unknown")
    with pytest.raises(SourceError, match=r"newer is unknown; known: "):
        check(changed, kind, "f", SourceError)


def test_newer_fields_that_change_nothing_are_ignored(records):
    for name, inside in (
        ("plan", ()),
        ("config", ("quantization_config",)),
        ("manifest", ()),
        ("index", ()),
        ("tuning", ()),
        ("source", ()),
        ("lock", ()),
    ):
        changed = copy.deepcopy(records[name])
        at(changed, inside)["newer"] = 1
        check(changed, kinds.PUBLISHED[name], "f", SourceError)


def test_dimensions_whose_product_is_too_large_are_refused(records):
    for name, inside in (("plan", ("jobs", 0)), ("plan", ("skips", 0)), ("report", ("rows", 0))):
        changed = copy.deepcopy(records[name])
        at(changed, inside)["shape"] = [1 << 20, 1 << 20, 1 << 20]
        refused(
            SourceError,
            lambda c=changed, n=name: check(c, kinds.PUBLISHED[n], "f", SourceError),
            "f",
            (*inside, "shape"),
            "",
        )


def test_a_field_whose_name_looks_like_a_path_is_no_trap(records):
    for name in ("x` - at `$.rows[99]", "x` - at `key` in `$.y", "x\n\x1b[31m"):
        with pytest.raises(SourceError, match="unknown") as caught:
            check({**records["report"], name: 1}, kinds.REPORT, "f", SourceError)
        assert "\n" not in str(caught.value)


def test_the_json_schemas_in_the_docs_are_up_to_date(tmp_path):
    subprocess.run([sys.executable, "-m", "rpq_convert.schemas", str(tmp_path)], check=True)
    assert {p.name: p.read_text("utf8") for p in tmp_path.iterdir()} == {
        p.name: p.read_text("utf8") for p in DOCS.iterdir()
    }


def test_the_json_schemas_accept_real_files_and_refuse_wrong_ones(records):
    for name, data in records.items():
        schema = json.loads(texts()[f"{name}.json"])
        validator = jsonschema.Draft202012Validator(schema)
        validator.validate(data)
        for what, path, changed in list(mutations(data))[::7]:
            if what in ("wrong type", "negative"):
                assert not validator.is_valid(changed), (name, what, path)


@pytest.mark.parametrize(
    "entry, value",
    [
        (kinds.SpecEntry, Spec),
        (kinds.JobEntry, Job),
        (kinds.SkipEntry, Skip),
        (kinds.RowEntry, Row),
        (kinds.FileEntry, FileRow),
        (kinds.ReportFile, Report),
    ],
    ids=lambda c: c.__name__,
)
def test_schemas_have_the_fields_of_what_they_describe(entry, value):
    found = {f.name: f for f in msgspec.structs.fields(entry)}
    wanted = {f.name: f for f in fields(value)}
    assert set(found) - {"schema_version", "summary"} == set(wanted)
    for name, f in wanted.items():
        if f.default is not MISSING and found[name].default is not msgspec.NODEFAULT and f.default != ():
            assert found[name].default == f.default, name


def test_a_preset_may_set_what_a_rule_may_set():
    assert {f.name for f in msgspec.structs.fields(kinds.Settings)} == set(SETTINGS)
    assert {f.name for f in msgspec.structs.fields(kinds.PieceFacts)} == {f.name for f in fields(Encoded)} - {
        "tensors"
    } | {"source"}


def test_what_is_read_is_written_again_byte_for_byte(whole):
    text = (whole / "out" / "rpq_report.json").read_text()
    assert Report.from_json(text).to_json() == text
    text = (whole / "out" / "rpq_plan.json").read_text()
    assert Plan.from_dict(json.loads(text)).to_json() == text
