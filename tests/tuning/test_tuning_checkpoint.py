"""Tuning goes on where it stopped, to the same bits: after a kill, and after its time was up."""

import copy
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import TimeLimitReached, TuneError
from rpq_convert.tuning.blocks import tune_blocks_with
from rpq_convert.tuning.checkpoint import Checkpoint
from rpq_convert.tuning.options import TuneOptions
from rpq_convert.tuning.tune import tune_with

OPTIONS = TuneOptions(steps=6, every=2, loss="mse")


@pytest.fixture(scope="module")
def pair():
    """A dense stack of blocks, its conversion, and inputs."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3))).eval()
    model = copy.deepcopy(dense)
    rpq.convert(model, preset="4bit", grow=True)
    return dense, model, list(torch.randn(8, 4, 64))


def same(one, other):
    return all(
        torch.equal(t, other.state_dict()[k]) for k, t in one.state_dict().items() if isinstance(t, torch.Tensor)
    )


def test_a_run_whose_time_is_up_goes_on_to_the_same_bits(pair, tmp_path):
    dense, whole = pair[0], copy.deepcopy(pair[1])
    expected = tune_with(OPTIONS, whole, dense, pair[2])
    kept, steps = Checkpoint(tmp_path / "state" / "all.safetensors", is_over=lambda: True), []
    for done in range(1, 6):  # a step at a time
        parts = copy.deepcopy(pair[1])
        with pytest.raises(TimeLimitReached, match=f"{done} of 6 steps of tuning are done and kept"):
            tune_with(OPTIONS, parts, dense, pair[2], checkpoint=kept, progress=lambda step, loss: steps.append(step))
    parts = copy.deepcopy(pair[1])
    assert tune_with(OPTIONS, parts, dense, pair[2], checkpoint=kept) == expected
    assert steps == [1, 2, 3, 4, 5] and same(whole, parts) and not kept.file.exists()


def test_blocks_that_are_done_are_not_tuned_again(pair, tmp_path):
    dense, whole = pair[0], copy.deepcopy(pair[1])
    expected = tune_blocks_with(OPTIONS, whole, dense, pair[2])
    kept, told = Checkpoint(tmp_path), []

    def kill(what, done, total):
        if done == 9:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_blocks_with(OPTIONS, copy.deepcopy(pair[1]), dense, pair[2], checkpoint=kept, progress=kill)
    with pytest.raises(TuneError, match=r"block-0000\.safetensors is of another run"):
        tune_blocks_with(OPTIONS, copy.deepcopy(pair[1]), dense, pair[2][1:], checkpoint=kept)
    parts = copy.deepcopy(pair[1])
    found = tune_blocks_with(
        OPTIONS, parts, dense, pair[2], checkpoint=kept, progress=lambda what, done, total: told.append(done)
    )
    assert found == expected and same(whole, parts) and told[0] == 9


def test_a_state_that_changed_on_the_disk_is_refused(pair, tmp_path):
    kept = Checkpoint(tmp_path / "all.safetensors", is_over=lambda: True)
    with pytest.raises(TimeLimitReached):
        tune_with(OPTIONS, copy.deepcopy(pair[1]), pair[0], pair[2], checkpoint=kept)
    data = bytearray(kept.file.read_bytes())
    data[-1] ^= 1
    kept.file.write_bytes(data)
    with pytest.raises(TuneError, match=r"all\.safetensors is damaged: its content is not what was written; remove it"):
        tune_with(OPTIONS, copy.deepcopy(pair[1]), pair[0], pair[2], checkpoint=kept)


def command(*arguments, until=lambda: False):
    """Run the command in a process of its own, killed when something is so; return its exit code and last words."""
    run = [sys.executable, "-c", "from rpq_convert.cli import group; group()", *map(str, arguments)]
    with subprocess.Popen(
        run, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not until():
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        return process.wait(), process.stderr.read().strip().splitlines()[-1]


def weights(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_killed_commands_go_on_to_the_same_bytes(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\ndef build():\n    f = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())\n"
        "    return torch.nn.Sequential(f(), f(), f()).eval()\n"
    )
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)))
    base, data = tmp_path / "net.safetensors", tmp_path / "data.safetensors"
    save_file(net.state_dict(), base)
    save_file({"input": torch.randn(40, 4, 64)}, data)
    own = ("--factory", f"{tmp_path / 'net.py'}:build")
    best = ("convert", base, *own, "--preset", "4bit", "--grow", "--effort", "best", "--calibrate", data, "--no-check")
    assert command(*best, "--out", tmp_path / "a")[0] == 0
    state, pieces = tmp_path / "b.tuning.partial" / "all.safetensors", tmp_path / "b.partial" / "pieces"
    assert command(*best, "--out", tmp_path / "b", until=lambda: any(pieces.glob("*.safetensors")))[0] == -9
    assert command(*best, "--out", tmp_path / "b", until=state.exists)[0] == -9
    code, said = command(*best, "--out", tmp_path / "b", "--time-limit", "0.01s")
    assert code == 6 and said.endswith("of 100 steps of tuning are done and kept; run the same command again to go on")
    others = [a if a != "4bit" else "2bit" for a in best]
    assert command(*others, "--out", tmp_path / "b")[1].startswith(
        f"error: {tmp_path / 'b'} is calibrated and not tuned yet"
    )
    assert command(*best, "--out", tmp_path / "b")[0] == 0 and weights(tmp_path / "b") == weights(tmp_path / "a")
    tune = ("tune", base, tmp_path / "a", "--data", data, *own, "--steps", 60, "--blocks", 40)
    assert command(*tune, "--out", tmp_path / "c")[0] == 0
    blocks = tmp_path / "d.tuning.partial"
    for name in ("block-0001.safetensors", "all.safetensors"):
        assert command(*tune, "--out", tmp_path / "d", until=(blocks / name).exists)[0] == -9
    assert command(*tune, "--out", tmp_path / "d")[0] == 0 and weights(tmp_path / "d") == weights(tmp_path / "c")
    left = itertools.chain(tmp_path.glob("*.partial"), tmp_path.glob("*.lock"))
    assert not list(left) and load_file(tmp_path / "d" / "model.safetensors")
