"""Models named by hub id, from and to a hub on the loopback address, in processes of their own with an empty cache."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from hub import COMMIT, TOKEN, Hub, Repository, copied
from huggingface_hub import metadata_load
from paths import ROOT
from safetensors.torch import load_file, save_file

import rpq_convert as rpq


def run(hub, cache, code, *arguments, token=None):
    """Run Python code with this hub; return the JSON that it prints last."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    code = "import json, sys\nimport rpq_convert as rpq\nout = {}\n" + code + "\nprint(json.dumps(out))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


FAIL = """
def fail(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except (rpq.SourceError, rpq.VerifyError) as e:
        return f"{type(e).__name__}: {e}"
    return "nothing raised"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=2000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    tf.BertModel(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Small\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit('never run')")
    (folder / "tf_model.h5").write_bytes(b"other weights" * 1000)
    for name in ("1_Pooling/config.json", "onnx/model.onnx", "onnx/vocab.txt", ".env", "a/.cache/x.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(name))
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, folder):
    place = tmp_path_factory.mktemp("sharded")
    tf.BertModel.from_pretrained(folder).save_pretrained(place, max_shard_size="200KB")
    assert len(list(place.glob("*.safetensors"))) > 2
    return place


@pytest.mark.slow
def test_a_plan_reads_headers_alone(folder, sharded, tmp_path):
    code = """
for name in ("team/small", "team/sharded"):
    out[name] = rpq.plan(name, bits=4).file_bytes
out["headers"] = rpq.plan("team/bare", bits=4).file_bytes
"""
    bare = copied(folder, tmp_path / "bare")
    (bare / "config.json").unlink()
    with Hub({"team/small": folder, "team/sharded": sharded, "team/bare": bare}) as hub:
        planned = run(hub, tmp_path / "cache", code)
        sent = dict(hub.sent)
    assert planned["team/small"] == rpq.plan(folder, bits=4).file_bytes
    assert planned["team/sharded"] == planned["team/small"]
    assert planned["headers"] > 0
    size = (folder / "model.safetensors").stat().st_size
    assert (
        sent["model.safetensors"] <= 2 * 100_001 < size
    )  # two repositories; a header is asked for by its first 100 kB


@pytest.mark.slow
def test_a_conversion_fetches_what_it_needs_at_one_commit(folder, tmp_path):
    code = """
rpq.convert_checkpoint("team/small", sys.argv[1], bits=4, revision="v1")
out["again"] = rpq.plan("team/small", bits=4, revision="v1", local_files_only=True).file_bytes
"""
    with Hub({"team/small": Repository(folder, "v1")}, cut=("model.safetensors",)) as hub:
        found = run(hub, tmp_path / "cache", code, tmp_path / "out")
        assert hub.asked(f"/team/small/resolve/{COMMIT}/model.safetensors") and hub.asked("tokenizer.json")
        assert not hub.asked(".py") and not hub.asked(".h5")
        assert hub.asked("1_Pooling/config.json")
        assert not any(map(hub.asked, (".onnx", "vocab.txt", ".env", "x.json")))
        # broken off half-way, and fetched again without a new command (parts below 10 MB from their start)
        assert not hub.cut and hub.sent["model.safetensors"] == 1.5 * (folder / "model.safetensors").stat().st_size
    out = tmp_path / "out"
    assert (out / "model.safetensors").stat().st_size == found["again"]
    rpq.convert_checkpoint(folder, tmp_path / "local", bits=4)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert (out / "tokenizer.json").is_file() and not list(out.glob("*.py"))
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"1_Pooling"} and (out / "1_Pooling/config.json").is_file()
    card = metadata_load(out / "README.md")
    assert (card["base_model"], card["base_model_relation"]) == ("team/small", "quantized")
    assert (card["license"], card["library_name"]) == ("apache-2.0", "transformers")
    assert {"rpq", "product-quantization"} <= set(card["tags"])
    assert f"--revision {COMMIT}" in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_large_file_goes_on_where_it_broke_off(folder, tmp_path):
    large = copied(folder, tmp_path / "large")
    config = tf.BertConfig(
        vocab_size=100_000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    tf.BertModel(config).save_pretrained(large)
    size = (large / "model.safetensors").stat().st_size
    drawn = 'rpq.convert_checkpoint("team/large", sys.argv[1] + "-drawn", bits=4, fit="random")\n'
    code = 'rpq.convert_checkpoint("team/large", sys.argv[1], bits=8)'
    with Hub({"team/large": large}, cut=("model.safetensors",)) as hub:
        run(hub, tmp_path / "cache", drawn, tmp_path / "out")
        assert not hub.sent["model.safetensors"]  # random codes need no weights
        run(hub, tmp_path / "cache", code, tmp_path / "out")
        assert size > 25_000_000 and not hub.cut
        assert hub.sent["model.safetensors"] <= size + size // 2 - 10_000_000  # the first 10 MB were not fetched again
    rpq.verify(tmp_path / "out")


@pytest.mark.slow
def test_what_the_hub_refuses_is_told(folder, tmp_path):
    code = (
        FAIL
        + """
