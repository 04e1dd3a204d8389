"""Keywords that contradict each other or would do nothing are refused, and a failed try is no obstacle for the next one."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rpq_convert as rpq
from rpq_convert.errors import CalibrationError, FolderError, PlanError, SourceError, TuneError

DATA = [torch.zeros(2, 64)]


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


class Mixed(nn.Module):
    """Two weights that data reaches one after another."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "net.safetensors"
    save_file(build().state_dict(), path)
    return path


COMBINATIONS = [  # keywords, error, what is said
    ({"bits": 4, "dim": 2}, PlanError, "give one of bits, dim, not several"),
    ({"preset": "4bit", "dim": 2}, PlanError, "give one of preset, dim"),
    ({"codebooks": 2, "dim": 2}, PlanError, "give one of codebooks, dim"),
    ({"codebooks": "heads", "bits": 4}, PlanError, "give one of bits, codebooks"),
    ({"target_size": "1MB", "codebooks": 2}, PlanError, "give one of target_size, codebooks"),
    ({"stages": 2}, PlanError, "stages needs dim"),
    ({"bits": 4, "stages": 2}, PlanError, "stages needs dim"),
    ({"preset": "4bit", "sensitivity": "shape"}, PlanError, "sensitivity serves a target_size"),
    ({"max_error": 0.1, "sensitivity": {"0.weight": 1.0}}, PlanError, "sensitivity serves a target_size"),
    ({"max_error": 0.1, "fit": "random"}, PlanError, "max_error is of a fit"),
    ({"bits": 4, "fit": "random", "calibration": DATA}, PlanError, "calibration serves a fit"),
    ({"bits": 4, "tokenizer": "words"}, PlanError, "tokenizer reads the texts of calibration"),
    ({"bits": 4, "executor": "serial", "workers": 2}, PlanError, "the serial executor has one worker, not 2"),
    ({"bits": 4, "executor": "cluster"}, PlanError, "executor must be serial, threads, processes or ray, not 'cluster'"),
    ({"bits": 4, "workers": 0}, PlanError, "workers must be a whole number of at least 1"),
    ({"bits": 4, "workers": 1.5}, PlanError, "workers must be a whole number"),
    ({"target_size": "fifty"}, PlanError, "size 'fifty' is not a number"),
    ({"target_size": [5]}, PlanError, r"size \[5\] is not a number"),
    ({"bits": 4, "max_shard_size": "big"}, PlanError, "size 'big' is not a number"),
    ({"bits": True}, PlanError, "bits must be a number between 0.05 and 8, not True"),
    ({"bits": 4, "axis": "up"}, PlanError, "axis must be out or in, not 'up'"),
    ({"preset": 4}, PlanError, "preset must be a name or the path of a .toml file, not 4"),
    ({"preset": "4bits"}, PlanError, "unknown preset '4bits'"),
    ({"codebooks": [2]}, PlanError, "codebooks must be 'heads' or a number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("keywords", "error", "says"), COMBINATIONS, ids=lambda v: ", ".join(v) if isinstance(v, dict) else ""
)
def test_keywords_that_do_not_go_together(keywords, error, says, file, tmp_path):
    model = build()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(error, match=says):
        rpq.convert(model, grow=True, **keywords)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with pytest.raises(error, match=says):
        rpq.convert_checkpoint(file, tmp_path / "out", factory=build, grow=True, **keywords)
    assert not list(tmp_path.iterdir())


def test_other_calls_that_would_pass_over_something(file, tmp_path):
    model, plan = build(), rpq.plan(build(), bits=4, grow=True)
    calls = {
        "a plan decides everything, so bits, seed would do nothing": partial(rpq.convert, model, plan=plan, bits=4, seed=1),
        "so bits would do nothing": partial(rpq.convert_checkpoint, file, tmp_path / "out", plan=plan, bits=4, factory=build),
        "is a local path, so it has no revision 'v2'": partial(rpq.plan, file, bits=4, revision="v2"),
        "state_dict chooses among those of a pickled file": partial(rpq.plan, file, bits=4, state_dict="ema"),
        "no revision 'v3'": partial(rpq.load, tmp_path, revision="v3"),
        "no revision 'v4'": partial(rpq.audit, tmp_path, revision="v4"),
        "rate must be more than 0": partial(rpq.tune, model, build(), DATA, rate=0),
    }  # fmt: skip
    for says, call in calls.items():
        with pytest.raises((PlanError, SourceError, TuneError), match=says):
            call()
    rpq.convert_checkpoint(file, tmp_path / "out", plan=plan, factory=build)  # where it comes from is no part of a plan


def test_sensitivities_serve_a_curve(file):
    known = {"0.weight": 1.0, "2.weight": 2.0}
    assert len(rpq.sweep(file, factory=build, sensitivity=known, points=3).mixed) >= 1
    assert rpq.plan(file, factory=build, target_size="9kB", sensitivity=known, grow=True).jobs


def test_sizes_of_any_number_type():
    assert rpq.plan(build(), target_size=9e3, grow=True, sensitivity="shape").file_bytes <= 9000


@pytest.mark.parametrize(
    "wrong",
    [[torch.zeros(2, 63)], [{"y": torch.zeros(2, 64)}], [torch.full((2, 64), torch.nan)]],
    ids=["shape", "name", "nan"],
)
def test_data_of_another_model_leaves_nothing(wrong, tmp_path):
    save_file(Mixed().state_dict(), tmp_path / "net.safetensors")
    call = partial(
        rpq.convert_checkpoint, tmp_path / "net.safetensors", tmp_path / "out", factory=Mixed, bits=4, grow=True
    )
    with pytest.raises((CalibrationError, RuntimeError)):
        call(calibration=wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    call(calibration=[torch.randn(9, 64)])
    assert rpq.verify(tmp_path / "out")


def test_what_an_earlier_run_left_is_said_and_kept(file, tmp_path):
    """A run that did nothing is no obstacle; one that did is kept, and it is said in what it differs."""

    def stop(job, encoded):
        raise KeyboardInterrupt

    call = partial(rpq.convert_checkpoint, file, tmp_path / "out", factory=build, grow=True)
    with pytest.raises(KeyboardInterrupt):
        call(bits=4, progress=stop)
    with pytest.raises(
        FolderError,
        match=r"unfinished run with other settings \(bits 4\); repeat them to go on; delete it, or pass overwrite=True",
    ):
        call(bits=3)
    for piece in (tmp_path / "out.partial" / "pieces").iterdir():
        piece.unlink()
    call(bits=3)
    assert rpq.verify(tmp_path / "out") and rpq.audit(tmp_path / "out").options["bits"] == 3


def test_a_folder_of_that_name_with_anything_else_is_not_touched(file, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(FolderError, match="unfinished run"):
        rpq.convert_checkpoint(file, tmp_path / "out", factory=build, bits=4, grow=True)
    assert (tmp_path / "out.partial" / "thesis.txt").is_file()


def test_memory_is_asked_for_and_kept(tmp_path):
    """A conversion that may take no more than the process has is refused before anything is written; a larger limit changes no byte."""
    save_file(build().state_dict(), tmp_path / "m.safetensors")
    how = {"factory": build, "bits": 4, "grow": True, "progress": False}
    with pytest.raises(PlanError, match=r"0\.weight .* of memory while it is fitted"):
        rpq.convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", max_memory="1MB", **how)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(PlanError, match="size 'much'"):
        rpq.convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", max_memory="much", **how)
    for name, limit in (("out", "64GiB"), ("free", None)):
        rpq.convert_checkpoint(tmp_path / "m.safetensors", tmp_path / name, max_memory=limit, **how)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "free"))
    assert first == second
