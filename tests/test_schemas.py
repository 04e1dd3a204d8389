"""Every field of every file that is read, made wrong in every way: one line that names the file and the field, and the right error class."""

import copy
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import jsonschema
import msgspec
import pytest
import torch
import transformers as tf
from rpq_convert.cli import group
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.core.results import Encoded
from rpq_convert.core.spec import Spec
from rpq_convert.errors import FolderError, PlanError, SourceError, TuneError, VerifyError
from rpq_convert.folders import evaluate_folder
from rpq_convert.planning.plan import Job, Plan, Skip
from rpq_convert.planning.rules import SETTINGS, load_preset
from rpq_convert.report.schema import FileRow, Report, Row
from rpq_convert.schemas import kinds
from rpq_convert.schemas.__main__ import texts
from rpq_convert.schemas.checking import MAX_BYTES, MAX_NESTING, check

DOCS = Path(__file__).parent.parent / "docs" / "schemas"
MANIFEST = "rpq_manifest.json"


def net():
    return nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A place with `base.safetensors`, and what was converted from it: `out`, and in several files, `sharded`."""
    place = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    save_file(net().state_dict(), place / "base.safetensors")
    options = {"factory": net, "bits": 4, "executor": "serial"}
    rpq.convert_checkpoint(place / "base.safetensors", place / "out", **options)
    rpq.convert_checkpoint(place / "base.safetensors", place / "sharded", max_shard_size="20KB", **options)
    save_file({"input": torch.arange(60).reshape(3, 20)}, place / "data.safetensors")
    evaluate_folder(
        place / "base.safetensors", place / "out", inputs=place / "data.safetensors", factory=net, keep=True
    )
    return place


# What fields hold that anything may stand in, and fields whose numbers have no limits.
FREE = re.compile(r"options\.|metadata|library_name|quantization_config\.(plan_sha256|version)$")
UNLIMITED = re.compile(r"metrics\.|history\[\d+\]\[1\]|^\[\d\]\[2\]$|max_shard_size|seed$")


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


# ---- each kind, straight at its schema: every field, every mutation ----


@pytest.fixture(scope="module")
def records(whole):
    """Kind -> data of a real file."""
    out = whole / "out"
    read = {name: json.loads((out / f"rpq_{name}.json").read_text()) for name in ("plan", "report", "manifest")}
    assert read["report"]["evaluations"] and read["plan"]["jobs"] and read["plan"]["skips"]
    config = json.loads((out / "config.json").read_text())
    index = json.loads((whole / "sharded" / "model.safetensors.index.json").read_text())
    facts = {"name": "a", "error": 0.5, "dead": 3, "seconds": 0.25, "zero_row": 1, "inputs": 5}
    preset = {
        "description": "x", "rules": [{"match": "*", "bits": 2.5}],
        "settings": {
            "bits": 4.5, "dim": 2, "stages": 1, "books": 1, "num_codebooks": 2, "axis": "in", "codebook_dtype": "float16",
            "scales": "none", "rotation": 8, "outliers": 0.005, "fit": "random", "grow": True, "skip": False, "view": "out in",
        },
    }  # fmt: skip
    tuning = {"mark": "x", "step": 3, "best_step": 2, "history": [[0, 1.5]], "since": 1, "share": 1.0, "began": 0}
    return read | {
        "config": config, "index": index, "piece": facts, "preset": preset, "tuning": tuning,
        "sensitivities": {"a": 1.5, "b.weight": {"2": 0.5, "4": 0.25}}, "source": [["a.safetensors", 5, 6], ["b", 7, 8]],
    }  # fmt: skip


@pytest.mark.parametrize("name", kinds.PUBLISHED)
def test_every_wrong_field_is_named(records, name):
    kind, data = kinds.PUBLISHED[name], records[name]
    check(data, kind, "the file", SourceError)
    count = 0
    for what, path, changed in mutations(data):
        refused(SourceError, lambda c=changed: check(c, kind, "the file", SourceError), "the file", path, what)
        count += 1
    assert count >= 15


# Fields that need not be there, or may be null.
def defaults(*classes):
    return {f.name for c in classes for f in fields(c) if f.default is not MISSING} - {"aliases"}


OPTIONAL = {
    "plan": defaults(Spec, Job, Skip), "report": {*defaults(Row), "predicted_bytes", "version", "evaluations", "options"},
    "config": {*defaults(Spec), "zero_row", "plan_sha256", "version"}, "preset": {*SETTINGS, "description", "settings", "rules"},
    "manifest": set(), "index": set(), "piece": set(), "tuning": set(), "sensitivities": set(), "source": set(),
}  # fmt: skip
NULLABLE = {
    "plan": {"padding_idx", "scales"}, "config": {"scales", "zero_row", "guard"}, "piece": {"error", "zero_row", "inputs"},
    "report": {"expected_error", "error", "seconds", "dead", "inputs", "predicted_bytes"},
}  # fmt: skip
MAPPINGS = ("modules", "tied", "files", "metrics", "weight_map")  # whose entries have names of their own


def may_be_missing(name, path):
    entry = (len(path) > 1 and path[-2] in MAPPINGS) or name == "sensitivities"
    return entry or path[-1] in OPTIONAL[name]


def allowed(name, what, path):
    return may_be_missing(name, path) if what == "missing" else path[-1] in NULLABLE.get(name, ())


def wrong(name, data):
    """Yield (what, path, data) of everything that must be refused."""
    yield from mutations(data)
    yield from (m for m in removals(data) if not allowed(name, *m[:2]))


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


# ---- schemas and what they describe ----


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
    assert set(found) - {"schema_version"} == set(wanted)
    for name, f in wanted.items():
        if f.default is not MISSING and found[name].default is not msgspec.NODEFAULT and f.default != ():
            assert found[name].default == f.default, name


def test_a_preset_may_set_what_a_rule_may_set():
    assert {f.name for f in msgspec.structs.fields(kinds.Settings)} == set(SETTINGS)
    assert {f.name for f in msgspec.structs.fields(kinds.PieceFacts)} == {f.name for f in fields(Encoded)} - {"tensors"}


def test_what_is_read_is_written_again_byte_for_byte(whole):
    text = (whole / "out" / "rpq_report.json").read_text()
    assert Report.from_json(text).to_json() == text
    text = (whole / "out" / "rpq_plan.json").read_text()
    assert Plan.from_dict(json.loads(text)).to_json() == text


# ---- each road that reads a file ----


def put(folder, name, text):
    """Write a file of a folder, and what the manifest says of it."""
    data = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def folder(whole, tmp_path):
    return copied(whole / "out", tmp_path / "out")


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def roads(folder, base):
    """Return what reads a folder: name -> (error class, call)."""
    given = {"inputs": base.parent / "data.safetensors", "factory": net, "keep": True}
    return {
        "load": (SourceError, lambda: rpq.load(folder, factory=net)),
        "audit": (SourceError, lambda: rpq.audit(folder)),
        "verify": (VerifyError, lambda: rpq.verify(folder)),
        "restore": (SourceError, lambda: rpq.restore_checkpoint(folder, folder.with_name("dense"))),
        "eval": (SourceError, lambda: evaluate_folder(base, folder, **given)),
    }


def test_a_wrong_description_is_refused_on_every_road(whole, folder):
    original = json.loads((folder / "config.json").read_text())
    ways = roads(folder, whole / "base.safetensors")
    for what, path, changed in wrong("config", original):
        if path[0] != "quantization_config" or path[-1] in ("quant_method", "format_version") or len(path) == 1:
            continue  # what is no description at all is said in words of its own
        if path[2:3] == ("1.weight",) or len(path) < 4:
            put(folder, "config.json", json.dumps(changed))
            for error, action in ways.values():
                refused(error, action, "config.json", path, what)
    assert not folder.with_name("dense").exists() and not folder.with_name("dense.partial").exists()


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": "\\ud800"}', b"1" * 5000]
)
@pytest.mark.parametrize("name", ["config.json", "rpq_report.json", MANIFEST, "model.safetensors.index.json"])
def test_what_is_no_json_object_is_refused(whole, tmp_path, name, text):
    folder = copied(whole / ("sharded" if "index" in name else "out"), tmp_path / "copy")
    if name == MANIFEST:
        (folder / name).write_bytes(text)
    else:
        put(folder, name, text)
    reads = {
        "config.json": "load audit verify restore eval", "rpq_report.json": "audit eval", MANIFEST: "verify eval",
        "model.safetensors.index.json": "load verify restore eval",
    }[name]  # fmt: skip
    ways = roads(folder, whole / "base.safetensors")
    for way in reads.split():
        error, action = ways[way]
        with pytest.raises(error if name != MANIFEST else VerifyError) as caught:
            action()
        assert "\n" not in str(caught.value) and (
            name in str(caught.value) or "not an RPQ checkpoint" in str(caught.value)
        )


def test_a_file_that_is_too_long_is_not_read(whole, folder):
    for name, way in (("config.json", "load"), ("rpq_report.json", "audit")):
        with open(folder / name, "r+b") as f:
            f.truncate(MAX_BYTES + 1)
        error, action = roads(folder, whole / "base.safetensors")[way]
        with pytest.raises(error, match=rf"{name} is not .*: it has 67,108,865 bytes, at most 67,108,864 are read"):
            action()
        put(folder, name, (whole / "out" / name).read_bytes())


def test_a_wrong_report_is_refused_where_it_is_read(whole, folder):
    original = json.loads((folder / "rpq_report.json").read_text())
    base = whole / "base.safetensors"
    for number, (what, path, changed) in enumerate(mutations(original)):
        if path == ("schema_version",):
            continue
        put(folder, "rpq_report.json", json.dumps(changed))
        refused(SourceError, lambda: rpq.audit(folder), "rpq_report.json", path, what)
        if number % 10 == 0:
            refused(SourceError, roads(folder, base)["eval"][1], "rpq_report.json", path, what)
    put(folder, "rpq_report.json", json.dumps({**original, "schema_version": 2}))
    with pytest.raises(SourceError, match=r"rpq_report.json is not a report of schema 1, but 2; update rpq-convert"):
        rpq.audit(folder)


def test_a_wrong_manifest_is_refused_where_it_is_read(whole, folder):
    original = json.loads((folder / MANIFEST).read_text())
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}
    for what, path, changed in wrong("manifest", original):
        (folder / MANIFEST).write_text(json.dumps(changed))
        refused(VerifyError, lambda: rpq.verify(folder), MANIFEST, path, what)
        refused(VerifyError, roads(folder, whole / "base.safetensors")["eval"][1], MANIFEST, path, what)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}


def test_a_wrong_index_is_refused_where_it_is_read(whole, tmp_path):
    folder = copied(whole / "sharded", tmp_path / "copy")
    name = "model.safetensors.index.json"
    original = json.loads((folder / name).read_text())
    changes = [m for m in mutations(original) if m[1][0] == "weight_map"][::3]
    for what, path, changed in [
        *changes,
        ("empty", ("weight_map",), {"weight_map": {}}),
        ("missing", ("weight_map",), {}),
    ]:
        put(folder, name, json.dumps(changed))
        ways = roads(folder, whole / "base.safetensors")
        for way in ("load", "verify", "restore"):
            refused(*ways[way], name, path, what)


def test_a_wrong_plan_is_refused(records):
    for what, path, changed in wrong("plan", records["plan"]):
        if path != ("format_version",):
            refused(PlanError, lambda c=changed: Plan.from_dict(c), "the value", path, what)
    with pytest.raises(PlanError, match="is not a plan of format 1, but 2; update rpq-convert"):
        Plan.from_dict({**records["plan"], "format_version": 2})


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("spec", {"dim": 2, "codebook_dtype": "float8_e4m3fn"}, "jobs[0].spec: float8_e4m3fn codebooks need scales"),
        ("spec", {"dim": 2, "rotation": 8, "outliers": 1}, "jobs[0].spec: a rotation spreads outliers"),
        ("spec", {"dim": 1 << 41, "books": 1}, "jobs[0].spec: codebooks would hold more than"),
        ("spec", {"dim": 2, "books": 1 << 40}, "jobs[0]: "),
        ("view", "in in", "jobs[0]: view 'in in' must name the axis 'out'"),
        ("view", "out in kh", "jobs[0]: view 'out in kh' has 3 axes"),
    ],
)
def test_a_plan_whose_fields_contradict_each_other_is_refused(records, field, value, says):
    changed = copy.deepcopy(records["plan"])
    changed["jobs"][0][field] = value
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(changed)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_skip_of_an_unknown_dtype_is_refused(records):
    changed = copy.deepcopy(records["plan"])
    changed["skips"][0]["dtype"] = "nn"
    with pytest.raises(PlanError, match=r"skips\[0\]\.dtype: 'nn' is not a torch dtype"):
        Plan.from_dict(changed)


@pytest.fixture
def unfinished(whole, tmp_path):
    """Return the folder of a conversion that was killed after its first job, and the call that goes on."""

    def kill(job, encoded):
        raise KeyboardInterrupt

    def again(**options):
        given = {"factory": net, "bits": 4, "executor": "serial", **options}
        return rpq.convert_checkpoint(whole / "base.safetensors", tmp_path / "out", **given)

    with pytest.raises(KeyboardInterrupt):
        again(progress=kill)
    return tmp_path / "out.partial", again


def test_a_wrong_piece_is_refused_when_a_run_goes_on(whole, unfinished):
    work, again = unfinished
    (piece,) = (work / "pieces").glob("*.safetensors")
    tensors = load_file(piece)
    with safe_open(piece, "pt") as f:
        facts = json.loads(f.metadata()["rpq"])
    changes = list(wrong("piece", facts))
    assert len(changes) > 20
    for what, path, changed in changes:
        save_file(tensors, piece, {"rpq": json.dumps(changed)})
        refused(FolderError, again, piece.name, path, what)
    for metadata, says in (
        (None, "is not JSON"),
        ({"rpq": "x"}, "is not JSON"),
        ({"rpq": json.dumps({**facts, "name": "z"})}, "piece of z"),
    ):
        save_file(tensors, piece, metadata)
        with pytest.raises(FolderError, match=says):
            again()
    piece.write_bytes(piece.read_bytes()[:-10])
    with pytest.raises(FolderError, match="delete it and run the same command again"):
        again()
    piece.unlink()
    again()
    weights = [whole / "out" / "model.safetensors", work.with_name("out") / "model.safetensors"]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("name, first", [("rpq_plan.json", "jobs"), ("rpq_source.json", 0)])
def test_wrong_records_of_an_unfinished_run_are_refused(unfinished, name, first):
    work, again = unfinished
    original = json.loads((work / name).read_text())
    for what, path, changed in [m for m in mutations(original) if m[1][0] == first][::3]:
        (work / name).write_text(json.dumps(changed))
        refused(FolderError, again, name, path, what)
    for text in (b"{", b"\xff"):
        (work / name).write_bytes(text)
        with pytest.raises(FolderError, match="delete the folder, or pass --overwrite"):
            again()
    again(overwrite=True)
    assert work.with_name("out").is_dir() and not work.exists()


def toml(data):
    """Return a preset's data as TOML."""

    def value(v):
        if isinstance(v, dict):
            return "{" + ", ".join(f"{k} = {value(x)}" for k, x in v.items()) + "}"
        if isinstance(v, list):
            return "[" + ", ".join(map(value, v)) + "]"
        return "nan" if v != v else json.dumps(v)

    return "\n".join(f"{k} = {value(v)}" for k, v in data.items())