out["missing"] = fail(rpq.plan, "team/missing")
out["revision"] = fail(rpq.plan, "team/small", revision="v9")
out["gated"] = fail(rpq.convert_checkpoint, "team/gated", sys.argv[1], bits=4)
out["private"] = fail(rpq.plan, "team/private")
out["token"] = rpq.plan("team/private", bits=4, token="hf_secret").file_bytes
out["name"] = fail(rpq.plan, "a/b/c")
out["uncached"] = fail(rpq.plan, "team/other", local_files_only=True)
"""
    )
    repositories = {
        "team/small": folder, "team/gated": Repository(folder, gated=True), "team/private": Repository(folder, private=True),
    }  # fmt: skip
    with Hub(repositories) as hub:
        told = run(hub, tmp_path / "cache", code, tmp_path / "out")
    assert "team/missing is no local folder" in told["missing"] and "hf auth login" in told["missing"]
    assert "team/small has no such revision" in told["revision"]
    assert "team/gated is gated: accept its terms" in told["gated"]
    assert "hf auth login" in told["private"] and told["token"] == rpq.plan(folder, bits=4).file_bytes
    assert "a/b/c" in told["name"] and "team/other is incomplete in the local cache" in told["uncached"]
    assert not (tmp_path / "out").exists()


PUSH = (
    FAIL
    + """
from rpq_convert.hf import torchvision
torchvision.fix()  # transformers needs one that works
from transformers import AutoModel
import torch
folder, broken, many = sys.argv[1:]
out["first"] = rpq.push(folder, "me/small-rpq")
out["second"] = rpq.push(many, "me/small-rpq")
out["public"] = fail(rpq.push, folder, "me/small-rpq", private=False)
out["foreign"] = fail(rpq.push, folder, "team/small")
out["broken"] = fail(rpq.push, broken, "me/broken")
model = AutoModel.from_pretrained("me/small-rpq")
mine = rpq.load(many)
same = model.state_dict().items()
out["equal"] = all(torch.equal(t, mine.state_dict()[k]) for k, t in same)
"""
)


@pytest.mark.slow
def test_a_converted_folder_is_pushed_whole_or_not_at_all(folder, tmp_path):
    one, many, broken = tmp_path / "small-rpq", tmp_path / "many-rpq", tmp_path / "broken-rpq"
    rpq.convert_checkpoint(folder, one, bits=4)
    rpq.convert_checkpoint(folder, many, bits=4, max_shard_size="50KB")
    copied(one, broken)
    damaged = bytearray((broken / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (broken / "model.safetensors").write_bytes(damaged)
    with Hub(
        {"team/small": Repository(copied(folder, tmp_path / "foreign"), private=True)}, where=tmp_path / "hub"
    ) as hub:
        told = run(hub, tmp_path / "cache", PUSH, one, broken, many, token=TOKEN)
        pushed = hub.repositories["me/small-rpq"]
        assert set(hub.repositories) == {"team/small", "me/small-rpq"}  # nothing was made for the broken folder
    assert told["first"] == told["second"] == f"{hub.url}/me/small-rpq"
    assert pushed.private and len(pushed.commits) == 2
    assert "exists and is private, not public" in told["public"]
    assert "holds the weights of another model" in told["foreign"]
    assert told["broken"].startswith("VerifyError")
    assert told["equal"] is True
    # the second push left no shard of the first
    assert {p.name for p in pushed.folder.glob("*.safetensors")} == {p.name for p in many.glob("*.safetensors")}
    assert "1_Pooling/config.json" in rpq.verify(pushed.folder)
    card = (pushed.folder / "README.md").read_text()
    assert 'from_pretrained("me/small-rpq")' in card and "many-rpq" not in card.split("## Size")[0]


@pytest.mark.slow
def test_commands_take_repositories_where_a_folder_is_expected(folder, tmp_path):
    """The base and the converted model are both on the hub; all commands run in one process."""
    code = """
