"""What a file says can do nothing to you: no read beyond a tensor, no code, no link out of the folder, no escape codes."""

import copy
import csv
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from often import often
from paths import ROOT, SUPPORT
from rpq_convert.cli import group
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import rpq_convert as rpq
from rpq_convert.errors import SourceError, VerifyError
from rpq_convert.inputs.files import tokenizer_of
from rpq_convert.report.schema import FileRow, Report, Row
from rpq_convert.showing import csv_cell, markdown_code, markdown_text, one_line, printable
from rpq_convert.storage.files import refuse_links
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.records import CONFIG, MANIFEST

REFUSED = (SourceError, VerifyError)
WEIGHTS = "model.safetensors"


def build():
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), nn.Embedding(50, 32), nn.Linear(64, 16))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A converted folder: one weight with scales, one in two stages, a table, one with outliers."""
    torch.manual_seed(0)
    model, place = build().eval(), tmp_path_factory.mktemp("safety") / "whole"
    rules = [
        {"match": "0.weight", "dim": 4, "axis": "in", "scales": "float16"},
        {"match": "1.weight", "dim": 4, "stages": 2, "axis": "out"},
        {"match": "3.weight", "dim": 4, "axis": "in", "outliers": 0.05},
    ]
    rpq.convert(model, rules=rules, bits=4, grow=True, executor="serial")
    rpq.save(model, place)
    return place


def crafted(whole, to, describe=None, tensors=None):
    """Copy a folder, change its description and tensors, and make its manifest right again."""
    to.mkdir()
    for file in whole.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    if describe is not None:
        config = json.loads((to / CONFIG).read_text())
        describe(config["quantization_config"])
        (to / CONFIG).write_text(json.dumps(config))
    if tensors is not None:
        held = load_file(to / WEIGHTS)
        tensors(held)
        save_file(held, to / WEIGHTS)
    manifest = json.loads((to / MANIFEST).read_text())
    for name in (CONFIG, WEIGHTS):
        data = (to / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to


def field(name, value, of="0.weight"):
    return lambda config: config["modules"][of].update({name: value})


def part(name, make, of="0.weight"):
    def change(held):
        key = f"{of}_rpq.{name}"
        held[key] = make(held[key]).contiguous()

    return change


def several(*changes):
    def change(value):
        for one in changes:
            one(value)

    return change


def dropped(name, of="0.weight"):
    return lambda held: held.pop(f"{of}_rpq.{name}")


def added(key, tensor):
    return lambda held: held.update({key: tensor})


def top(name, value):
    return lambda config: config.update({name: value})


BAD_NUMBERS = {
    "minus": -4,
    "zero": 0,
    "true": True,
    "fraction": 4.0,
    "nan": float("nan"),
    "text": "4",
    "list": [4],
    "none": None,
}
# name -> (change of the description, change of the tensors): what no road may take
BROKEN = {
    "4096 outputs, the tensors of 64": (field("shape", [4096, 64]), None),
    "few outputs": (field("shape", [2, 64]), None),
    "one axis": (field("shape", [4096]), None),
    "more books than blocks": (field("books", 4096), None),
    "more books than blocks, and so many": (field("books", 17), part("codebooks", lambda t: t.repeat(17, 1, 1))),
    "long sub-vectors": (field("dim", 4096), None),
    "stages without an axis": (field("stages", 3), None),
    "an axis without stages": (None, part("codes", lambda t: t[None].repeat(2, 1, 1))),
    "one stage of two": (field("stages", 1, "1.weight"), None),
    "stages of codes alone": (None, part("codes", lambda t: t[:1], "1.weight")),
    "float codes": (None, part("codes", lambda t: t.float())),
    "int64 codes": (None, part("codes", lambda t: t.long())),
    "int8 codes": (None, part("codes", lambda t: t.view(torch.int8))),
    "few codes": (None, part("codes", lambda t: t[:, :-1])),
    "codes on their side": (
        field("shape", [32, 64], "1.weight"),
        part("codes", lambda t: t.transpose(1, 2), "1.weight"),
    ),
    "float64 codebooks": (None, part("codebooks", lambda t: t.double())),
    "whole codebooks": (None, part("codebooks", lambda t: t.to(torch.int16))),
    "few codewords": (None, part("codebooks", lambda t: t[:, :16])),
    "few scales": (None, part("scales", lambda t: t[:8])),
    "whole scales": (None, part("scales", lambda t: t.to(torch.int16))),
    "no scales": (None, dropped("scales")),
    "no codes": (None, dropped("codes")),
    "no codebooks": (None, dropped("codebooks")),
    "scales that nobody describes": (field("scales", None), None),
    "outliers that nobody describes": (field("outliers", 0, "3.weight"), None),
    "positions beyond": (None, part("positions", lambda t: t + 64, "3.weight")),
    "positions before": (None, part("positions", lambda t: t - 65, "3.weight")),
    "float positions": (None, part("positions", lambda t: t.half(), "3.weight")),
    "huge axes": (field("shape", [1 << 40, 1 << 40]), None),
    "axes beyond any number": (field("shape", [10**300, 64]), None),
    "huge dim": (field("dim", 10**300), None),
    "huge books": (several(field("books", 1 << 39), field("shape", [64, 1 << 34]), field("dim", 1)), None),
    "huge stages": (field("stages", 10**300), None),
    **{f"dim {n}": (field("dim", v), None) for n, v in BAD_NUMBERS.items()},
    **{f"books {n}": (field("books", v), None) for n, v in BAD_NUMBERS.items()},
    **{f"stages {n}": (field("stages", v), None) for n, v in BAD_NUMBERS.items()},
    **{f"axis {n} long": (field("shape", [64, v]), None) for n, v in BAD_NUMBERS.items()},
    **{f"rotation {n}": (field("rotation", v), None) for n, v in BAD_NUMBERS.items() if n not in ("zero",)},
    **{f"outliers {n}": (field("outliers", v), None) for n, v in BAD_NUMBERS.items() if n not in ("zero",)},
    "rotation that does not divide": (field("rotation", 128), None),
    "shape as text": (field("shape", "64,64"), None),
    "no shape": (field("shape", []), None),
    "zero row beyond": (field("zero_row", 50, "2.weight"), None),
    "zero row before": (field("zero_row", -1, "2.weight"), None),
    "zero row true": (field("zero_row", True, "2.weight"), None),
    "zero row as text": (field("zero_row", "0", "2.weight"), None),
    "whole dtype": (field("dtype", "int8"), None),
    "no such dtype": (field("dtype", "float99"), None),
    "dtype null": (field("dtype", None), None),
    "codebooks of a whole dtype": (field("codebook_dtype", "int8"), None),
    "codebook dtype in a list": (field("codebook_dtype", ["float16"]), None),
    "scales of a number": (field("scales", 16), None),
    "scales in an object": (field("scales", {}), None),
    "other axis": (field("axis", "out", "2.weight"), None),
    "no such axis": (field("axis", "sideways"), None),
    "axis a number": (field("axis", 1), None),
    "no such layout": (field("layout", "diagonal"), None),
    "the other layout": (field("layout", "rows"), None),
    "view without out": (field("view", "in in2"), None),
    "view of three": (field("view", "expert out in"), None),
    "view a number": (field("view", 3), None),
    "view with strange names": (field("view", "out \x1b[31m"), None),
    "field nobody knows": (field("__class__", "os.system"), None),
    "description a list": (lambda c: c["modules"].update({"0.weight": []}), None),
    "description null": (lambda c: c["modules"].update({"0.weight": None}), None),
    "description empty": (lambda c: c["modules"].update({"0.weight": {}}), None),
    "modules a list": (top("modules", []), None),
    "modules null": (top("modules", None), None),
    "tied a list": (top("tied", []), None),
    "tied to a number": (top("tied", {"a.weight": 3}), None),
    "tied to an object": (top("tied", {"a.weight": {}}), None),
    "described and tied": (top("tied", {"0.weight": "1.weight"}), None),
    "guard a number": (top("guard", 3), None),
}
# What is whole by itself, and does not fit the model
ELSEWHERE = {
    "4096 outputs, and so many": (
        field("shape", [4096, 64]),
        several(part("codes", lambda t: t.repeat(1, 64)), part("scales", lambda t: t.repeat(64))),
    ),
    "2 outputs, and so many": (
        field("shape", [2, 64]),
        several(part("codes", lambda t: t[:, :2]), part("scales", lambda t: t[:2])),
    ),
    "no such parameter": (lambda c: c["modules"].update({"9.weight": c["modules"].pop("0.weight")}), None),
    "a bias": (lambda c: c["modules"].update({"0.bias": c["modules"].pop("0.weight")}), None),
    "tied to a smaller one": (top("tied", {"1.weight.x": "0.weight"}), None),
    "tied to a bias": (top("tied", {"0.bias": "0.weight"}), None),
    "short bias": (None, added("0.bias", torch.zeros(8))),
    "long bias": (None, added("0.bias", torch.zeros(65))),
    "whole bias": (None, added("0.bias", torch.zeros(64, dtype=torch.int64))),
    "boolean bias": (None, added("0.bias", torch.zeros(64, dtype=torch.bool))),
    "a codebook of nobody": (None, added("0.weight_rpq.more", torch.zeros(8))),
    "a tensor of nobody": (None, added("5.weight", torch.zeros(8))),
}


def refused(action, *arguments, **named):
    with pytest.raises(REFUSED) as caught:
        action(*arguments, **named)
    assert "\n" not in str(caught.value) and printable(str(caught.value)) == str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_whose_tensors_are_not_as_described_is_refused_on_every_road(whole, tmp_path, name):
    folder = crafted(whole, tmp_path / "crafted", *BROKEN[name])
    refused(rpq.load, folder, factory=build)
    refused(rpq.verify, folder)
    refused(rpq.restore_checkpoint, folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_folder_that_does_not_fit_the_model_is_refused(whole, tmp_path, name):
    refused(rpq.load, crafted(whole, tmp_path / "crafted", *ELSEWHERE[name]), factory=build)


def test_the_folder_that_is_crafted_from_loads(whole, tmp_path):
    same = crafted(whole, tmp_path / "same", lambda config: None, lambda held: None)
    model = rpq.load(same, factory=build)
    assert model[0](torch.randn(3, 64)).shape == (3, 64)
    rpq.verify(same)
    rpq.restore_checkpoint(same, tmp_path / "dense")


@pytest.mark.parametrize(
    "name", ["4096 outputs, the tensors of 64", "float codes", "positions beyond", "dim nan", "view with strange names"]
)
def test_the_command_line_says_it_in_one_line(whole, tmp_path, name):
    folder = crafted(whole, tmp_path / "crafted", *BROKEN[name])
    for arguments, code in ((["verify", str(folder)], 5), (["restore", str(folder), str(tmp_path / "dense")], 4)):
        result = CliRunner().invoke(group, arguments)
        assert result.exit_code == code, result.output
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and "\x1b" not in result.stderr


def test_deep_and_long_json_is_refused(whole, tmp_path):
    for i, text in enumerate(
        ("[" * 100_000, '{"quantization_config": {"format_version": ' + "9" * 5000 + "}}", "\xff")
    ):
        folder = crafted(whole, tmp_path / str(i))
        (folder / CONFIG).write_text(text, "latin-1")
        refused(rpq.load, folder, factory=build)
        refused(rpq.restore_checkpoint, folder, tmp_path / "dense")


# ---- transformers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    import transformers

    place = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config).eval()
    rpq.convert(model, bits=4, grow=True, executor="serial")
    model.save_pretrained(place / "rpq")
    return place / "rpq"


LAYER = "encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize(
    "change",
    [
        (field("shape", [4096, 32], LAYER), None),
        (field("shape", [4096, 32], LAYER), part("codes", lambda t: t.repeat(1, 64), LAYER)),
        (None, part("codes", lambda t: t.float(), LAYER)),
        (None, part("codes", lambda t: t.long(), LAYER)),
        (None, part("codes", lambda t: t[..., :3], LAYER)),
        (None, part("codebooks", lambda t: t[..., :16, :], LAYER)),
        (None, dropped("codes", LAYER)),
        (field("dim", float("nan"), LAYER), None),
        (field("zero_row", 64, LAYER), None),
        (top("modules", {"x": []}), None),
    ],
    ids=range(10),
)
def test_from_pretrained_refuses_what_load_refuses(bert, tmp_path, change):
    import transformers

    folder = tmp_path / "crafted"
    (bert / MANIFEST).write_text(json.dumps({"files": {}}))
    crafted(bert, folder, *change)
    refused(transformers.AutoModel.from_pretrained, folder)
    refused(rpq.load, folder)


# ---- in memory ---------------------------------------------------------------------------------------------------------


def converted():
    torch.manual_seed(0)
    model = build().eval()
    rpq.convert(model, bits=4, grow=True, executor="serial")
    return model


def put(make):
    """Return a change that puts other codes in the place of those that guard themselves."""
    return lambda w: w._buffers.update(codes=make(w.codes.clone()))


def without_memory(codes):
    bare = codes.plain.clone()
    bare.untyped_storage().resize_(0)
    return bare


CHANGES = {
    "float codes": put(torch.Tensor.float),
    "int64 codes": put(torch.Tensor.long),
    "few codes": put(lambda codes: codes[..., :1].clone()),
    "few books": lambda w: setattr(w.codebooks, "data", w.codebooks.data[..., :1, :].clone()),
    "a short view": lambda w: setattr(w.codebooks, "data", w.codebooks.data[..., :16, :]),
    "no memory": put(without_memory),
}


@pytest.mark.parametrize("seen", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_changed_in_memory_reach_no_kernel(name, seen):
    model = converted()
    for layer, x in ((model[0], torch.randn(3, 64)), (model[2], torch.arange(5))):
        if seen:
            layer(x)
        with torch.no_grad():
            CHANGES[name](layer.weight_rpq)
        with pytest.raises(ValueError, match="RPQ weight"):
            layer(x)
        with pytest.raises(ValueError, match="RPQ weight"):
            layer.weight_rpq()
        with pytest.raises(ValueError, match="RPQ weight"):
            layer.weight + 0


@pytest.mark.parametrize("size", [1, 8, 65])
def test_a_bias_of_another_length_reaches_no_kernel(size):
    model, dense = converted(), nn.Linear(64, 64)
    model[0].bias = dense.bias = nn.Parameter(torch.zeros(size))
    with torch.no_grad():
        for tokens in (1, 3, 40):
            x = torch.randn(tokens, 64)
            if size == 1:  # torch broadcasts it
                assert model[0](x).shape == dense(x).shape
                continue
            with pytest.raises(RuntimeError):
                dense(x)
            with pytest.raises(RuntimeError):
                model[0](x)


def test_scales_with_gaps_are_read_right():
    layer = nn.Sequential(nn.Linear(64, 64)).eval()
    rpq.convert(layer, bits=4, grow=True, rules=[{"match": "*", "axis": "in", "dim": 4, "scales": "float32"}])
    weight = layer[0].weight_rpq
    with torch.no_grad():
        wide = torch.stack([weight.scales.data, torch.full((64,), 1e30)], 1)
        x, before = torch.randn(3, 64), layer(torch.ones(1, 64))
        weight.scales.data = wide[:, 0]
        assert torch.equal(layer(torch.ones(1, 64)), before)
        weight.scales.data = torch.ones(1).expand(64)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight(), layer[0].bias))


def test_load_state_dict_takes_no_codes_of_another_kind_and_no_positions_beyond(whole):
    model = rpq.load(whole, factory=build)
    state = model.state_dict()
    for key, make in (
        ("0.weight_rpq.codes", lambda t: t + 0.5),
        ("0.weight_rpq.codes", lambda t: t[:, :3]),
        ("3.weight_rpq.positions", lambda t: t + 64),
        ("3.weight_rpq.positions", lambda t: t.float() + 64),
    ):
        with pytest.raises(RuntimeError, match=re.escape(key)):
            model.load_state_dict({**state, key: make(state[key])})
    model.load_state_dict(state)


def test_copies_and_pickles_are_checked_and_work(whole):
    model, x = rpq.load(whole, factory=build), torch.randn(2, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin[0](x), model[0](x))
    weight = model[0].weight_rpq
    state = pickle.dumps(weight)
    put(lambda codes: codes[:, :3].clone())(weight)
    with pytest.raises(ValueError, match="codes"):
        pickle.loads(pickle.dumps(weight))
    again = pickle.loads(state)
    again.layout = None
    assert pickle.loads(pickle.dumps(again)).layout == pickle.loads(state).layout


def test_operators_check_what_they_are_given():
    weight = converted()[0].weight_rpq
    codes, books, layout, x = weight.stages_codes(), weight.codebooks, weight.layout, torch.randn(3, 64)
    call = torch.ops.rpq.linear
    good = (x, codes, books, None, None, layout.axis, layout.length)
    call(*good)
    for i, wrong in (
        (0, x[:, :3]),
        (1, codes.float()),
        (1, codes[:, :1]),
        (2, books[..., :3, :]),
        (3, torch.ones(3)),
        (4, torch.ones(3)),
        (6, 4096),
    ):
        with pytest.raises(ValueError, match="rpq"):
            call(*(wrong if j == i else v for j, v in enumerate(good)))
    with pytest.raises(ValueError, match="rpq"):
        torch.ops.rpq.decode(codes[:, :1], books, None, None, layout.axis, layout.length, torch.float32)


def test_a_stored_piece_that_does_not_fit_is_fitted_again(tmp_path, caplog):
    save_file(build().state_dict(), tmp_path / "dense.safetensors")
    kept = {}

    def stop(job, encoded):
        kept[job.name] = 1
        if len(kept) == 2:
            raise KeyboardInterrupt

    how = {"factory": build, "bits": 4, "grow": True, "executor": "serial"}
    with pytest.raises(KeyboardInterrupt):
        rpq.convert_checkpoint(tmp_path / "dense.safetensors", tmp_path / "out", progress=stop, **how)
    from safetensors import safe_open

    from rpq_convert.planning.plan import Plan
    from rpq_convert.storage.pieces import Pieces, sealed

    work = tmp_path / "out.partial"
    job = next(j for j in Plan.from_dict(json.loads((work / "rpq_plan.json").read_text())).jobs if j.name in kept)
    piece = Pieces(work).path(job)
    with safe_open(piece, "pt") as f:
        facts = f.metadata()["rpq"]
    whole, tensors = piece.read_bytes(), load_file(piece)
    codes = tensors["codes"]
    for broken in (
        {**tensors, "codes": codes.float()},
        {**tensors, "codes": codes[:, :1].contiguous()},
        {"codes": codes},
    ):
        for seal in (sealed(facts, broken), sealed(facts, tensors)):  # written so, and damaged since
            save_file(broken, piece, metadata={"rpq": facts, "sha256": seal})
            assert not Pieces(work).done(job) and not piece.exists()
            assert f"{piece} of {job.name} is damaged" in caplog.messages[-1]
    piece.write_bytes(whole[:100])
    rpq.convert_checkpoint(tmp_path / "dense.safetensors", tmp_path / "out", **how)
    assert len(caplog.messages) == 7 and "fitted again" in caplog.messages[-1]
    rpq.convert_checkpoint(tmp_path / "dense.safetensors", tmp_path / "at once", **how)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "at once")]
    assert weights[0] == weights[1]


# ---- code, pickles and links -------------------------------------------------------------------------------------------


def test_a_tokenizer_that_needs_code_is_refused_unasked(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    refused(tokenizer_of, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_image_processor_that_needs_code_is_refused_unasked(tmp_path, monkeypatch):
    from rpq_convert.inputs.files import read_inputs

    Image = pytest.importorskip("PIL.Image")
    model, pictures = tmp_path / "model", tmp_path / "pictures"
    model.mkdir(), pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    (model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    (model / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}})
    )
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    refused(read_inputs, pictures, model)
    assert not (tmp_path / "ran").exists()


def test_kernels_of_a_repository_are_refused(bert, tmp_path):
    folder = tmp_path / "crafted"
    (bert / MANIFEST).write_text(json.dumps({"files": {}}))
    crafted(bert, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "attn_implementation": "someone/kernels"}))
    refused(rpq.load, folder)


def test_every_call_that_could_run_code_of_a_checkpoint_says_no():
    found = 0
    for place in ("rpq_convert", "cli", "examples", "benchmarks"):
        for file in [*(ROOT / place).rglob("*.py"), *(ROOT / place).rglob("*.ipynb")]:
            text = file.read_text("utf8")
            for call in re.finditer(r"\b(?:Auto\w+|reader|type\(converted\))\.from_pretrained\(([^\n]*)", text):
                if '">>>' in text[: call.start()] or ">>> " in text[: call.start()].rpartition("\n")[2]:
                    continue
                found += 1
                assert "trust_remote_code=False" in call[1], f"{file}: {call[0]}"
    assert found > 8


def test_an_index_that_names_pickles_needs_to_be_allowed(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.bin")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "weights.bin"}}))
    refused(open_folder, tmp_path)
    assert list(open_folder(tmp_path, allow_pickle=True)) == ["weight"]
    save_file({"b": torch.zeros(2)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"b": "b.safetensors", "weight": "weights.bin"}})
    )
    refused(open_folder, tmp_path)
    refused(open_folder, tmp_path, allow_pickle=True)


LINKS = (
    "config.json", "tokenizer.json", "README.md", "generation_config.json", "model.safetensors", "LICENSE", "vocab.txt",
    "rpq_report.json", "folder",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(whole, tmp_path, name):
    folder, outside = crafted(whole, tmp_path / "crafted"), tmp_path / "outside"
    if name == "folder":
        outside.mkdir()
    else:
        outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    for act in (
        lambda: rpq.load(folder, factory=build),
        lambda: rpq.verify(folder),
        lambda: rpq.audit(folder),
        lambda: rpq.restore_checkpoint(folder, tmp_path / "dense"),
        lambda: rpq.convert_checkpoint(folder, tmp_path / "out", factory=build, bits=4),
        lambda: rpq.push(folder, "me/model"),
        lambda: rpq.plan(folder, bits=4),
    ):
        refused(act)
    assert not (tmp_path / "dense").exists() and not (tmp_path / "out").exists()


def test_links_inside_and_those_of_the_hubs_cache_are_followed(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a").write_text("a")
    (inside / "b").symlink_to("a")
    refuse_links(inside)
    repository = tmp_path / "hub/models--me--model"
    snapshot, blobs = repository / "snapshots/abc", repository / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    refuse_links(snapshot)
    elsewhere = tmp_path / "hub/models--you--model/blobs"
    elsewhere.mkdir(parents=True)
    (elsewhere / "hash").write_text("{}")
    (snapshot / "other.json").symlink_to("../../../models--you--model/blobs/hash")
    refused(refuse_links, snapshot)
    (snapshot / "other.json").unlink()
    (blobs / "out").symlink_to(inside / "a")  # a blob that is itself a link out
    (snapshot / "other.json").symlink_to("../../blobs/out")
    refused(refuse_links, snapshot)
    fake = tmp_path / "mine"
    fake.mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/secret").write_text("{}")
    (fake / "config.json").symlink_to("../blobs/secret")
    refused(refuse_links, fake)
    circle = tmp_path / "circle"
    circle.mkdir()
    (circle / "a").symlink_to("b")
    (circle / "b").symlink_to("a")
    refused(refuse_links, circle)


# ---- what is shown -----------------------------------------------------------------------------------------------------

NASTY = "a\x1b[31m\x07\x9b\u202e\n|`<script>alert(1)</script>[x](javascript:y)"


def report():
    row = Row(NASTY, NASTY, (2, 2), "float32", "dense", NASTY, 16, other_bytes=16)
    formulas = tuple(Row(f"{c}cmd{i}", "L", (2, 2), "float32", "dense", "x", 16) for i, c in enumerate("=+-@\t\r"))
    entry = {"on": NASTY, "kind": "k", "samples": 1, "metrics": {NASTY: 1.0}}
    return Report(NASTY, (row, *formulas), (FileRow(NASTY, 1),), (NASTY,), evaluations=(entry,))


def test_reports_show_what_files_say_and_nothing_more():
    made = report()
    for text in (made.to_terminal(), made.to_markdown(), made.to_html()):
        assert not [c for c in "\x1b\x07\x9b\u202e" if c in text]
        assert "\\x1b" in text
    for text in (made.to_markdown(), made.to_html()):
        assert "<script>alert" not in text
    table = [line for line in made.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 7 and len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    cells = [cell for line in csv.reader(io.StringIO(made.to_csv())) for cell in line[:6]]
    assert not [c for c in cells if c.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert "'=cmd0" in cells


def test_numbers_stay_numbers_and_plain_text_stays_plain():
    assert csv_cell(-3.5) == -3.5 and csv_cell("-x") == "'-x" and csv_cell("x-") == "x-"
    assert printable("größe µ 模型 👩‍💻") == "größe µ 模型 👩‍💻"
    assert printable("a\nb") == "a\\nb" and printable("a\nb\r", lines=True) == "a\nb\\r"
    assert one_line(" a\n  b\x1b ") == "a b\\x1b"
    assert markdown_code("a|b") == "`a\\|b`" and markdown_code("a`b") == "a\\`b" and markdown_text("<b>") == "&lt;b&gt;"


@pytest.mark.parametrize("field", ["shape", "dense_bytes", "name", "error"])
def test_a_report_with_fields_of_other_types_is_refused(whole, tmp_path, field):
    folder = crafted(whole, tmp_path / "crafted")
    found = json.loads((folder / "rpq_report.json").read_text())
    found["rows"][0][field] = ["<script>"]
    (folder / "rpq_report.json").write_text(json.dumps(found))
    refused(rpq.audit, folder)


def test_errors_show_no_escape_codes(whole, tmp_path):
    folder = crafted(whole, tmp_path / "crafted", None, added("x\x1b[2J\n\u202e", torch.zeros(1)))
    refused(rpq.load, folder, factory=build)
    result = CliRunner().invoke(
        group, ["eval", str(folder), str(folder), "--inputs", str(folder / WEIGHTS), "--factory", "tests.none:x\x1b[2J"]
    )
    assert "\x1b" not in result.stderr


# ---- kernels -----------------------------------------------------------------------------------------------------------


def program(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )


# One of five weights meets every kind of codebook, number of stages and of books; `make test-slow` takes all.
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("side, axis", often(itertools.product(("back", "front"), ("in", "out")), {("back", "in")}))
def test_no_kernel_touches_the_page_beside_its_tensors(side, axis, every):
    done = program(SUPPORT / "guarded.py", side, axis, str(every))
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert int(done.stdout.split()[-2]) > 300 // every


@pytest.mark.slow
def test_random_descriptions_end_in_errors_and_never_in_a_signal(tmp_path):
    seconds = os.environ.get("RPQ_FUZZ_SECONDS", "120")
    done = program(SUPPORT / "fuzz_safety.py", tmp_path, seconds)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    print(done.stdout.splitlines()[-1])