def test_a_wrong_preset_is_refused(records, tmp_path):
    file = tmp_path / "own.toml"
    model, count = net(), 0
    for what, path, changed in mutations(records["preset"]):
        text = toml(changed)
        if what == "huge" and "e" not in text and len(str(at(changed, path))) > 300:
            continue  # Python's TOML reads no such number
        assert tomllib.loads(text).keys() == changed.keys()
        file.write_text(text)
        refused(PlanError, lambda: rpq.plan(model, preset=str(file)), "own.toml", path, what)
        count += 1
    assert count > 60
    file.write_text("a = " + "[" * 5000)
    with pytest.raises(PlanError, match=r"own\.toml is not a preset"):
        load_preset(str(file))


def command(*arguments):
    done = CliRunner().invoke(group, [*map(str, arguments)], env={"NO_COLOR": "1"})
    return done.exit_code, done.stderr.strip().splitlines()


def test_a_wrong_sensitivity_file_ends_a_command_in_one_line(whole, records, tmp_path):
    file = tmp_path / "measured.json"
    ask = ("plan", whole / "base.safetensors", "--target-size", "50KB", "--sensitivity", file)
    for what, path, changed in mutations(records["sensitivities"]):
        file.write_text(json.dumps(changed))
        code, lines = command(*ask)
        assert code == 3 and len(lines) == 1 and "measured.json is not a table of sensitivities" in lines[0], (
            what,
            path,
            lines,
        )
        assert what == "nested" or shown(path) in lines[0]
    for text in ('{"a": {}}', '{"a": {"two": 1}}', "[]", "{"):
        file.write_text(text)
        code, lines = command(*ask)
        assert code == 3 and len(lines) == 1 and "measured.json" in lines[0]


