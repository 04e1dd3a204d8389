"""Keywords of the public functions: the right one is named, help and type checkers see them all, values come as people have them."""

import inspect
import os
import subprocess
import sys
import typing

import pytest
import torch
from paths import ROOT
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import FolderError
from rpq_convert.planning.options import PlanKeywords, PlanOptions
from rpq_convert.planning.rules import Rule
from rpq_convert.storage.options import HubKeywords, HubOptions, SourceKeywords, SourceOptions
from rpq_convert.tuning.options import BlockKeywords, TuneKeywords, TuneOptions


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 64))


def coded(**options):
    return {job.name for job in rpq.plan(net(), bits=8, **options).jobs}


@pytest.mark.parametrize(
    ("function", "wrong", "right"),
    [
        (rpq.convert, "bit", "bits"),
        (rpq.convert, "nbits", "bits"),
        (rpq.convert, "calibrate", "calibration"),
        (rpq.convert, "exector", "executor"),
        (rpq.plan, "codebook", "codebooks"),
        (rpq.plan, "allow_pickles", "allow_pickle"),
        (rpq.sweep, "point", "points"),
        (rpq.convert_checkpoint, "overwite", "overwrite"),
        (rpq.convert_checkpoint, "factry", "factory"),
        (rpq.load, "devise", "device"),
        (rpq.save, "max_shard", "max_shard_size"),
        (rpq.evaluate, "windows", "window"),
        (rpq.tune, "lr", "rate"),
        (rpq.tune_blocks, "step", "steps"),
        (rpq.recalibrate, "worker", "workers"),
        (rpq.restore_checkpoint, "overwrit", "overwrite"),
        (rpq.sensitivities, "seeds", "seed"),
        (rpq.own_inputs, "sample", "samples"),
        (rpq.audit, "revison", "revision"),
        (rpq.push, "privat", "private"),
        (rpq.RPQConfig, "bit", "bits"),
    ],
)
def test_a_wrong_keyword_names_the_right_one(function, wrong, right):
    with pytest.raises(TypeError, match=f"{function.__name__} has no option '{wrong}'; did you mean '{right}'?"):
        function(**{wrong: 1})


def test_what_is_near_to_nothing_lists_all_and_what_stands_in_no_place_is_told():
    model = net()
    with pytest.raises(TypeError, match=r"convert has no option 'xyzzy'; it has model, .*bits.*rules"):
        rpq.convert(model, xyzzy=1)
    with pytest.raises(TypeError, match="convert takes model, then keywords such as bits=4, not 4"):
        rpq.convert(model, 4)
    with pytest.raises(TypeError, match=r"'weights' is no module; convert_checkpoint\(src, out\)"):
        rpq.convert("weights", bits=4)
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "4bits"}, "unknown preset '4bits'; did you mean '4bit'\\?; presets: 1bit, 2bit"),
        ({"preset": 4}, "preset must be a name or the path of a .toml file, not 4"),
        ({"axis": "output"}, "axis must be out or in, not 'output'"),
        ({"axis": "outt"}, "did you mean 'out'"),
        ({"fit": "kmean"}, "fit must be kmeans, additive, ecvq or random, not 'kmean'; did you mean 'kmeans'"),
        ({"dtype": "fp16"}, "dtype must be float32, float16 or bfloat16, not 'fp16'; did you mean 'float16'"),
        ({"dtype": torch.int8}, "dtype must be float32, float16 or bfloat16, not 'int8'"),
        ({"rules": "*:scales=float31"}, "rule '\\*': scales must be .* or none, not 'float31'; did you mean 'float32'"),
        ({"rules": {"match": "*", "codebook_dtype": "half"}}, "codebook_dtype must be float32"),
        ({"rules": "*:bit=4"}, "sets bit; did you mean 'bits'"),
        ({"rules": "bits=4"}, "is not PATTERN:key=value"),
        ({"rules": {"*": 4}}, "give '\\*' settings"),
    ],
)
def test_a_wrong_word_lists_the_choices(options, said):
    for ask in (lambda **o: rpq.plan(net(), **o), rpq.RPQConfig):
        with pytest.raises(rpq.PlanError, match=said):
            ask(**options)


def test_a_wrong_executor_lists_the_choices():
    with pytest.raises(ValueError, match="executor must be serial, threads, processes or ray, not 'thread'"):
        rpq.convert(net(), bits=4, executor="thread")


