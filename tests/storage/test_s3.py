"""S3, by a server that speaks as it does: sources, outputs, and what its package and its errors are like."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from paths import ROOT

import rpq_convert as rpq
from rpq_convert.errors import FolderError, SourceError
from rpq_convert.storage.delivery import SCRATCH

server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket on the loopback address, with a model in two files under a name with a space and a percent sign."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    place = tmp_path_factory.mktemp("s3")
    given = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "geheim", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true", SCRATCH: str(place),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        torch.manual_seed(0)
        config = tf.BertConfig(
            vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        tf.BertModel(config).save_pretrained(place / "model", max_shard_size="200KB")
        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        store.put(str(place / "model"), "bucket/models/my 50% model", recursive=True)
        yield store
    started.stop()


SOURCE = "s3://bucket/models/my 50% model/"


def test_there_and_back(bucket, tmp_path):
    rpq.convert_checkpoint(SOURCE, "s3://bucket/small", bits=8, progress=False)
    rpq.convert_checkpoint(Path(os.environ[SCRATCH]) / "model", tmp_path / "local", bits=8, progress=False)
    assert bucket.cat("bucket/small/model.safetensors") == (tmp_path / "local/model.safetensors").read_bytes()
    assert rpq.verify("s3://bucket/small") == rpq.verify(tmp_path / "local") and rpq.audit("s3://bucket/small").rows
    expected, found = rpq.load(tmp_path / "local").state_dict(), rpq.load("s3://bucket/small").state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    rpq.restore_checkpoint("s3://bucket/small", "s3://bucket/dense")
    assert bucket.exists("bucket/dense/model.safetensors")
    everything = b"".join(bucket.cat(p) for p in bucket.find("bucket/small") if p.endswith((".json", ".md")))
    assert b"geheim" not in everything
    with pytest.raises(FolderError, match="s3://bucket/small already exists"):
        rpq.convert_checkpoint(SOURCE, "s3://bucket/small", bits=8)
    assert [p.name for p in Path(os.environ[SCRATCH]).iterdir()] == ["model"]


def test_an_object_that_is_replaced_meanwhile_is_noticed(bucket, tmp_path):
    from safetensors.torch import save_file
    from torch import nn

    def build():
        return nn.Linear(64, 64)

    for number in (0, 1):
        torch.manual_seed(number)
        save_file(build().state_dict(), tmp_path / f"{number}.safetensors")
    bucket.put_file(str(tmp_path / "0.safetensors"), "bucket/w.safetensors")

    def told(job, encoded):
        bucket.put_file(str(tmp_path / "1.safetensors"), "bucket/w.safetensors")

    with pytest.raises(SourceError, match="the source has changed while it was converted"):
        rpq.convert_checkpoint("s3://bucket/w.safetensors", tmp_path / "out", bits=8, factory=build, progress=told)


def test_what_s3_refuses_is_one_line(bucket, tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="s3://nowhere/x does not exist: there is no such bucket"):
        rpq.plan("s3://nowhere/x", bits=8)
    with pytest.raises(SourceError, match="s3://bucket/none does not exist: nothing is there"):
        rpq.load("s3://bucket/none")
    with pytest.raises(FolderError, match="s3://nowhere/x does not exist: there is no such bucket"):
        rpq.convert_checkpoint(SOURCE, "s3://nowhere/x", bits=8)
    assert "nowhere" not in bucket.ls("")


def test_commands_take_addresses(bucket, tmp_path):
    """In processes of their own, one of them without credentials."""

    def run(*words, **more):
        command = [sys.executable, "-c", "from rpq_convert.cli import group; group()", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **more}
        environment = {k: v for k, v in environment.items() if v}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    done = run("convert", SOURCE, "--bits", "8", "--effort", "fast", "--out", "s3://bucket/by command", "--no-check")
    assert done.returncode == 0 and done.stderr.endswith("wrote s3://bucket/by command\n"), done.stderr
    assert "sending model.safetensors" in done.stderr
    done = run("verify", "s3://bucket/by command", "--against", SOURCE)
    assert done.returncode == 0 and "s3://bucket/by command is whole" in done.stdout, done.stderr
    done = run("audit", "s3://bucket/by command", AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert done.returncode == 4 and "needs credentials in the environment: AWS_ACCESS_KEY_ID" in done.stderr, (
        done.stderr
    )
    assert len(done.stderr.splitlines()) == 1
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("rpq-")]