def test_a_wrong_state_of_tuning_is_refused(whole, tmp_path):
    dense = net()
    dense.load_state_dict(load_file(whole / "base.safetensors"))
    data = list(torch.randint(300, (8, 4, 6), generator=torch.Generator().manual_seed(0)))
    file = tmp_path / "tune.safetensors"

    def again(**options):
        model = rpq.load(whole / "out", factory=net)
        return rpq.tune(model, dense, data, steps=6, every=2, checkpoint=file, **options)

    def kill(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(progress=kill)
    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        facts = json.loads(f.metadata()["rpq_tune"])
    for what, path, changed in wrong("tuning", facts):
        save_file(tensors, file, {"rpq_tune": json.dumps(changed)})
        refused(TuneError, again, "tune.safetensors", path, what)
    for key in ("strange/0.weight", "now/strange", next(k for k in tensors if k.startswith("now/"))):
        save_file({**tensors, key: torch.zeros(3, 1, 4)}, file, {"rpq_tune": json.dumps(facts)})
        with pytest.raises(TuneError, match="is no tensor of this run; remove it to start anew"):
            again()
    save_file(tensors, file)
    with pytest.raises(TuneError, match=r"tune\.safetensors is not the state of a tuning run"):
        again()
    save_file(tensors, file, {"rpq_tune": json.dumps(facts)})
    assert again().steps == 6


def test_a_wrong_description_is_refused_by_transformers_road_too(tmp_path):
    size = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    tf.BertModel(tf.BertConfig(**size)).save_pretrained(tmp_path / "base")
    rpq.convert_checkpoint(tmp_path / "base", tmp_path / "out", bits=4)
    original = json.loads((tmp_path / "out" / "config.json").read_text())
    name = next(iter(original["quantization_config"]["modules"]))
    for field, value in (
        ("dim", "2"),
        ("dim", -1),
        ("shape", 3),
        ("shape", [1 << 40, 1 << 40]),
        ("view", None),
        ("dtype", "f"),
        ("newer", 1),
    ):
        changed = copy.deepcopy(original)
        changed["quantization_config"]["modules"][name][field] = value
        (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
        refused(
            SourceError,
            lambda: tf.AutoModel.from_pretrained(tmp_path / "out"),
            "quantization_config",
            ("modules", name, field),
            "",
        )
    (tmp_path / "base" / "config.json").write_text(json.dumps({**original, "quantization_config": [3]}))
    refused(SourceError, lambda: rpq.plan(tmp_path / "base", bits=4), "config.json", ("quantization_config",), "")
