"""A checkpoint eight times larger than the memory that the operating system allows is converted, verified and restored.

The limit is RLIMIT_DATA, set after the imports and a small conversion of the same kind to what the process has then plus ALLOWED bytes: it
counts every private writable page that is mapped, touched or not, and no shared library. Reading the whole checkpoint
under the same limit fails, which shows that the limit is real.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from rpq_convert.core.safetensors import header

ALLOWED = 96 * 2**20
SIDE, LAYERS = 1024, 193  # weights of 4 MiB
SCRIPT = """
import json, re, resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
import rpq_convert as rpq
from rpq_convert.storage.folder import open_folder

source, out, action = sys.argv[1:4]
allowed, layers = map(int, sys.argv[4:])

def build(side=1024, layers=layers):
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(layers)))

def convert(source, out, factory):
    rpq.convert_checkpoint(
        source, out, factory=factory, executor="threads", workers=2, bits=4, max_shard_size="8MB"
    )
    rpq.verify(out)
    rpq.restore_checkpoint(out, out + "-dense", max_shard_size="8MB")

# loads kernels and what draws the chart: entropy-coded weights, and enough of them
small = out + "-before-" + action
save_file(build(128, 4).state_dict(), small + ".safetensors")
convert(small + ".safetensors", small, lambda: build(128, 4))
open_folder(source)["0.weight"]

def data():
    return int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

limit = data() + allowed
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if action == "read":
    tensors = open_folder(source)
    kept = [tensors[k] for k in tensors]
else:
    convert(source, out, build)
"""


@pytest.fixture
def checkpoint(tmp_path):
    entries = {f"{i}.weight": (torch.float32, (SIDE, SIDE)) for i in range(LAYERS)}
    head = header(entries)
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for _ in entries:
            f.write(torch.randn(SIDE, SIDE, generator=generator).numpy().tobytes())
    return path


def run(path, action):
    command = [sys.executable, "-c", SCRIPT, str(path), str(path.parent / "out"), action, str(ALLOWED), str(LAYERS)]
    # glibc would keep freed blocks of this size in its heap, with holes; mapped ones go back to the system at once
    alone = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return subprocess.run(command, capture_output=True, text=True, env=alone)


@pytest.mark.slow  # minutes on two cores
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone")
def test_a_checkpoint_eight_times_the_allowed_memory(checkpoint):
    assert checkpoint.stat().st_size >= 8 * ALLOWED
    whole = run(checkpoint, "read")
    assert whole.returncode != 0 and "allocate" in whole.stderr
    done = run(checkpoint, "convert")
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads((checkpoint.parent / "out" / "model.safetensors.index.json").read_text())
    assert len(set(written["weight_map"].values())) > 8
    dense = sorted((checkpoint.parent / "out-dense").glob("*.safetensors"))
    assert sum(p.stat().st_size for p in dense) >= 8 * ALLOWED