from rpq_convert.cli import group
from typer.testing import CliRunner
def command(*words):
    done = CliRunner().invoke(group, words)
    return [done.exit_code, done.stdout[-2000:], done.stderr[-2000:]]
here, data = sys.argv[1:]
out["verify"] = command("verify", "team/small-rpq", "-q")
out["audit"] = command("audit", "team/small-rpq", "--json")
out["restore"] = command("restore", "team/small-rpq", here + "/dense", "-q")
out["eval"] = command("eval", "team/small", "team/small-rpq", "--inputs", data, "--json", "-q")
out["save"] = command("eval", "team/small", "team/small-rpq", "--inputs", data, "--save")
out["tune"] = command("tune", "team/small", "team/small-rpq", "--data", data, "--steps", "2", "--out", here + "/tuned", "-q")
out["fed"] = command("recalibrate", "team/small", "team/small-rpq", "--data", data, "--out", here + "/fed", "-q")
out["missing"] = command("verify", "team/missing")
page = "https://huggingface.co/team/small"
out["page"] = command("eval", page + "/tree/main", page + "-rpq", "--inputs", data, "--json", "-q")
out["tune page"] = command("tune", page, page + "-rpq", "--data", data, "--steps", "2", "--out", here + "/paged", "-q")
out["stranger"] = command("eval", "team/stranger", "team/small-rpq", "--inputs", data)
out["dense"] = command("restore", "team/small", here + "/no")
out["python"] = rpq.verify("team/small-rpq") == rpq.verify("team/small-rpq", revision="main")
"""
    small = tmp_path / "small-rpq"
    rpq.convert_checkpoint(folder, small, bits=8)
    data = tmp_path / "data.safetensors"
    save_file({"input_ids": torch.randint(0, 2000, (40, 9))}, data)
    tf.BertModel(tf.BertConfig(vocab_size=9, hidden_size=64, num_attention_heads=4)).save_pretrained(tmp_path / "other")
    with Hub({"team/small": folder, "team/small-rpq": small, "team/stranger": tmp_path / "other"}) as hub:
        told = run(hub, tmp_path / "cache", code, tmp_path, data)
        assert not hub.asked(".h5") and not hub.asked(".py")
    for name in ("verify", "restore", "eval", "tune", "fed", "page", "tune page"):
        assert told[name][0] == 0 and told[name][2] == "", told[name]
    assert "team/small-rpq is whole" in told["verify"][1] and told["audit"][0] == 0
    assert json.loads(told["eval"][1])["metrics"]["cosine"] > 0.99
    assert told["save"][0] == 4 and "--save writes into a folder" in told["save"][2]
    assert told["missing"][0] == 4 and "the hub shows no such repository" in told["missing"][2]
    assert told["python"] is True and told["page"] == told["eval"]
    assert "\nrpq tune team/small small-rpq --data" in (tmp_path / "paged" / "README.md").read_text()
    assert "error: team/stranger cannot be the base of team/small-rpq: " in told["stranger"][2]
    assert "error: team/small is not an RPQ checkpoint" in told["dense"][2] and told["dense"][2].count("\n") == 1
    for made in ("tuned", "fed"):
        rpq.verify(tmp_path / made)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert {k: v.shape for k, v in dense.items()} == {
        k: v.shape for k, v in load_file(folder / "model.safetensors").items()
    }


@pytest.mark.slow
def test_reports_of_repositories_are_compared_by_their_small_files(folder, tmp_path):
    """Without torch, and without a weight; what is no converted model is told by its id."""
    code = """
