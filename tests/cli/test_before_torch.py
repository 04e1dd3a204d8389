"""What can be said without torch is said without it: each command in a process that never imports it.

All commands run in one fresh process, one after another; after each it is asked whether anything slow was imported.
"""

import gzip
import json
import os
import subprocess
import sys

import pytest
import torch
import typer
from paths import SUPPORT
from rpq_convert.cli import group
from safetensors.torch import save_file

import rpq_convert as rpq

RUN = """
import json, os, sys
from typer.testing import CliRunner
from rpq_convert.cli import group

found, slow = [], {"torch", "transformers", "numba", "safetensors", "datasets", "huggingface_hub"}
for arguments in json.load(open(sys.argv[1])):
    before = set(sys.modules)
    done = CliRunner().invoke(group, arguments, env={"COLUMNS": "400", "NO_COLOR": "1"})
    bug = done.exception if done.exception and not isinstance(done.exception, SystemExit) else None
    found.append([done.exit_code, done.stdout, done.stderr, repr(bug) if bug else "", sorted(slow & (set(sys.modules) - before))])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of a user: a model, its converted folder, data of every kind, and factories."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
    dense = folder / "my-model"
    dense.mkdir()
    save_file(model.state_dict(), dense / "model.safetensors", {"format": "pt"})
    (dense / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (dense / "tokenizer.json").write_text("{}")
    save_file(model.state_dict(), folder / "net.safetensors")
    rpq.convert(model, bits=4, grow=True)
    rpq.save(model, folder / "my-model-rpq")
    (folder / "text.txt").write_text("a few words\nand more\n")
    (folder / "blank.txt").write_text("")
    (folder / "rows.jsonl").write_text('{"text": "a few words"}\n{"text": "and more"}\n')
    (folder / "table.csv").write_text("title,body\none,two words\n")
    (folder / "pairs.csv").write_text("a,b,not a number\nc,d,nor this\n")
    (folder / "packed.txt.gz").write_bytes(gzip.compress(b"words"))
    (folder / "binary.dat").write_bytes(b"\x00\x01" * 99)
    save_file({"x": torch.zeros(2, 64)}, folder / "inputs.safetensors")
    save_file({"x": torch.zeros(2, 64)}, folder / "cut.safetensors")
    whole = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-8])
    (folder / "sens.json").write_text('{"0.weight": "high"}')
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("words")
    (folder / "about").mkdir()
    (folder / "about" / "README.md").write_text("what this is")
    (folder / "empty").mkdir()
    (folder / "nets.py").write_text(
        "import torch\n\ndef build():\n    return 3\n\ndef sized(width, depth=2):\n    return 3\n"
    )
    return folder


MODEL, SMALL = "my-model", "my-model-rpq"
CONVERT = ("convert", MODEL, "--out", "out")
TUNE = ("tune", MODEL, SMALL, "--out", "out")
REFUSED = [  # arguments, exit code, what is said
    # sizes, presets, rules, sensitivities
    (("plan", MODEL, "--target-size", "fifty"), 3, "size 'fifty' is not a number with an optional unit"),
    ((*CONVERT, "--target-size", "fifty"), 3, "size 'fifty'"),
    ((*CONVERT, "--max-shard-size", "big"), 3, "size 'big'"),
    ((*CONVERT, "--target-size", "-5MB"), 3, "must be positive"),
    ((*CONVERT, "--bits", "9"), 3, "bits must be a number between 0.05 and 8"),
    ((*CONVERT, "--preset", "9bit"), 3, "unknown preset '9bit'; did you mean '8bit'?"),
    ((*CONVERT, "--preset", "mine.toml"), 3, "preset file mine.toml does not exist"),
    ((*CONVERT, "--rule", "*:colour=red"), 3, "sets colour"),
    ((*CONVERT, "--rule", "re:(:bits=3"), 3, "is no regular expression"),
    ((*CONVERT, "--rule", "*.fc1"), 2, "is not PATTERN:key=value"),
    ((*CONVERT, "--codebooks", "many"), 3, "codebooks must be 'heads' or a number"),
    ((*CONVERT, "--target-size", "1MB", "--sensitivity", "sense.json"), 3, "is no file, nor 'shape' or 'measured'; did you mean sens.json?"),
    ((*CONVERT, "--target-size", "1MB", "--sensitivity", "sens.json"), 3, "sens.json"),
    ((*CONVERT, "--reproducible", "--calibrate", "text.txt"), 3, "reproducible serves fits to weights alone"),
    ((*CONVERT, "--reproducible", "--effort", "good"), 3, "leave one of them out"),
    (("plan", MODEL, "--reproducible", "--target-size", "1MB"), 3, "reproducible needs sensitivities that are given"),
    # sources and outputs
    (("plan", "my-modle", "--bits", "4"), 4, "my-modle does not exist; did you mean my-model?"),
    (("convert", "./my-modle"), 4, "./my-modle does not exist; did you mean my-model?"),
    (("convert", "my-modle/"), 4, "does not exist; did you mean my-model?"),
    (("convert", "nothing.safetensors"), 4, "nothing.safetensors does not exist"),
    (("convert", SMALL, "--out", "out"), 4, "is a converted folder, quantized already (rpq)"),
    (("convert", "cut.safetensors", "--out", "out"), 4, "truncated, 8 bytes are missing"),
    (("convert", MODEL, "--out", SMALL), 4, "my-model-rpq already exists; choose another folder or pass --overwrite"),
    (("convert", MODEL, "--out", "text.txt"), 4, "text.txt is a file; choose another folder"),
    (("convert", MODEL, "--out", "text.txt/out"), 4, "cannot be made: "),
    (("convert", MODEL, "--out", "my-model/small"), 2, "would lie in the source my-model"),
    (("convert", MODEL, "--out", MODEL, "--overwrite"), 2, "is or holds the source"),
    (("plan", MODEL, "--revision", "v2"), 4, "is a local path, so it has no revision 'v2'"),
    # addresses
    (("plan", "s3://key:secret@bucket/model", "--bits", "4"), 4, "this s3:// address holds a password"),
    (("audit", "zip::s3://bucket/model.zip"), 4, "is a chain of file systems"),
    (("plan", "s3://bucket/model", "--revision", "v2"), 4, "s3://bucket/model is no repository of the hub, so it has no revision"),
    (("plan", "s3://bucket/model", "--token", "x"), 2, "--token: it would do nothing: s3://bucket/model is no repository of the hub"),
    ((*CONVERT[:2], "--out", "hf://me/small"), 4, "hf://me/small is a repository of the hub; write a folder and push it"),
    (("restore", SMALL, "https://host/dense"), 4, "https://host/dense cannot be written to"),
    (("push", SMALL, "s3://bucket/small", "--public"), 2, "--public: it would do nothing: s3://bucket/small is no repository of the hub"),
    ((*CONVERT, "--address", "head:6379"), 3, "address names a Ray cluster, so it would do nothing without"),
    (("plan", MODEL, "--sweep-out", "curve.png"), 4, "curve.png is written as SVG; give a name that ends in .svg"),
    (("plan", MODEL, "--sweep-out", "plots/curve.svg"), 4, "plots does not exist"),
    (("audit", SMALL, "--format", "html", "--output", "nowhere/a.html"), 4, "nowhere does not exist"),
    (("audit", SMALL, "--output", "texts"), 4, "texts is a folder; give the name of a file"),
    # data
    ((*CONVERT, "--calibrate", "txt.txt"), 4, "txt.txt does not exist; did you mean text.txt?"),
    ((*CONVERT, "--calibrate", "blank.txt"), 4, "blank.txt is empty"),
    ((*CONVERT, "--calibrate", "binary.dat"), 4, "binary.dat is no text"),
    ((*CONVERT, "--calibrate", "table.csv", "--text-field", "words"), 4, "has no field 'words'; it has title, body"),
    ((*CONVERT, "--calibrate", "text.txt", "--text-field", "words"), 4, "is no table, so it has no column 'words'"),
    ((*CONVERT, "--calibrate", MODEL), 4, "my-model is a model's folder, not data"),
    ((*CONVERT, "--calibrate", SMALL), 4, "my-model-rpq is a model's folder, not data"),
    ((*CONVERT, "--calibrate", "my-model/model.safetensors"), 4, "is the weights of a model, not data"),
    ((*CONVERT, "--calibrate", "cut.safetensors"), 4, "truncated"),
    ((*CONVERT, "--calibrate", "empty"), 4, "empty is an empty folder"),
    ((*CONVERT, "--calibrate", "about"), 4, "about holds neither texts"),
    (("eval", MODEL, SMALL, "--text", "tests.txt"), 4, "tests.txt does not exist; did you mean text.txt?"),
    (("eval", MODEL, SMALL, "--text", MODEL), 4, "my-model is a model's folder, not data"),
    (("eval", MODEL, SMALL, "--text", "inputs.safetensors"), 4, "holds tensors, no text; give it as --inputs"),
    (("eval", MODEL, SMALL, "--inputs", "text.txt"), 4, "is neither tensors (.safetensors) nor pictures"),
    (("eval", MODEL, SMALL, "--pairs", "pears.csv"), 4, "pears.csv does not exist; did you mean pairs.csv?"),
    (("eval", MODEL, SMALL, "--pairs", "pairs.csv"), 4, "pairs.csv, line 2: not sentence, sentence, score"),
    (("eval", MODEL, SMALL), 2, "give one of --text, --pairs, --inputs and --tasks"),
    ((*TUNE, "--data", "txt.txt"), 4, "txt.txt does not exist; did you mean text.txt?"),
    (("recalibrate", MODEL, SMALL, "--out", "out", "--data", "txt.txt"), 4, "did you mean text.txt?"),
    (("tune", MODEL, SMALL, "--data", "text.txt", "--out", SMALL), 4, "already exists"),
    (("tune", MODEL, SMALL, "--data", "text.txt", "--out", MODEL, "--overwrite"), 2, "is or holds the source"),
    # folders that are not what they should be
    (("verify", MODEL), 4, "is not an RPQ checkpoint: its config.json has no quantization_config of method rpq; convert it first"),
    (("verify", "my-model-rpc"), 4, "my-model-rpc does not exist; did you mean my-model-rpq?"),
    (("verify", SMALL, "--all"), 2, "give --against as well, or leave it out"),
    (("verify", SMALL, "--quick", "--against", MODEL), 2, "--against reads weights; leave one out"),
    (("convert", MODEL, "--time-limit", "soon"), 3, "'soon' is no time; give one such as 90s, 30min, 2h or 1h30m"),
    (("verify", "my-model-rpq/model.safetensors"), 4, "is a file of a converted folder; give the folder my-model-rpq"),
    (("audit", MODEL), 4, "is not an RPQ checkpoint"),
    (("restore", MODEL, "out"), 4, "is not an RPQ checkpoint"),
    (("restore", SMALL, "text.txt"), 4, "text.txt is a file"),
    (("push", MODEL, "me/x"), 4, "is not an RPQ checkpoint"),
    (("serve", MODEL), 4, "is not an RPQ checkpoint"),
    (("eval", MODEL, MODEL, "--text", "text.txt"), 4, "is not an RPQ checkpoint"),
    (("eval", SMALL, SMALL, "--text", "text.txt"), 4, "is a converted folder, quantized already (rpq)"),
    # factories
    (("plan", "net.safetensors", "--factory", "nets"), 4, "names no function of a module; write it as package.module:function"),
    (("plan", "net.safetensors", "--factory", "nets.py"), 4, "names no function; write it as"),
    (("plan", "net.safetensors", "--factory", "nest:build"), 4, "no module 'nest'"),
    (("plan", "net.safetensors", "--factory", "nest.py:build"), 4, "nest.py does not exist; did you mean nets.py?"),
    (("plan", "net.safetensors", "--factory", "nets:biuld"), 4, "has no 'biuld'; did you mean 'build'?"),
    (("plan", "net.safetensors", "--factory", "nets.biuld"), 4, "did you mean 'build'?"),
    (("plan", "net.safetensors", "--factory", "nets.py:biuld"), 4, "did you mean 'build'?"),
    (("plan", "net.safetensors", "--factory", "nets.py:sized"), 4, "needs arguments (width)"),
    (("convert", "net.safetensors", "--factory", "nets:build", "--calibrate", "text.txt"), 2, "a factory's model has no tokenizer"),
    # options that would do nothing
    ((*CONVERT, "--dim", "4", "--bits", "4"), 3, "give one of bits, dim, not several: each decides the sizes"),
    ((*CONVERT, "--dim", "4", "--preset", "4bit"), 3, "give one of preset, dim"),
    ((*CONVERT, "--dim", "4", "--codebooks", "heads"), 3, "give one of codebooks, dim"),
    ((*CONVERT, "--bits", "4", "--target-size", "1MB"), 3, "give one of bits, target_size"),
    ((*CONVERT, "--bits", "4", "--max-error", "0.1"), 3, "give one of bits, max_error"),
    ((*CONVERT, "--preset", "4bit", "--sensitivity", "shape"), 3, "sensitivity serves a target_size or an average of bits"),
    ((*CONVERT, "--max-error", "0.1", "--sensitivity", "shape"), 3, "sensitivity serves a target_size"),
    ((*CONVERT, "--max-error", "0.1", "--fit", "random"), 3, "max_error is of a fit"),
    ((*CONVERT, "--calibrate", "text.txt", "--fit", "random"), 3, "calibration serves a fit"),
    ((*CONVERT, "--calibrate", "self", "--fit", "random"), 3, "calibration serves a fit"),
    ((*CONVERT, "--samples", "9"), 2, "--samples: it would do nothing: give --calibrate as well"),
    ((*CONVERT, "--text-field", "body"), 2, "--text-field: it would do nothing"),
    ((*CONVERT, "--calibrate", "self", "--text-field", "body"), 2, "--text-field: it would do nothing"),
    ((*CONVERT, "--public"), 2, "--public: it would do nothing: give --push-to as well"),
    ((*CONVERT, "--executor", "serial", "--workers", "3"), 3, "the serial executor has one worker, not 3"),
    ((*CONVERT, "--state-dict", "ema"), 4, "state_dict chooses among those of a pickled file"),
    ((*CONVERT, "--token", "x"), 2, "--token: it would do nothing: my-model is a local path"),
    ((*CONVERT, "--device", "cuda"), 2, "fits run on the CPU in this version"),
    (("plan", MODEL, "--sweep", "--bits", "4"), 2, "the curve shows every size; leave out bits"),
    (("plan", MODEL, "--sweep", "--explain", "0.weight"), 2, "--explain: it would do nothing"),
    ((*CONVERT, "--no-check", "--check-seconds", "9"), 3, "check_seconds would do nothing without a check"),
    ((*CONVERT, "--no-check", "--check-data", "text.txt"), 3, "check_data would do nothing without a check"),
    ((*CONVERT, "--check-data", "txt.txt"), 4, "txt.txt does not exist; did you mean text.txt?"),
    (("plan", MODEL, "--dim", "4", "--preset", "4bit"), 3, "give one of preset, dim"),
    (("plan", MODEL, "--codebooks", "heads", "--max-error", "0.1"), 3, "give one of max_error, codebooks"),
    (("plan", MODEL, "--preset", "4bit", "--sensitivity", "shape"), 3, "sensitivity serves a target_size"),
    (("plan", MODEL, "--state-dict", "ema"), 4, "state_dict chooses among those of a pickled file"),
    (("plan", MODEL, "--token", "x"), 2, "--token: it would do nothing"),
    ((*CONVERT, "--revision", "x"), 4, "has no revision 'x'"),
    ((*TUNE, "--data", "text.txt", "--text-field", "words"), 4, "is no table, so it has no column 'words'"),
    (("audit", SMALL, "--token", "x"), 2, "--token: it would do nothing"),
    (("audit", SMALL, "--revision", "x"), 4, "has no revision 'x'"),
    (("audit", SMALL, "--json", "--format", "csv"), 2, "--json and --format csv contradict each other"),
    (("eval", MODEL, SMALL, "--inputs", "inputs.safetensors", "--text-field", "a"), 2, "--text-field: it would do nothing"),
    (("eval", MODEL, SMALL, "--inputs", "inputs.safetensors", "--window", "9"), 2, "--window: it would do nothing"),
    (("eval", MODEL, SMALL, "--pairs", "pairs.csv", "--text-field", "a"), 2, "--text-field: it would do nothing"),
    ((*TUNE, "--data", "inputs.safetensors", "--window", "9"), 2, "--window: it would do nothing"),
    ((*TUNE, "--data", "text.txt", "--steps", "0"), 2, "--steps: it would do nothing"),
    ((*TUNE, "--data", "text.txt", "--rate", "0"), 4, "rate must be more than 0"),
    (("recalibrate", MODEL, SMALL, "--out", "out", "--data", "self", "--text-field", "a"), 2, "--text-field: it would do nothing"),
    (("eval", MODEL, SMALL, "--text", "text.txt", "--include-path", "texts"), 2, "--include-path: it would do nothing"),
    *((given, 2, "--token: it would do nothing: my-model") for given in (
        ("eval", MODEL, SMALL, "--text", "text.txt", "--token", "x"), (*TUNE, "--data", "text.txt", "--token", "x"),
        ("recalibrate", MODEL, SMALL, "--out", "out", "--data", "self", "--token", "x"), ("restore", SMALL, "out", "--token", "x"),
        ("verify", SMALL, "--token", "x"), ("chat", SMALL, "--token", "x"), ("chat", SMALL, "--base", MODEL, "--token", "x"),
        ("diff", SMALL, SMALL, "--token", "x"))),
    *((given, 4, "has no revision 'x'") for given in (
        ("eval", MODEL, SMALL, "--text", "text.txt", "--revision", "x"), (*TUNE, "--data", "text.txt", "--revision", "x"),
        ("recalibrate", MODEL, SMALL, "--out", "out", "--data", "self", "--revision", "x"), ("restore", SMALL, "out", "--revision", "x"),
        ("verify", SMALL, "--revision", "x"), ("chat", SMALL, "--revision", "x"),
        ("diff", SMALL, SMALL, "--revision", "x"))),
]  # fmt: skip
ANSWERED = [  # arguments, what is on stdout
    (("--help",), "Usage"), *(((name, "--help"), "Examples") for name in (
        "convert", "plan", "audit", "diff", "eval", "tune", "recalibrate", "verify", "restore", "push", "serve", "presets", "env")),
    (("presets",), "5bit"), (("presets", "4bit"), "[settings]"), (("audit", SMALL), "converted"), (("audit", SMALL, "--json"), '"rows"'),
    (("audit", SMALL, "--format", "html"), "<table"), (("audit", SMALL, "--format", "csv"), "name,"), (("diff", SMALL, SMALL), "my-model-rpq"),
    (("verify", SMALL, "--quick"), "is whole: "), (("verify", SMALL, "--quick", "--json"), "model.safetensors"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(place):
    """What every command said, by its arguments."""
    commands = [list(arguments) for arguments, *_ in (*ANSWERED, *REFUSED)]
    (place / "commands.json").write_text(json.dumps(commands))
    before = sorted(p for p in place.rglob("*"))
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "commands.json"], capture_output=True, text=True, cwd=place, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p for p in sorted(place.rglob("*")) if "__pycache__" not in str(p)] == before  # nothing was written
    return {tuple(c): found for c, found in zip(commands, json.loads(done.stdout))}


@pytest.mark.parametrize("arguments, code, says", REFUSED, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_what_cannot_end_well_is_refused_at_once(arguments, code, says, outcomes):
    found, stdout, stderr, bug, slow = outcomes[arguments]
    assert not bug and not slow, (bug, slow)
    assert found == code and says in " ".join(stderr.replace("│", " ").split()) and stdout == "", (found, stderr)
    assert code == 2 or (stderr.startswith("error: ") and stderr.count("\n") == 1)


@pytest.mark.parametrize("arguments, says", ANSWERED, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_what_needs_no_weights_is_answered_at_once(arguments, says, outcomes):
    found, stdout, stderr, bug, slow = outcomes[arguments]
    assert (found, bug, slow) == (0, "", []) and says in stdout, (found, stdout[-500:], stderr, bug, slow)


# Options that act whatever else is given. Any other must be refused, in REFUSED above, where it would do nothing.
ALWAYS = {
    "--axis", "--fit", "--seed", "--rotation", "--outliers", "--grow", "--dtype", "--include", "--exclude", "--rule", "--max-shard-size",
    "--factory", "--out", "--calibrate", "--executor", "--dry-run", "--push-to", "--overwrite", "--json", "--quiet", "--sweep-out",
    "--allow-pickle", "--local-files-only",  # what they permit or forbid is so whether it comes to that or not
    "--output", "--inputs", "--windows", "--layers", "--save", "--data", "--loss", "--recompute", "--recode", "--blocks", "--bfloat16", "--quick",
    "--html", "--effort", "--check", "--version", "--verbose", "--log", "--storage", "--base", "--max-tokens", "--temperature", "--tasks",
    "--limit", "--max-memory", "--max-tensors", "--time-limit", "--check-source", "--against",
}  # fmt: skip
ALWAYS_IN = {("push", "--public"), ("push", "--revision"), ("push", "--token"), ("tune", "--samples"), ("eval", "--samples"),
             ("recalibrate", "--samples"), ("recalibrate", "--workers"), ("recalibrate", "--text"), ("tune", "--text")}  # fmt: skip


def test_every_option_acts_or_is_refused():
    refused = {(a[0], part) for a, *_ in REFUSED for part in a if part.startswith("--")}
    commands = typer.main.get_command(group).commands
    options = {
        (name, o)
        for name, c in commands.items()
        for p in c.params
        for o in p.opts
        if o.startswith("--") and o != "--help"
    }
    assert len(options) > 80
    unknown = sorted(f"{name} {o}" for name, o in options - refused - ALWAYS_IN if o not in ALWAYS)
    assert not unknown, f"say when these options act: {', '.join(unknown)}"
