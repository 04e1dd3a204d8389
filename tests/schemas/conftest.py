"""A converted folder of each form, and the data of every kind of file in it."""

import json

import pytest
import torch
from safetensors.torch import save_file
from wrong_files import net

import rpq_convert as rpq
from rpq_convert.folders import Measured, WithBase, evaluate_folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A place with `base.safetensors`, and what was converted from it: `out`, and in several files, `sharded`."""
    place = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    save_file(net().state_dict(), place / "base.safetensors")
    options = {"factory": net, "bits": 4, "executor": "serial"}
    rpq.convert_checkpoint(place / "base.safetensors", place / "out", **options)
    rpq.convert_checkpoint(place / "base.safetensors", place / "sharded", max_shard_size="20KB", **options)
    save_file({"input": torch.arange(60).reshape(3, 20)}, place / "data.safetensors")
    which = WithBase(place / "base.safetensors", place / "out", net)
    evaluate_folder(which, Measured(inputs=place / "data.safetensors"), keep=True)
    return place


@pytest.fixture(scope="session")
def records(whole):
    """Kind -> data of a real file."""
    out = whole / "out"
    read = {name: json.loads((out / f"rpq_{name}.json").read_text()) for name in ("plan", "report", "manifest")}
    assert read["report"]["evaluations"] and read["plan"]["jobs"] and read["plan"]["skips"]
    config = json.loads((out / "config.json").read_text())
    index = json.loads((whole / "sharded" / "model.safetensors.index.json").read_text())
    digest = read["manifest"]["files"]["config.json"]["sha256"]
    facts = {
        "name": "a",
        "error": 0.5,
        "dead": 3,
        "seconds": 0.25,
        "zero_row": 1,
        "inputs": 5,
        "worst": 0.75,
        "source": digest,
    }
    source = {
        "files": [{"name": "a.safetensors", "bytes": 5, "header": digest, "sample": digest, "sha256": digest}],
        "seen": [["/a", 5, 6]],
    }
    preset = {
        "description": "x", "rules": [{"match": "*", "bits": 2.5}],
        "settings": {
            "bits": 4.5, "dim": 2, "stages": 1, "books": 1, "num_codebooks": 2, "axis": "in", "codebook_dtype": "float16",
            "scales": "none", "rotation": 8, "outliers": 0.005, "fit": "random", "grow": True, "skip": False, "view": "out in",
        },
    }  # fmt: skip
    tuning = {"mark": "x", "step": 3, "best_step": 2, "history": [[0, 1.5]], "since": 1, "share": 1.0, "began": 0}
    return read | {
        "config": config, "index": index, "piece": facts, "preset": preset, "tuning": tuning,
        "sensitivities": {"a": 1.5, "b.weight": {"2": 0.5, "4": 0.25}}, "source": source,
        "written": {"a.safetensors": {"bytes": 5, "sha256": digest, "tensors": {"x": digest}, "not_finite": ["x"]}},
        "lock": {"pid": 5, "host": "here", "command": "rpq convert a", "since": "2026-01-01T00:00:00+00:00"},
    }  # fmt: skip
