"""The comparison of training: rows have the bytes that they are compared at, every row trains, the ImageNet recipe runs and goes on."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import rpq_convert as rpq
from benchmarks.training import entanglement, loop, page, sizes, study
from benchmarks.training.rows import ROWS, Row, int8
from benchmarks.training.tasks import TASKS, Data, Task
from rpq_convert.layers.surgery import layers_of


def tiny() -> tuple[Task, Data]:
    """Return a task of a second: two linear layers that tell which half of their inputs is larger."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(900, 64, generator=draw)
    y = (x[:, :32].sum(1) > x[:, 32:].sum(1)).long()
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 500), (500, 700), (700, 900))]

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2))

    return Task("tiny", build, (512, 1024), 1, 40, 50, 1e-2, "accuracy"), Data(*parts)


@pytest.mark.parametrize("row", [r for r in ROWS if not r.pretrained], ids=lambda r: f"{r.name} {r.times}")
@pytest.mark.parametrize("task", [pytest.param(t, marks=pytest.mark.slow) for t in TASKS] + ["tiny"])
def test_every_row_has_at_most_its_bytes_and_uses_them(task, row):
    task = tiny()[0] if task == "tiny" else TASKS[task]
    for width in task.widths:
        model = row.build(task, width)
        dense = sizes.weight_bytes(task.build(width))
        assert 0.75 * dense / row.times < sizes.weight_bytes(model) <= dense / row.times


def test_bytes_are_those_of_the_file(tmp_path):
    task, _ = tiny()
    model = Row("rpq", 4).build(task, 512)
    rpq.save(rpq.round_to_stored(model), tmp_path / "out")
    assert sizes.weight_bytes(model) == sum(
        t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values()
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.name} {r.times}")
def test_every_row_learns(row):
    task, data = tiny()
    model, seconds = loop.run(task, data, row, 512, 3e-3, 0, 150)
    assert seconds > 0 and loop.judge(task, model, data.test) > 0.8
    assert (row.kind == "rpq") == bool(layers_of(model))


def test_a_trained_dense_model_is_made_small_in_every_way():
    task, data = tiny()
    found = loop.results(task, data, Row("dense"), 512, 1e-2, 0, 40)
    assert [x["row"] for x in found][:2] == ["dense", "dense, then int8"]
    for x in found[1:]:
        assert x["accuracy"] > 0.7 and (x["row"].endswith("int8") or x["bytes"] <= found[0]["bytes"] / x["times"])


def test_int8_rounds_each_row_by_its_own_largest_weight():
    layer = nn.Linear(128, 64)
    before, size = layer.weight.detach().clone(), sizes.weight_bytes(layer)
    assert int8(layer) == size - 3 * layer.weight.numel() + 4 * 64
    step = before.abs().amax(1, keepdim=True) / 127
    assert bool(((layer.weight - before).abs() <= step / 2 * 1.001).all())


def test_equal_sub_vectors_dead_codewords_and_rank():
    model = nn.Sequential(nn.Linear(64, 512, bias=False))
    entanglement.coded(model, {"books": 1, "dim": 2})
    (weight,) = layers_of(model).values()
    weight.codes.copy_(torch.zeros_like(weight.codes))
    assert entanglement.codes_of(weight) == (1.0, 255 / 256)
    assert entanglement.effective_rank(torch.eye(8)) == pytest.approx(1)
    assert entanglement.effective_rank(torch.ones(8, 8)) == pytest.approx(1 / 8, rel=1e-3)


def test_a_run_that_is_there_is_not_run_again_and_rates_climb(tmp_path, monkeypatch):
    task, data = tiny()
    task = replace(task, rate=1e-4)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "lines.jsonl")
    best = study._rate(task, 512, Row("dense"), data)
    tried = [x for x in study.lines() if x["kind"] == "rate"]
    assert len(tried) >= 4 and best == max(tried, key=lambda x: x["accuracy"])["rate"] > 1e-4
    monkeypatch.setattr(loop, "run", None)  # would fail
    assert study._rate(task, 512, Row("dense"), data) == best


def test_the_page_says_what_the_lines_say():
    facts = {"kind": "run", "task": "opt", "width": 128, "rate": 1e-3}
    lines = [
        {**facts, "row": "dense", "times": 1, "seed": s, "bytes": 800, "trained": 200, "loss": 2.0 + s / 10} for s in (0, 2)
    ] + [{**facts, "row": "RPQ, random codes", "times": 4, "seed": 0, "bytes": 200, "trained": 50, "loss": 2.2}]  # fmt: skip
    table = page.rows(lines)
    assert "| dense | 800 | 1.0 | 2.100 ± 0.141 |" in table
    assert "| RPQ, random codes | 200 | 4.0 | 2.200 | +4.8 % | 50 | 0.001 | 1 |" in table


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "rpq"])
def test_the_imagenet_recipe_runs_and_goes_on(tmp_path, model):
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in range(2):
            folder = tmp_path / "data" / part / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 80, (40, 48, 3)) + 120 * label
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.JPEG")
    shape = [
        "--image-size",
        "32",
        "--patch-size",
        "8",
        "--dim",
        "256",
        "--depth",
        "1",
        "--heads",
        "4",
        "--mlp-dim",
        "1024",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "benchmarks.training.imagenet",
    ]
    command += ["--data", str(tmp_path / "data"), "--model", model, "--output", str(tmp_path / "out"), *shape]

    def epochs(count: int) -> list[dict[str, float]]:
        told = subprocess.run(
            [*command, "--batch", "6", "--workers", "0", "--epochs", str(count)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]

    assert [x["epoch"] for x in epochs(1)] == [1]
    rest = epochs(3)
    assert [x["epoch"] for x in rest] == [2, 3] and all(math.isfinite(x["pictures a second"]) for x in rest)
    assert (tmp_path / "out" / "model").exists() == (model == "rpq")
