"""The command line on real files: what it prints, what it writes, and how it fails."""

import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from factories import deep, small
from paths import SUPPORT
from rpq_convert.cli import group, main
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rpq_convert

VARYING = {"rpq_report.json", "README.md", "rpq_manifest.json"}  # they tell seconds
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SUPPORT), "COLUMNS": "100", "NO_COLOR": "1"}


def rpq(*args, code=0, command=group, charset="utf-8"):
    """Run one command in this process and check its exit code."""
    runner = CliRunner(charset=charset)
    result = runner.invoke(command, [str(a) for a in args], env={"COLUMNS": "100", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(code, *args, says):
    """Run a command that must end in an exit code and one line on stderr, and leave its output folder as it was."""
    out = args[args.index("--out") + 1] if "--out" in args else None
    before = out and (out.exists(), tree(out))
    result = rpq(*args, code=code)
    *talk, line = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and result.stdout == ""
    assert all(t.startswith(("warning: ", "effort ", "needs about ", "[")) for t in talk), (
        talk
    )  # what was chosen, progress, but no traceback and no second error
    for text in (says,) if isinstance(says, str) else says:
        assert text in line, line
    assert not out or (out.exists(), tree(out)) == before
    return result


def misused(*args, says):
    """Run a command that must be refused as wrong usage."""
    result = rpq(*args, code=2)
    assert says in " ".join(result.stderr.replace("│", " ").split()) and result.stdout == "", result.stderr


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shapes(folder):
    return {k: v.shape for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


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
    monkeypatch.syspath_prepend(str(SUPPORT))
    torch.manual_seed(0)
    save_file(small().state_dict(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


# ---- results -----------------------------------------------------------------------------------------------------------


def test_help_tells_examples_and_exit_codes():
    commands = ("convert", "plan", "audit", "diff", "verify", "restore", "presets", "env")
    listed = rpq("--help").stdout
    for name in commands:
        assert f" {name} " in listed
    for text in (listed, *(rpq(name, "--help").stdout for name in commands)):
        assert "Examples:" in text and "0 done, 2 usage, 3 plan, 4 input or output, 5 verification" in text
    alone = rpq("--help", command=main).stdout
    assert "130 interrupted" in " ".join(alone.split()) and "rpq-convert facebook/opt-66b --codebooks heads" in alone
    assert "COMMAND" in listed and "COMMAND" not in alone


def test_help_imports_nothing_that_is_slow():
    code = """
import contextlib, sys
from rpq_convert.cli import group
with contextlib.suppress(SystemExit):
    group(["--help"])
print({"torch", "numpy", "transformers", "numba", "huggingface_hub"} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()" and "Usage" in done.stdout


def test_the_whole_way(bert, tmp_path):
    before = tree(bert)
    out, dense = tmp_path / "out", tmp_path / "dense"
    dry = rpq("convert", bert, "--out", out, "--bits", 4, "--dry-run", "--json")
    assert not list(tmp_path.iterdir()) and tree(bert) == before
    predicted = json.loads(dry.stdout)["predicted_bytes"]
    assert f"{predicted:,} bytes by plan" in rpq("convert", bert, "--out", out, "--bits", 4, "--dry-run").stdout
    assert not list(tmp_path.iterdir())

    done = rpq("convert", bert, "--out", out, "--bits", 4, "--effort", "fast")
    assert (
        done.stderr.startswith("needs about ")
        and "\neffort fast: " in done.stderr
        and done.stderr.endswith(f"wrote {out}\n")
        and "embeddings" in done.stdout
    )
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) == predicted
    assert (out / "tokenizer.json").is_file() and not out.with_name("out.partial").exists()
    assert "is whole" in rpq("verify", out).stdout
    assert json.loads(rpq("verify", out, "--json").stdout)["files"]

    restored = rpq("restore", out, dense)
    size = sum(p.stat().st_size for p in dense.glob("*.safetensors"))
    assert f"{size:,} bytes of dense weights" in restored.stdout
    assert (dense / "tokenizer.json").is_file() and not (dense / "rpq_report.json").exists()
    model, converted = tf.AutoModel.from_pretrained(dense), rpq_convert.load(out)
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes(bert)
    query = "encoder.layer.0.attention.self.query"
    assert torch.equal(model.get_submodule(query).weight, converted.get_submodule(query).weight.clone())
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.allclose(model(ids).last_hidden_state, converted(ids).last_hidden_state, atol=1e-5)
    fails(4, "restore", out, bert, says="exists")
    misused("restore", out, out, "--overwrite", says="is or holds the source")
    rpq("verify", out)


def test_restored_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    rpq("convert", tmp_path / "gpt2", "--out", tmp_path / "out", "--bits", 8, "-q")
    rpq("restore", tmp_path / "out", tmp_path / "dense")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[0].attn.c_attn.weight.shape == (64, 192)
    assert shapes(tmp_path / "dense") == shapes(tmp_path / "gpt2")


def test_json_is_all_of_stdout_and_quiet_says_nothing(bert, tmp_path):
    result = rpq("convert", bert, "--out", tmp_path / "a", "--bits", 8, "--json", "--quiet")
    report = json.loads(result.stdout)
    assert result.stderr == "" and report["rows"]
    loud = rpq("convert", bert, "--out", tmp_path / "b", "--bits", 8, "--json", "--verbose")
    assert json.loads(loud.stdout)["predicted_bytes"] == report["predicted_bytes"]
    assert len([line for line in loud.stderr.splitlines() if line.startswith("[")]) == 15
    assert json.loads(rpq("audit", tmp_path / "a", "--json").stdout)["rows"] == report["rows"]


LESS_OFTEN = [
    pytest.param(asked, marks=pytest.mark.slow) for asked in (("--target-size", "100kB"), ("--max-error", 0.02))
]


@pytest.mark.parametrize("asked", [("--bits", 4.5), *LESS_OFTEN])
def test_sizes_to_a_budget(bert, tmp_path, asked):
    shapes_alone = () if asked[0] == "--max-error" else ("--sensitivity", "shape")  # it needs no sensitivities
    plan = json.loads(rpq("plan", bert, *asked, *shapes_alone, "--json").stdout)
    sizes = {(j["spec"]["dim"], j["spec"]["stages"]) for j in plan["jobs"]}
    assert len(sizes) > 1 or sizes == {(2, 1)}  # one size for all has these errors
    rpq("convert", bert, "--out", tmp_path / "out", *asked, "--effort", "fast", "-q")
    rpq("verify", tmp_path / "out")
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert asked[0] != "--target-size" or 99_000 <= size <= 100_000
    rows = json.loads(rpq("audit", tmp_path / "out", "--json").stdout)["rows"]
    assert asked[0] != "--max-error" or all(r["error"] is None or r["error"] < 0.03 for r in rows)


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
    rpq("convert", bert, "--out", tmp_path / "b", "--bits", 4, "--effort", "fast", "-q")
    marks = {"terminal": "dense", "json": "{", "markdown": "|---", "csv": "name,", "html": "<table"}
    for kind, mark in marks.items():
        assert mark in rpq("audit", tmp_path / "a", "--format", kind).stdout
    rpq("audit", tmp_path / "a", "--format", "html", "--output", tmp_path / "audit.html")
    assert "<table" in (tmp_path / "audit.html").read_text()
    shown = rpq("diff", tmp_path / "a", tmp_path / "b").stdout
    assert "encoder.layer.{0,1}.output.dense.weight x2" in shown and re.search(r"^bits +8 +4$", shown, re.MULTILINE)


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
        "--effort", "fast", "--bits", 4, "--rule", "type:Embedding:bits=8", "--rule", "*.query:skip", "--exclude", "pooler*", "--dtype",
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
    weights = list((tmp_path / "threads").glob("*.safetensors"))
    dry = rpq("convert", bert, "--out", tmp_path / "none", *options, "--dry-run", "--json")
    assert len(weights) > 2 and sum(p.stat().st_size for p in weights) == json.loads(dry.stdout)["predicted_bytes"]
    rpq("verify", tmp_path / "threads")
    rpq(
        "convert", bert, "--out", tmp_path / "serial", *options, "--executor", "serial", "-q"
    )  # processes: see interrupted runs
    assert fixed(tmp_path / "serial") == fixed(tmp_path / "threads")
    rpq("convert", bert, "--out", tmp_path / "other", *options[:-1], 4, "-q")
    assert fixed(tmp_path / "other") != fixed(tmp_path / "threads")


def test_include_is_all_that_is_converted(bert):
    plan = json.loads(rpq("plan", bert, "--bits", 4, "--include", "*.query", "--include", "pooler*", "--json").stdout)
    layers = [f"encoder.layer.{i}.attention.self.query.weight" for i in range(2)]
    assert [j["name"] for j in plan["jobs"]] == [*layers, "pooler.dense.weight"]
    assert {s["reason"] for s in plan["skips"] if s["layer"] == "Embedding"} == {"not included"}


def test_the_source_names_the_report_and_the_folder(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(bert)
    assert rpq("plan", ".", "--bits", 4).stdout.startswith("bert: ")
    monkeypatch.chdir(tmp_path)
    assert "wrote bert-rpq" in rpq("convert", f"{bert}/", "--bits", 8).stderr
    assert json.loads(rpq("audit", "bert-rpq", "--json").stdout)["title"] == "bert"
    monkeypatch.chdir(bert)
    rpq("convert", ".", "--out", tmp_path / "out", "--bits", 8)
    assert json.loads(rpq("audit", tmp_path / "out", "--json").stdout)["title"] == "bert"


def test_a_terminal_sees_a_bar(bare, tmp_path, monkeypatch):
    leader, follower = os.openpty()
    with ThreadPoolExecutor(1) as pool, open(follower, "w") as terminal:
        seen = pool.submit(drain, leader)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        options = ["--factory", "factories:small", "--out", str(tmp_path / "out"), "--bits", "8"]
        main([str(bare), *options], standalone_mode=False)
        monkeypatch.undo()
        terminal.close()
    os.close(leader)
    assert "━" in seen.result() and "[1/" not in seen.result() and "wrote" in seen.result()


def drain(leader):
    """Return all that a terminal is given until its last writer closes it."""
    data = b""
    with suppress(OSError):
        while part := os.read(leader, 4096):
            data += part
    return data.decode()


def test_a_report_fits_any_charset(bare, tmp_path):
    save_file(deep().state_dict(), tmp_path / "deep.safetensors")
    plan = ("plan", tmp_path / "deep.safetensors", "--factory", "factories:deep")
    assert "{0…23}.weight" in rpq(*plan).stdout and "{0?23}.weight" in rpq(*plan, charset="latin-1").stdout


def test_a_closed_pipe_is_quiet_and_a_full_disk_is_told(tmp_path):
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", "from rpq_convert.cli import group; group(['presets'])"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, open("/dev/full", "w") as full:
        runs = [
            subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, env=environment) for out in (closed, full)
        ]
    (_, quiet), (_, told) = (r.communicate() for r in runs)
    assert (runs[0].returncode, quiet) == (1, b"")
    assert runs[1].returncode == 4 and told.startswith(b"error: disk full") and told.count(b"\n") == 1


def test_a_factory_builds_what_is_not_transformers(bare, tmp_path):
    rpq("convert", bare, "--factory", "factories:small", "--out", tmp_path / "out", "--bits", 4, "-q")
    assert "0.weight_rpq.codes" in load_file(tmp_path / "out" / "model.safetensors")
    guessed = rpq("plan", bare)
    assert "guesses" in guessed.stderr
    fails(4, "convert", bare, "--out", tmp_path / "no", says="--factory")
    for wrong in ("nowhere:small", "factories", ".x:y", "factories:nn", "os:getcwd"):
        fails(4, "convert", bare, "--factory", wrong, "--out", tmp_path / "no", says=f"factory '{wrong}'")
    fails(4, "convert", bare, "--factory", "factories:deep", "--out", tmp_path / "no", says="does not fit")
    assert not (tmp_path / "no").exists()


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_usage_errors_are_exit_code_2(bert):
    misused("convert", "--bits", 4, says="SRC")
    misused("convert", bert, "--bits", "many", says="--bits")
    misused("convert", bert, "--bit", 4, says="--bit")
    misused("convert", bert, "--workers", 0, says="--workers")
    misused("convert", bert, "--executor", "hope", says="--executor")
    misused("convert", bert, "--device", "cuda", says="use --device cpu")
    misused("audit", bert, "--format", "xml", says="--format")
    for rule in ("nonsense", ":bits=4", "*:bits", "*:match=x"):
        misused("plan", bert, "--rule", rule, says=f"'{rule}'")


def test_the_source_is_never_overwritten(copy, tmp_path):
    before = tree(copy)
    misused("convert", copy, "--out", copy, "--overwrite", says="is or holds the source")
    misused("convert", copy, "--out", tmp_path, "--overwrite", says="is or holds the source")
    for name in ("model.partial", "model.old.partial"):  # where a run to model/ keeps what is unfinished or replaced
        copy = copy.rename(tmp_path / name)
        misused("convert", copy, "--out", tmp_path / "model", "--overwrite", says="is or holds the source")
    assert tree(copy) == before


def test_missing_and_wrong_sources(tmp_path):
    fails(4, "convert", tmp_path / "nothing", says="does not exist")
    (tmp_path / "empty").mkdir()
    fails(4, "convert", tmp_path / "empty", says="no weights")
    (tmp_path / "text.safetensors").write_text("no tensors, just words")
    fails(4, "plan", tmp_path / "text.safetensors", says="not a safetensors file")


def test_broken_shards(copy, tmp_path):
    shard = sorted(copy.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    damages = {
        "truncated, 100 bytes are missing": whole[:-100],
        "4 bytes too long": whole + b"1234",
        "not a safetensors file": b"\xff" * 8 + whole[8:],
        "broken safetensors header": whole[:8] + whole[8:].replace(b"{", b"[", 1),
        "cannot fill": whole.replace(b'"dtype":"F32"', b'"dtype":"F16"', 1),
        "not supported": whole.replace(b'"dtype":"F32"', b'"dtype":"F31"', 1),
    }
    for says, data in damages.items():
        shard.write_bytes(data)
        fails(4, "convert", copy, "--out", tmp_path / "out", says=(shard.name, says))
    shard.unlink()
    fails(4, "convert", copy, "--out", tmp_path / "out", says=(shard.name, "is missing"))


def test_index_that_disagrees_or_leaves_the_folder(copy, tmp_path):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names, files = list(index["weight_map"]), sorted(set(index["weight_map"].values()))
    refused = ("convert", copy, "--out", tmp_path / "out")

    def rewrite(**changed):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **changed}}))

    rewrite(**{names[0]: next(f for f in files if f != index["weight_map"][names[0]])})
    fails(4, *refused, says=(names[0], "index"))
    rewrite(**{"ghost.weight": files[0]})
    fails(4, *refused, says=("ghost.weight", "index"))
    (tmp_path / "secret.safetensors").write_bytes((copy / files[0]).read_bytes())
    for outside in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        rewrite(**{names[0]: outside})
        fails(4, *refused, says=("leaves the folder", outside))
    rewrite()
    (copy / files[0]).unlink()
    (copy / files[0]).symlink_to(tmp_path / "secret.safetensors")
    fails(4, *refused, says=("leaves the folder", files[0]))
    (copy / files[0]).unlink()
    path.write_text("{")
    fails(4, *refused, says="model.safetensors.index.json is not an index of weight files: it is not JSON")


def test_nan_is_refused_by_the_tensors_name(copy, tmp_path):
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        if "encoder.layer.1.output.dense.weight" in tensors:
            tensors["encoder.layer.1.output.dense.weight"][3, 5] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
    out = tmp_path / "out"
    fails(
        4,
        "convert",
        copy,
        "--out",
        out,
        "--effort",
        "fast",
        says=("encoder.layer.1.output.dense.weight", "1 NaN or infinite"),
    )
    out.mkdir()
    (out / "before.txt").write_text("the last good one")
    fails(4, "convert", copy, "--out", out, "--overwrite", "--effort", "fast", says="NaN")
    rpq(
        "convert",
        copy,
        "--out",
        out,
        "--overwrite",
        "--exclude",
        "encoder.layer.1.output.dense",
        "--effort",
        "fast",
        "-q",
    )
    fails(5, "verify", out, says="encoder.layer.1.output.dense.weight")


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
    assert rpq("verify", out) and not list(tmp_path.glob("out.*"))


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
    fails(4, "convert", copy, "--out", tmp_path / "remote", "--allow-pickle", says="never run")
    fails(4, "convert", tmp_path / "out", "--out", tmp_path / "twice", says="quantized already (rpq)")
    (copy / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    fails(4, "convert", copy, "--out", tmp_path / "twice", says="quantized already (gptq)")


def test_verify_finds_one_wrong_byte(bert, tmp_path):
    out = tmp_path / "out"
    rpq("convert", bert, "--out", out, "--bits", 4, "--effort", "fast", "--no-check", "-q")
    for file in sorted(out.iterdir()):
        if file.name != "rpq_manifest.json":
            whole = file.read_bytes()
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            fails(5, "verify", out, says=(file.name, "sha256"))
            file.write_bytes(whole)
    extra = out / "other.safetensors"
    extra.write_bytes((out / "model.safetensors").read_bytes())
    fails(5, "verify", out, says=("other.safetensors", "not in the manifest"))
    extra.unlink()
    (out / "README.md").unlink()
    fails(5, "verify", out, "--json", says=("README.md", "missing"))
    (out / "rpq_manifest.json").unlink()
    fails(5, "verify", out, says=("rpq_manifest.json", "not finished"))
    fails(4, "verify", bert, says="not an RPQ checkpoint")
    fails(4, "verify", tmp_path / "nothing", says="does not exist")


def test_records_that_are_not_what_they_should_be(bert, tmp_path):
    out = tmp_path / "out"
    rpq("convert", bert, "--out", out, "--bits", 4, "--effort", "fast", "--no-check", "-q")
    manifest, report = out / "rpq_manifest.json", out / "rpq_report.json"
    for text in ("{", "[]", '{"files": []}', '{"files": {"model.safetensors": 3}}', '{"files": {"config.json": {}}}'):
        manifest.write_text(text)
        fails(5, "verify", out, says="rpq_manifest.json is not a manifest")
    manifest.write_text('{"files": {}}')
    fails(5, "verify", out, says=("config.json", "not in the manifest"))
    for text in ("{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}'):
        report.write_text(text)
        fails(4, "audit", out, says="rpq_report.json is not a report")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["guard"]
    (out / "config.json").write_text(json.dumps(config))
    fails(4, "restore", out, tmp_path / "dense", says=("config.json", "quantization_config.guard is missing"))


def test_configs_that_build_no_model(copy):
    config = json.loads((copy / "config.json").read_text())
    changes = {
        "refuses it": {"hidden_size": "many"},
        "float99": {"dtype": "float99"},
        "model type [1]": {"model_type": [1]},
        "multiple of the number of attention heads": {"num_attention_heads": 7},
        "negative dimension": {"hidden_size": -4},
        "no model class 'Nope'": {"architectures": ["Nope"]},
        "cannot build": {"architectures": 3},
    }
    for says, change in changes.items():
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        fails(4, "plan", copy, says=says)
    for text in ("3", "null", "[]", "{"):
        (copy / "config.json").write_text(text)
        fails(
            4,
            "plan",
            copy,
            says=("config.json is not the config of a checkpoint: it", "JSON" if text == "{" else "must be an object"),
        )


def test_presets_and_rules_that_make_no_sense(bert, tmp_path):
    own = tmp_path / "own.toml"
    presets = {
        "settings = 3": "settings must be a table", "rules = 5": "rules must be a list", "rules = [3]": "rules[0] must be a table",
        "[[rules]]\nmatch = 3": "rules[0].match must be text", "[settings]\nbits = 'four'": "bits must be a number",
        "description = 'no size'": "no size is set", "x": "not valid TOML", "[other]": "other is unknown; known: description",
    }  # fmt: skip
    for text, says in presets.items():
        own.write_text(text)
        fails(3, "plan", bert, "--preset", own, says=says)
    rules = {
        "*:view=foo": "view 'foo'", "*:books=foo": "books must be", "*:skip=maybe": "true or false", "*:dim=2.5": "dim",
        "*:colour=red": "sets colour",
    }  # fmt: skip
    for rule, says in rules.items():
        fails(3, "plan", bert, "--rule", rule, says=says)
    fails(3, "plan", bert, "--max-shard-size", "infGB", says="infGB")


@pytest.mark.slow
def test_what_a_killed_overwrite_leaves_is_no_obstacle(bert, tmp_path):
    convert = ("convert", bert, "--out", tmp_path / "out", "--bits", 8, "--overwrite")
    rpq(*convert, "-q")
    (tmp_path / "out").rename(tmp_path / "out.old.partial")  # killed between the two renames, or
    rpq(*convert, "-q")
    (tmp_path / "out.old.partial").mkdir()  # killed while the old folder was deleted
    rpq(*convert, "-q")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and rpq("verify", tmp_path / "out")


def test_a_source_that_changed_is_not_mixed_in(copy, tmp_path, monkeypatch):
    def ctrl_c(path):
        raise KeyboardInterrupt

    convert = ("convert", copy, "--out", tmp_path / "out", "--bits", 8)
    with monkeypatch.context() as patch:
        patch.setattr("rpq_convert.storage.manifest.sha256", ctrl_c)
        rpq(*convert, code=130)
    shard = sorted(copy.glob("*.safetensors"))[0]
    save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
    fails(4, *convert, says=("out.partial", "source that has changed"))
    rpq(*convert, "--overwrite", "-q")
    rpq("convert", copy, "--out", tmp_path / "whole", "--bits", 8, "-q")
    assert fixed(tmp_path / "out") == fixed(tmp_path / "whole")


def test_no_fit_is_lost_while_files_are_hashed(bert, tmp_path, monkeypatch):
    def ctrl_c(path):
        raise KeyboardInterrupt

    convert = ("convert", bert, "--out", tmp_path / "out", "--bits", 8)
    with monkeypatch.context() as patch:
        patch.setattr("rpq_convert.storage.manifest.sha256", ctrl_c)
        assert "done before" not in rpq(*convert, code=130).stderr
    assert rpq(*convert, "--verbose").stderr.count("done before") == 15 and rpq("verify", tmp_path / "out")


@pytest.mark.parametrize(
    "room, where",
    [
        pytest.param(0.01, "rpq_source.json", id="start", marks=pytest.mark.slow),
        pytest.param(0.5, "pieces", id="fit"),
        pytest.param(1.7, "partial/model.safetensors", id="assembly", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_meanwhile(bert, tmp_path, monkeypatch, room, where):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1 << 40))  # before it fills
    disk = tmp_path / "disk"
    disk.mkdir()
    rpq("convert", bert, "--out", tmp_path / "whole", "--bits", 8, "-q")
    size = int(room * (tmp_path / "whole" / "model.safetensors").stat().st_size)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        convert = ("convert", bert, "--out", disk / "out", "--bits", 8)
        fails(4, *convert, says=("disk full", where, "run the same command again"))
        done = len(list(disk.glob("out.partial/pieces/*.safetensors")))
        subprocess.run(["mount", "-o", "remount,size=5m", disk], check=True)
        assert done == rpq(*convert, "--verbose").stderr.count("done before")
        assert fixed(disk / "out") == fixed(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_without_room_is_told_before_the_first_fit(bert, tmp_path, monkeypatch):
    """Pieces and result both lie on it for a while; what an earlier run wrote is not counted again."""
    convert = ("convert", bert, "--out", tmp_path / "out", "--bits", 8)
    needed = 2 * json.loads(rpq(*convert, "--dry-run", "--json").stdout)["predicted_bytes"]
    for free in (0, needed // 2):
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        fails(
            4,
            *convert,
            says=("disk full", "needs 0.", f"and {free / 1e6:.3f} MB are free there", "choose another folder"),
        )
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=needed))
    rpq(*convert, "-q")


@pytest.mark.slow
def test_a_worker_that_dies_is_told_and_the_run_goes_on(bert, tmp_path):
    out = tmp_path / "out"

    def kill_one():
        while not list(tmp_path.glob("out.partial/pieces/*.safetensors")):
            time.sleep(0.02)
        multiprocessing.active_children()[0].kill()

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_one)
        options = ("--effort", "fast", "--bits", 4, "--executor", "processes", "--workers", 2)
        fails(4, "convert", bert, "--out", out, *options, says=("a worker process died", "to go on"))
        killer.result()
    assert "done before" in rpq("convert", bert, "--out", out, "--bits", 4, "--effort", "fast", "--verbose").stderr


def test_time_limits_locks_and_damaged_pieces_are_told(bare, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    out = tmp_path / "out"
    convert = (
        "convert",
        bare,
        "--factory",
        "factories:small",
        "--bits",
        8,
        "--effort",
        "fast",
        "--no-check",
        "--out",
        out,
    )
    assert rpq(*convert, "--time-limit", "0.001s", code=6).stderr.endswith(
        "weights are done and kept; run the same command again to go on\n"
    )
    fails(3, *convert, "--time-limit", "later", says="is no time; give one such as 90s")
    (piece,) = (tmp_path / "out.partial" / "pieces").iterdir()
    piece.write_bytes(piece.read_bytes()[:-1])
    (tmp_path / "out.partial.lock").write_text(
        json.dumps({"pid": 1, "host": "h", "command": "rpq convert x", "since": "noon"})
    )
    with open(tmp_path / "out.partial.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fails(4, *convert, says=f"{out} is being written by process 1 on h since noon (rpq convert x); wait for it")
    (said,) = (line for line in rpq(*convert, "-q").stderr.splitlines())
    assert said.startswith("warning: ") and str(piece) in said and "the weight is fitted again" in said
    found = rpq("verify", out, "--against", bare, "--factory", "factories:small", "--json")
    against = json.loads(found.stdout)["against"]
    assert against["refitted"] == against["weights"] > 0
    misused("verify", out, "--all", says="--against")
    misused("verify", out, "--against", bare, "--quick", says="--quick")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small.safetensors"]


def test_a_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("RPQ_TRACEBACK", "1")
    shown = rpq("plan", tmp_path / "nothing", code=4).stderr
    assert shown.startswith("Traceback") and shown.splitlines()[-1].startswith("error: ")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A weight file with many fits, and what an uninterrupted run makes of it."""
    folder = tmp_path_factory.mktemp("interrupted")
    torch.manual_seed(0)
    save_file(deep().state_dict(), folder / "deep.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SUPPORT))
        rpq("convert", folder / "deep.safetensors", "--out", folder / "whole", *DEEP, "-q")
    return folder / "deep.safetensors", folder / "whole"


HEEDFUL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background deaf to ctrl-C
from rpq_convert.cli import main
main()
"""
DEEP = ("--factory", "factories:deep", "--preset", "5bit", "--workers", "2", "--verbose")


@pytest.mark.parametrize(
    "how, executor",
    [
        pytest.param(signal.SIGINT, "threads", id="ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "processes", id="ctrl-C in processes", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "threads", id="terminated", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "processes", id="terminated in processes", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "threads", id="killed", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on(how, executor, interrupted, tmp_path):
    source, whole = interrupted
    command = [sys.executable, "-c", HEEDFUL, source, "--out", "out", *DEEP, "--executor", executor]
    pipes = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    for line in process.stderr:
        if line.startswith("[1/24]"):
            os.killpg(process.pid, how)
            break
    stdout, rest = process.communicate()
    code, said = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}.get(how, (-how, ""))
    assert process.returncode == code, rest
    if said:
        assert rest.endswith(f"{said}; run the same command again to go on\n") and "Traceback" not in rest
    assert stdout == "" and (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    done = list((tmp_path / "out.partial" / "pieces").glob("*.safetensors"))
    assert 1 <= len(done) < 24
    again = subprocess.run(command, **pipes)
    assert again.returncode == 0 and again.stderr.count("done before") == len(done), again.stderr
    assert fixed(tmp_path / "out") == fixed(whole) and fixed(whole)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_the_installed_commands_outside_the_checkout(bare, tmp_path):
    binaries, before = Path(sys.executable).parent, bare.read_bytes()
    for name in ("rpq", "rpq-convert"):
        shown = subprocess.run([binaries / name, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert shown.returncode == 0 and "Examples" in shown.stdout and f"Usage: {name} " in shown.stdout
    done = subprocess.run(
        [binaries / "rpq-convert", bare.name, "--factory", "factories:small", "--preset", "8bit"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr.endswith("wrote small-rpq\n"), done.stderr
    assert rpq("verify", tmp_path / "small-rpq") and bare.read_bytes() == before
