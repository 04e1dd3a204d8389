"""Models named by hub id, from a hub on the loopback address, in a process of their own with an empty cache."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from hub import COMMIT, Hub
from safetensors.torch import load_file

SCRIPT = """
import json, sys
import rpq_convert as rpq

out = sys.argv[1]
plan = rpq.plan("team/small", bits=4, revision="v1")
print("PLANNED", flush=True)
rpq.convert_checkpoint("team/small", out, bits=4, revision="v1")
assert rpq.plan("team/small", bits=4, revision="v1", local_files_only=True) == plan
model = rpq.load(out)
failures = {}
for name, options in {"team/missing": {}, "team/small": {"revision": "v2"}, "a/b/c": {}}.items():
    try:
        rpq.plan(name, **options)
    except rpq.SourceError as e:
        failures[name] = str(e)
print(json.dumps({"bytes": plan.file_bytes, "failures": failures}))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    tf.BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit('never run')")
    (folder / "tf_model.h5").write_bytes(b"other weights" * 1000)
    return folder


def test_hub_id(repository, tmp_path):
    with Hub({"team/small": repository}, revision="v1") as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "out")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        planned = list(hub.requests)
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert line == "PLANNED\n"
    assert any(path.endswith("config.json") for _, path in planned)
    assert not any("safetensors" in path for _, path in planned), "a plan reads no weights"
    assert hub.asked(f"/team/small/resolve/{COMMIT}/model.safetensors") and hub.asked("tokenizer.json")
    assert not hub.asked(".py") and not hub.asked(".h5")
    facts = json.loads(rest.splitlines()[-1])
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.stat().st_size == facts["bytes"]
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not list((tmp_path / "out").glob("*.py"))
    assert any(k.endswith("_rpq.codes") for k in load_file(weights))
    assert "team/missing" in facts["failures"]["team/missing"] and "hub" in facts["failures"]["team/missing"]
    assert set(facts["failures"]) == {"team/missing", "team/small", "a/b/c"}
