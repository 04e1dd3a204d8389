"""The command line on real files: what it prints, what it writes, and how it fails."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as tf
from factories import deep, small
from rpq_convert.cli import group
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

VARYING = {"rpq_report.json", "README.md", "rpq_manifest.json"}  # they tell seconds
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "100", "NO_COLOR": "1"}


def rpq(*args, code=0):
    """Run one command in this process and check its exit code."""
    result = CliRunner().invoke(group, [str(a) for a in args], env={"COLUMNS": "100", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(code, *args, says):
    """Run a command that must end in one line on stderr and an exit code."""
    result = rpq(*args, code=code)
    line = result.stderr.strip().splitlines()[-1]
    for text in (says,) if isinstance(says, str) else says:
        assert text in line, line
    assert line.startswith("error: ") and "Traceback" not in result.output
    return result


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fixed(folder):
    return {name: data for name, data in tree(folder).items() if name not in VARYING}


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    tf.BertModel(config).save_pretrained(folder, max_shard_size="150KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def copy(bert, tmp_path):
    """A copy of the checkpoint, to break."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A weight file without a config, and its factory within reach."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    torch.manual_seed(0)
    save_file(small().state_dict(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


# ---- results -----------------------------------------------------------------------------------------------------------


def test_help_tells_examples_and_exit_codes():
    for args in (["--help"], ["convert", "--help"], ["plan", "--help"], ["audit", "--help"]):
        text = rpq(*args).stdout
        assert "Examples:" in text and "130 interrupted" in text
    assert "rpq-convert facebook/opt-66b --codebooks heads" in rpq("convert", "--help").stdout


def test_help_waits_for_no_torch():
    code = "import sys, rpq_convert.cli; print({'torch', 'transformers', 'numba'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    command = [sys.executable, "-c", "from rpq_convert.cli import group; group(['--help'])"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5  # 0.3 s alone; machines are shared


def test_the_whole_way(bert, tmp_path):
    before = tree(bert)
    out, dense = tmp_path / "out", tmp_path / "dense"
    dry = rpq("convert", bert, "--out", out, "--bits", 4, "--dry-run", "--json")
    assert not list(tmp_path.iterdir()) and tree(bert) == before
    predicted = json.loads(dry.stdout)["predicted_bytes"]

    done = rpq("convert", bert, "--out", out, "--bits", 4)
    assert "[1/" in done.stderr and "wrote" in done.stderr and "embeddings" in done.stdout
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) == predicted
    assert (out / "tokenizer.json").is_file() and not out.with_name("out.partial").exists()
    assert "is whole" in rpq("verify", out).stdout
    assert json.loads(rpq("verify", out, "--json").stdout)["files"]

    restored = rpq("restore", out, dense)
    assert "bytes of dense weights" in restored.stdout
    model = tf.AutoModel.from_pretrained(dense)
    assert model.encoder.layer[0].attention.self.query.weight.shape == (64, 64)


def test_json_is_all_of_stdout_and_quiet_says_nothing(bert, tmp_path):
    result = rpq("convert", bert, "--out", tmp_path / "a", "--bits", 8, "--json", "--quiet")
    report = json.loads(result.stdout)
    assert result.stderr == "" and report["rows"]
    assert json.loads(rpq("audit", tmp_path / "a", "--json").stdout)["rows"] == report["rows"]


def test_plan_and_explain(bert, tmp_path):
    assert "embeddings.word_embeddings" in rpq("plan", bert, "--bits", 2).stdout
    plan = json.loads(rpq("plan", bert, "--bits", 2, "--json").stdout)
    assert any(j["name"] == "embeddings.word_embeddings.weight" for j in plan["jobs"])
    text = rpq("plan", bert, "--bits", 2, "--explain", "encoder.layer.0.output.dense").stdout
    assert "64 x 128" in text or "128 x 64" in text
    tf.OPTConfig(hidden_size=1024, num_attention_heads=8, num_hidden_layers=2, ffn_dim=2048).save_pretrained(tmp_path)
    heads = rpq("plan", tmp_path, "--codebooks", "heads")  # a config is all that a plan needs
    assert "warning: 0.062 code bits per weight" in heads.stderr and "--preset" in heads.stderr
    fails(3, "plan", bert, "--explain", "nothing.here", says="nothing.here")


def test_audit_in_every_format_and_diff(bert, tmp_path):
    rpq("convert", bert, "--out", tmp_path / "a", "--bits", 8, "-q")
    rpq("convert", bert, "--out", tmp_path / "b", "--bits", 4, "-q")
    marks = {"terminal": "dense", "json": "{", "markdown": "|---", "csv": "name,", "html": "<table"}
    for kind, mark in marks.items():
        assert mark in rpq("audit", tmp_path / "a", "--format", kind).stdout
    rpq("audit", tmp_path / "a", "--format", "html", "--output", tmp_path / "audit.html")
    assert "<table" in (tmp_path / "audit.html").read_text()
    assert "encoder.layer.0.output.dense.weight" in rpq("diff", tmp_path / "a", tmp_path / "b").stdout


def test_presets_and_env(bert, tmp_path):
    assert "8bit" in rpq("presets").stdout
    own = tmp_path / "own.toml"
    own.write_text(rpq("presets", "4bit").stdout)
    a = json.loads(rpq("plan", bert, "--preset", own, "--json").stdout)
    b = json.loads(rpq("plan", bert, "--preset", "4bit", "--json").stdout)
    assert [j["spec"] for j in a["jobs"]] == [j["spec"] for j in b["jobs"]]
    assert torch.__version__.startswith(json.loads(rpq("env", "--json").stdout)["torch"])
    assert "torchvision" in rpq("env").stdout


def test_rules_shards_dtype_and_executors(bert, tmp_path):
    options = (
        "--bits", 4, "--rule", "type:Embedding:bits=8", "--rule", "*.query:skip", "--exclude", "pooler*", "--dtype",
        "bfloat16", "--max-shard-size", "40KB", "--seed", 3,
    )  # fmt: skip
    rpq("convert", bert, "--out", tmp_path / "threads", *options, "--workers", 2, "-q")
    names = {"dtype", "shape", "decision", "reason", "spec"}
    rows = {r["name"]: r for r in json.loads(rpq("audit", tmp_path / "threads", "--json").stdout)["rows"]}
    assert names <= set(rows["pooler.dense.weight"])
    assert "dim 1" in rows["embeddings.word_embeddings.weight"]["spec"]
    assert rows["encoder.layer.0.attention.self.query.weight"]["decision"] == "dense"
    assert rows["pooler.dense.weight"]["reason"] == "excluded"
    assert rows["encoder.layer.0.output.LayerNorm.weight"]["dtype"] == "bfloat16"
    assert len(list((tmp_path / "threads").glob("*.safetensors"))) > 2
    for executor in ("serial", "processes"):
        rpq("convert", bert, "--out", tmp_path / executor, *options, "--workers", 2, "--executor", executor, "-q")
        assert fixed(tmp_path / executor) == fixed(tmp_path / "threads")
    rpq("convert", bert, "--out", tmp_path / "other", *options[:-1], 4, "-q")
    assert fixed(tmp_path / "other") != fixed(tmp_path / "threads")


def test_a_factory_builds_what_is_not_transformers(bare, tmp_path):
    rpq("convert", bare, "--factory", "factories:small", "--out", tmp_path / "out", "--bits", 4, "-q")
    assert "0.weight_rpq.codes" in load_file(tmp_path / "out" / "model.safetensors")
    guessed = rpq("plan", bare)
    assert "guesses" in guessed.stderr
    fails(4, "convert", bare, "--out", tmp_path / "no", says="--factory")
    fails(4, "convert", bare, "--factory", "nowhere:small", "--out", tmp_path / "no", says="nowhere")
    fails(4, "convert", bare, "--factory", "factories:deep", "--out", tmp_path / "no", says="does not fit")
    assert not (tmp_path / "no").exists()


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_usage_errors_are_exit_code_2(bert, tmp_path):
    rpq("convert", code=2)
    rpq("convert", bert, "--bits", "many", code=2)
    rpq("convert", bert, "--rule", "nonsense", code=2)
    rpq("convert", bert, "--out", bert, "--overwrite", code=2)
    assert (bert / "config.json").is_file()


def test_missing_and_wrong_sources(tmp_path):
    fails(4, "convert", tmp_path / "nothing", says="does not exist")
    (tmp_path / "empty").mkdir()
    fails(4, "convert", tmp_path / "empty", says="no weights")
    (tmp_path / "text.safetensors").write_text("no tensors, just words")
    fails(4, "plan", tmp_path / "text.safetensors", says="no safetensors file")


def test_truncated_shard(copy, tmp_path):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    fails(4, "convert", copy, "--out", tmp_path / "out", says=(shard.name, "truncated"))
    assert not (tmp_path / "out").exists()


def test_index_that_disagrees_or_leaves_the_folder(copy, tmp_path):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names, files = list(index["weight_map"]), sorted(set(index["weight_map"].values()))
    moved = {**index["weight_map"], names[0]: next(f for f in files if f != index["weight_map"][names[0]])}
    path.write_text(json.dumps({**index, "weight_map": moved}))
    fails(4, "convert", copy, "--out", tmp_path / "out", says=(names[0], "index"))
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], names[0]: "../../secret.safetensors"}}))
    fails(4, "convert", copy, "--out", tmp_path / "out", says=("leaves the folder", "../../secret"))
    path.write_text("{")
    fails(4, "convert", copy, "--out", tmp_path / "out", says="no index")
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_by_the_tensors_name(copy, tmp_path):
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        if "encoder.layer.1.output.dense.weight" in tensors:
            tensors["encoder.layer.1.output.dense.weight"][3, 5] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
    fails(4, "convert", copy, "--out", tmp_path / "out", says=("encoder.layer.1.output.dense.weight", "NaN"))
    assert not (tmp_path / "out").exists()