from rpq_convert.cli import group
from typer.testing import CliRunner
def diff(*words):
    done = CliRunner().invoke(group, ["diff", *words])
    return [done.exit_code, done.stdout, done.stderr]
here, page = sys.argv[1], "https://huggingface.co/team/two/tree/v2"
out["ids"] = diff("team/one", page, here + "/one", "--json")
for wrong in ("team/small", "team/gguf", "team/two", "team/missing", here + "/on"):
    out[wrong.removeprefix(here)] = diff("team/one", wrong)
assert "torch" not in sys.modules
"""
    one, two = tmp_path / "one", tmp_path / "two"
    for bits, place in ((8, one), (4, two)):
        rpq.convert_checkpoint(folder, place, bits=bits, fit="random")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "small.gguf").write_bytes(b"GGUF")
    served = {"team/one": one, "team/two": Repository(two, "v2"), "team/small": folder, "team/gguf": tmp_path / "gguf"}
    with Hub(served) as hub:
        told = run(hub, tmp_path / "cache", code, tmp_path)
        assert not hub.asked(".safetensors")
    found = json.loads(told["ids"][1])
    assert found["names"] == ["team/one", "team/two@v2", f"{tmp_path.name}/one"]
    assert found["options"]["bits"] == [8, 4, 8]
    for place, says in {
        "team/small": "team/small is not an RPQ checkpoint", "team/gguf": "small.gguf in it is a GGUF file of llama.cpp",
        "team/two": "team/two has no such revision", "team/missing": "the hub shows no such repository", "/on": "did you mean",
    }.items():  # fmt: skip
        assert told[place][0] == 4 and says in told[place][2] and told[place][2].count("\n") == 1, told[place]


@pytest.mark.slow
def test_push_from_the_command_line(folder, tmp_path):
    code = """
import subprocess
def rpq_cli(*words):
    done = subprocess.run([sys.executable, "-c", "from cli import group; group()", *words], capture_output=True, text=True)
    return [done.returncode, done.stdout[-3000:] + done.stderr[-3000:]]
src, here = sys.argv[1:]
import os
os.chdir(here)
out["anonymous"] = rpq_cli("convert", src, "--bits", "4", "--effort", "fast", "--push-to", "me/from-cli", "--out", "a")
os.environ["HF_TOKEN"] = "hf_secret"
out["pushed"] = rpq_cli("convert", src, "--bits", "4", "--effort", "fast", "--push-to", "me/from-cli", "--out", "b")
"""
    with Hub({}, where=tmp_path / "hub") as hub:
        told = run(hub, tmp_path / "cache", code, folder, tmp_path)
    status, said = told["anonymous"]
    assert status == 4 and "hf auth login" in said and not (tmp_path / "a").exists()
    assert told["pushed"][0] == 0, told["pushed"][1]
    assert hub.repositories["me/from-cli"].private
    assert (
        load_file(hub.repositories["me/from-cli"].folder / "model.safetensors").keys()
        == load_file(tmp_path / "b" / "model.safetensors").keys()
    )
