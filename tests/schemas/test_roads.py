"""Everything that reads a file refuses a wrong one in one line that names file and field, with the right error class.

Above 350 lines: one test for each road, over the same damaged files.
"""

import copy
import hashlib
import json
import tomllib

import pytest
import torch
import transformers as tf
from rpq_convert.cli import group
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from wrong_files import MANIFEST, at, mutations, net, refused, shown, wrong

import rpq_convert as rpq
from rpq_convert.errors import FolderError, PlanError, SourceError, TuneError, VerifyError
from rpq_convert.folders import Measured, WithBase, evaluate_folder
from rpq_convert.planning.plan import Plan
from rpq_convert.planning.rules import load_preset
from rpq_convert.schemas.checking import MAX_BYTES
from rpq_convert.storage.pieces import Pieces, sealed


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
    given = Measured(inputs=base.parent / "data.safetensors")
    return {
        "load": (SourceError, lambda: rpq.load(folder, factory=net)),
        "audit": (SourceError, lambda: rpq.audit(folder)),
        "verify": (VerifyError, lambda: rpq.verify(folder)),
        "restore": (SourceError, lambda: rpq.restore_checkpoint(folder, folder.with_name("dense"))),
        "eval": (SourceError, lambda: evaluate_folder(WithBase(base, folder, net), given, keep=True)),
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


def test_a_wrong_piece_is_fitted_again_when_a_run_goes_on(whole, unfinished, caplog):
    work, again = unfinished
    (piece,) = (work / "pieces").glob("*.safetensors")
    tensors = load_file(piece)
    with safe_open(piece, "pt") as f:
        facts = json.loads(f.metadata()["rpq"])
    changes = list(wrong("piece", facts))
    assert len(changes) > 20
    pieces = Pieces(work)
    (job,) = (
        j for j in Plan.from_dict(json.loads((work / "rpq_plan.json").read_text())).jobs if pieces.path(j) == piece
    )
    for what, path, changed in changes:
        text = json.dumps(changed)
        save_file(tensors, piece, {"rpq": text, "sha256": sealed(text, tensors)})
        refused(FolderError, lambda: pieces.facts(job), piece.name, path, what)
        assert not piece.exists()
    text = json.dumps({**facts, "name": "z"})
    for metadata, says in (
        (None, "not what was written"),
        ({"rpq": "x", "sha256": sealed("x", tensors)}, "is not JSON"),
        ({"rpq": text, "sha256": sealed(text, tensors)}, "a piece of z"),
    ):
        save_file(tensors, piece, metadata)
        assert not pieces.done(job) and not piece.exists()
        assert (
            piece.name in caplog.messages[-1] and says in caplog.messages[-1] and "fitted again" in caplog.messages[-1]
        )
    save_file(tensors, piece, metadata)
    piece.write_bytes(piece.read_bytes()[:-10])
    again()
    assert piece.name in caplog.messages[-1] and len(caplog.messages) == 4
    weights = [whole / "out" / "model.safetensors", work.with_name("out") / "model.safetensors"]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("name, first", [("rpq_plan.json", "jobs"), ("rpq_source.json", "files")])
def test_wrong_records_of_an_unfinished_run_are_refused(unfinished, name, first):
    work, again = unfinished
    original = json.loads((work / name).read_text())
    for what, path, changed in [m for m in mutations(original) if m[1][0] == first][::3]:
        (work / name).write_text(json.dumps(changed))
        refused(FolderError, again, name, path, what)
    for text in (b"{", b"\xff"):
        (work / name).write_bytes(text)
        with pytest.raises(FolderError, match="delete the folder, or pass overwrite=True"):
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