def test_plan_errors(bert, tmp_path):
    out = ("--out", tmp_path / "out")
    fails(3, "convert", bert, *out, "--preset", "9bit", says=("9bit", "8bit"))
    fails(3, "convert", bert, *out, "--rule", "*.fc9:bits=2", says=("*.fc9", "no parameter matches"))
    fails(3, "convert", bert, *out, "--exclude", "lm_head", says="lm_head")
    fails(3, "convert", bert, *out, "--codebooks", 7, says=("7 codebooks do not divide", "try"))
    fails(3, "convert", bert, *out, "--bits", 4, "--preset", "4bit", says="give one of")
    fails(3, "convert", bert, *out, "--bits", 20, says="between 0.05 and 8")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_existing_folder_is_never_touched_unasked(bert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    fails(4, "convert", bert, "--out", out, "--bits", 8, says=("exists", "--overwrite"))
    assert tree(out) == {"thesis.txt": b"years of work"}
    rpq("convert", bert, "--out", out, "--bits", 8, "--overwrite", "-q")
    assert not (out / "thesis.txt").exists()
    rpq("verify", out)


def test_pickles_remote_code_and_quantized_checkpoints(copy, tmp_path):
    state = {k: v for shard in copy.glob("*.safetensors") for k, v in load_file(shard).items()}
    for file in copy.glob("model*"):
        file.unlink()
    torch.save(state, copy / "pytorch_model.bin")
    fails(4, "convert", copy, "--out", tmp_path / "out", says="--allow-pickle")
    rpq("convert", copy, "--out", tmp_path / "out", "--bits", 8, "--allow-pickle", "-q")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"x": Evil()}, copy / "pytorch_model.bin")
    fails(4, "convert", copy, "--out", tmp_path / "evil", "--allow-pickle", says="weights only")
    assert not (tmp_path / "pwned").exists()

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoModel": "m.M"}}))
    fails(4, "convert", copy, "--out", tmp_path / "remote", says="never run")
    fails(4, "convert", tmp_path / "out", "--out", tmp_path / "twice", says="quantized already")