def test_patterns_rules_and_dtypes_as_people_have_them():
    assert coded(include="1") == coded(include=["1"]) == {"1.weight"}
    assert coded(exclude="type:Embedding") == coded(exclude=("type:Embedding",)) == {"1.weight"}
    ways = (
        "type:Linear:bits=4,scales=float32",
        ["type:Linear:bits=4,scales=float32"],
        {"match": "type:Linear", "bits": 4, "scales": torch.float32},
        {"type:Linear": {"bits": 4, "scales": "torch.float32"}},
        [Rule("type:Linear", {"bits": 4, "scales": "float32"})],
    )
    plans = [rpq.plan(net(), bits=8, rules=rules) for rules in ways]
    assert len({p.to_json() for p in plans}) == 1 and {j.spec.dim for j in plans[0].jobs} == {1, 2}
    halves = [rpq.plan(net(), bits=8, dtype=dtype) for dtype in ("float16", "torch.float16", torch.float16, torch.half)]
    assert len({p.to_json() for p in halves}) == 1 and halves[0].options["dtype"] == "float16"
    config = rpq.RPQConfig(bits=4, dtype=torch.bfloat16, include="*", rules="type:Embedding:bits=8")
    assert config.to_dict()["dtype"] == "bfloat16" and config.to_dict()["include"] == ["*"]
    assert rpq.RPQConfig.from_dict(config.to_dict()).options == config.options
    assert TuneOptions(autocast=torch.bfloat16) == TuneOptions(autocast="bfloat16")


def test_a_converted_model_is_refused_and_the_rest_of_one_is_not():
    model = net()
    rpq.convert(model, bits=8, include="1")
    assert any("1 weights are codes already" in w for w in rpq.convert(model, bits=8).warnings)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(rpq.PlanError, match=r"Sequential is converted already: 2 weights are codes.*rpq.restore"):
        rpq.convert(model, bits=2)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert rpq.convert(rpq.restore(model), bits=2).covered > 0.9


def test_errors_advise_what_python_takes(tmp_path):
    model = net()
    rpq.convert(model, bits=8)
    rpq.save(model, tmp_path / "a")
    with pytest.raises(FolderError, match="pass overwrite=True"):
        rpq.save(model, tmp_path / "a")
    (tmp_path / "bin").mkdir()
    torch.save({}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(rpq.SourceError, match="allow_pickle=True"):
        rpq.plan(tmp_path / "bin", factory=net, bits=4)


def test_help_and_completion_see_every_option():
    shown = inspect.signature(rpq.convert).parameters
    assert {"model", "bits", "preset", "rules", "calibration"} <= set(shown) and "options" not in shown
    assert shown["bits"].default is None and shown["seed"].default == 0
    assert "bits: Code bits per weight" in inspect.getdoc(rpq.convert)
    assert (
        "factory" in inspect.signature(rpq.load).parameters
        and "loss" not in inspect.signature(rpq.tune_blocks).parameters
    )
    assert "bits" in inspect.signature(rpq.RPQConfig).parameters


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (PlanKeywords, PlanOptions),
        (HubKeywords, HubOptions),
        (SourceKeywords, SourceOptions),
        (TuneKeywords, TuneOptions),
    ],
)
def test_type_checkers_see_the_fields_of_the_options(names, options):
    assert set(typing.get_type_hints(names, localns={"torch": torch})) == set(options.__dataclass_fields__)


def test_every_public_name_is_declared_for_type_checkers():
    source = (ROOT / "rpq_convert" / "__init__.py").read_text("utf8")
    declared = {line.partition(" as ")[2] for line in source.splitlines() if line.startswith("    from rpq_convert.")}
    assert declared == set(rpq._HOMES) and set(BlockKeywords.__annotations__) < set(TuneOptions.__dataclass_fields__)


@pytest.mark.slow
def test_a_users_type_checker_finds_wrong_keywords(tmp_path):
    (tmp_path / "user.py").write_text(
        "import rpq_convert as rpq\nfrom torch import nn\n"
        "rpq.convert(nn.Linear(4, 4), bits=4, include='x', rules='a:bits=2')\nrpq.convert(nn.Linear(4, 4), bit=4)\n"
        "rpq.plan('x', bits='four')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--follow-imports=silent", str(tmp_path / "user.py")],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert [line.split(":")[1] for line in done.stdout.splitlines() if "error" in line and "user.py" in line] == [
        "4",
        "5",
    ]
