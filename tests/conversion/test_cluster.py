"""Conversions on a Ray cluster: two raylets on this machine, of which one is killed, and a coordinator that is."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import save_file
from stores import fresh
from torch import nn

import rpq_convert as rpq
from rpq_convert.conversion import cluster
from rpq_convert.conversion.cluster import Ask
from rpq_convert.conversion.options import RunOptions
from rpq_convert.errors import PlanError
from rpq_convert.storage.folder import open_folder
from rpq_convert.storage.reader import Witnessed

HOW = {"bits": 8, "progress": False}


def build():
    return nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("source") / "w.safetensors"
    save_file(build().state_dict(), file)
    return file


# without Ray


def test_options_of_a_cluster_that_would_do_nothing(source, tmp_path):
    for executor in ("threads", "processes"):
        with pytest.raises(PlanError, match="address names a Ray cluster, so it would do nothing without executor ray"):
            rpq.convert_checkpoint(source, tmp_path / "out", factory=build, executor=executor, address="auto", **HOW)
    assert RunOptions().address is None and not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_named_where_it_is_missing(source, tmp_path):
    with pytest.raises(PlanError, match=r"pip install 'rpq-convert\[ray\]'"):
        rpq.convert_checkpoint(source, tmp_path / "out", factory=build, executor="ray", **HOW)


def test_nothing_imports_ray_unasked():
    assert not re.search(r"^(import|from) ray", Path(cluster.__file__).read_text(), re.MULTILINE)


def test_a_machine_knows_whether_it_sees_the_source(source, tmp_path):
    here = tmp_path / "w.safetensors"
    here.write_bytes(source.read_bytes())
    ask = pickle.loads(pickle.dumps(Ask.of(Witnessed(open_folder(here)), None, None)))
    assert ask.reads() and not ask.writes()
    data = bytearray(source.read_bytes())
    data[-200_000:] = bytes(200_000)
    here.write_bytes(bytes(data))
    assert not ask.reads()  # the same path and size, other values
    here.unlink()
    assert not ask.reads()
    assert Ask.of(Witnessed({"0.weight": torch.zeros(2)}), None, None).source is None  # in memory: it is sent


# with Ray


@pytest.fixture(scope="module")
def raylets():
    """Start a head and give what adds a raylet to it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ |= cluster.QUIET
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield started
    started.shutdown()


def convert(source, out, **how):
    rpq.convert_checkpoint(source, out, **{"factory": build, **HOW, **how})
    return (out / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_raylet_costs_its_tasks_at_most(raylets, source, tmp_path):
    second, seen = raylets.add_node(num_cpus=1), []

    def told(job, encoded):
        seen.append(encoded)
        if len(seen) == 3:
            raylets.remove_node(second, allow_graceful=False)

    found = convert(source, tmp_path / "ray", executor="ray", address=raylets.address, progress=told)
    assert found == convert(source, tmp_path / "threads")
    assert len(seen) == 12 and not any(e.tensors for e in seen)  # each was written by its worker
    manifests = [(tmp_path / name / "rpq_manifest.json").read_text() for name in ("ray", "threads")]
    assert manifests[0].split('"made"')[1] == manifests[1].split('"made"')[1]


@pytest.mark.slow
def test_a_killed_coordinator_goes_on_from_the_pieces(raylets, source, tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}, {str(ROOT / "tests/support")!r}]
from test_cluster import *
convert({str(source)!r}, Path("out"), executor="ray", address={raylets.address!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as run:
        pieces = tmp_path / "out.partial/pieces"
        while run.poll() is None and len(list(pieces.glob("*.safetensors"))) < 2:
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
    assert len(list(pieces.glob("*.safetensors"))) < 12, "killed too late"
    seen = []
    found = convert(
        source, tmp_path / "out", executor="ray", address=raylets.address, progress=lambda job, e: seen.append(e)
    )
    assert seen.count(None) >= 2 and len(seen) == 12
    assert found == convert(source, tmp_path / "threads")


@pytest.mark.slow
def test_what_machines_do_not_see_is_sent_to_them(raylets, source, tmp_path, caplog):
    """A store in this process's memory, weights in memory, and a calibrated conversion, whose results come back."""
    import fsspec

    fresh()
    fsspec.filesystem("memory").pipe_file("/cluster/w.safetensors", source.read_bytes())
    how = {"executor": "ray", "address": raylets.address}
    assert convert("memory://cluster/w.safetensors", tmp_path / "sent", **how) == convert(source, tmp_path / "here")
    assert "do not see the source, so its tensors are sent" in caplog.text
    torch.manual_seed(1)
    data = {"calibration": [torch.randn(64, 256)]}
    assert convert(source, tmp_path / "fed", **how, **data) == convert(source, tmp_path / "fed here", **data)


@pytest.mark.slow
def test_no_cluster_is_one_line(source, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(PlanError, match=r"no Ray cluster answers at 127.0.0.1:1: "):
        convert(source, tmp_path / "out", executor="ray", address="127.0.0.1:1")
    assert not list(tmp_path.iterdir())