def test_verify_finds_one_wrong_byte(bert, tmp_path):
    rpq("convert", bert, "--out", tmp_path / "out", "--bits", 4, "-q")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    fails(5, "verify", tmp_path / "out", says=("model.safetensors", "sha256"))
    weights.unlink()
    fails(5, "verify", tmp_path / "out", says="missing")
    fails(4, "verify", bert, says="not an RPQ checkpoint")


def test_disk_full(bert, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        fails(4, "convert", bert, "--out", disk / "out", "--bits", 8, says=("disk full", "run the same command again"))
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=5m", disk], check=True)
        rpq("convert", bert, "--out", disk / "out", "--bits", 8, "-q")
        rpq("convert", bert, "--out", tmp_path / "whole", "--bits", 8, "-q")
        assert fixed(disk / "out") == fixed(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-C", "killed"])
def test_an_interrupted_run_goes_on(how, tmp_path):
    torch.manual_seed(0)
    save_file(deep().state_dict(), tmp_path / "deep.safetensors")
    script = "from rpq_convert.cli import main; main()"
    command = [sys.executable, "-c", script, "deep.safetensors", "--factory", "factories:deep", "--preset", "5bit"]
    command += ["--workers", "1"]
    process = subprocess.Popen(
        [*command, "--out", "out"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[3/"):
            os.killpg(process.pid, how)
            break
    rest = process.stderr.read()
    assert process.wait(60) == (130 if how == signal.SIGINT else -signal.SIGKILL), rest
    if how == signal.SIGINT:
        assert "interrupted; run the same command again to go on" in rest
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    done = list((tmp_path / "out.partial" / "pieces").glob("*.safetensors"))
    assert 2 <= len(done) < 40
    again = subprocess.run([*command, "--out", "out"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("done before") == len(done)
    subprocess.run([*command, "--out", "whole"], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    assert fixed(tmp_path / "out") == fixed(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def test_the_installed_commands_outside_the_checkout(bare, tmp_path):
    binaries = Path(sys.executable).parent
    for name in ("rpq", "rpq-convert"):
        shown = subprocess.run([binaries / name, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert shown.returncode == 0 and "Examples" in shown.stdout
    presets = subprocess.run([binaries / "rpq", "presets"], cwd=tmp_path, capture_output=True, text=True)
    assert "opt-66b" in presets.stdout
    digest = hashlib.sha256(bare.read_bytes()).hexdigest()
    done = subprocess.run(
        [binaries / "rpq-convert", bare, "--factory", "factories:small", "--bits", "8"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "small-rpq" / "model.safetensors").is_file()
    assert hashlib.sha256(bare.read_bytes()).hexdigest() == digest
