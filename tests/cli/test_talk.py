"""What commands say while they work: progress, --quiet, --verbose, --log, versions, completion, words of the command line."""

import inspect
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from factories import small
from paths import SUPPORT
from rpq_convert.cli import group, main, show, talk
from rpq_convert.cli.wording import as_flags
from safetensors.torch import save_file
from typer.testing import CliRunner

from rpq_convert import __version__
from rpq_convert.report import measured

BINARIES = Path(sys.executable).parent


def rpq(*args, code=0, command=group):
    done = CliRunner().invoke(command, [str(a) for a in args], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    file = tmp_path_factory.mktemp("bare") / "small.safetensors"
    save_file(small().state_dict(), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SUPPORT))
        yield file


HOW = ("--factory", "factories:small", "--bits", 8)


def test_every_command_takes_what_decides_how_much_is_said():
    for command in group.registered_commands:
        assert {"quiet", "verbose", "log"} <= set(inspect.signature(command.callback).parameters), command.callback


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_by_either_name(flag):
    for args in ((flag,), ("plan", flag), ("serve", flag)):
        shown = rpq(*args).stdout
        assert "Usage:" in shown and "RPQ_TRACEBACK=1" in shown
    assert "Usage:" in rpq(flag, command=main).stdout


def test_help_says_what_sizes_keep():
    said = " ".join(rpq("convert", "-h").stdout.split())
    for bits in {r.bits for r in measured.rows() if (r.model, r.effort) == ("smollm2", measured.SELF)}:
        row = measured.row("smollm2", bits, measured.SELF)  # of the codes that --bits means
        assert f"{row.bits:g} bits {row.value:.2f}x ({row.smaller:.1f}x smaller)" in said


def test_the_version():
    assert rpq("--version").stdout == rpq("--version", command=main).stdout == f"rpq-convert {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("rpq recal", {"recalibrate"}),
        ("rpq plan x --preset 4", {"4bit"}),
        ("rpq plan x --axis ", {"out", "in"}),
        ("rpq convert x --calib", {"--calibrate"}),
    ],
)
def test_a_shell_completes(typed, offered):
    words = {"_RPQ_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = subprocess.run([BINARIES / "rpq"], env={**os.environ, **words}, capture_output=True, text=True)
    assert set(done.stdout.split()) == offered


def test_a_log_has_a_line_of_json_for_each_event(bare, tmp_path):
    log = tmp_path / "log.jsonl"
    rpq("convert", bare, *HOW, "--out", tmp_path / "out", "--log", log, "-q")
    rpq("plan", tmp_path / "none.safetensors", "--log", log, code=4)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "event", "name", "seconds", "error", "bytes"} <= set(e) for e in events)
    first, *_ = events
    assert first["event"] == "begun" and first["name"] == "convert" and first["versions"]["rpq-convert"] == __version__
    fits = [e for e in events if e["event"] == "fit"]
    assert {e["name"] for e in fits} == {"0.weight", "1.weight", "3.weight"}
    assert all(
        e["seconds"] >= 0 and e["error"] < 1e-3 and e["bytes"] > 4000 and e["output_error"] is None for e in fits
    )
    assert [e["event"] for e in events if e["name"] in ("convert", "plan")] == ["begun", "done", "begun", "failed"]
    assert "does not exist" in events[-1]["text"]
    assert "error: " in rpq("plan", bare, *HOW, "--log", tmp_path / "no" / "log", code=4).stderr


def test_without_a_terminal_a_line_says_how_far_it_is(bare, tmp_path, monkeypatch):
    how = (*HOW[:2], "--bits", 4, "--effort", "fast", "--workers", 1, "--no-check")
    quiet = rpq("convert", bare, *how, "--out", tmp_path / "short")
    assert "of 3 weights" not in quiet.stderr  # it took no half minute
    monkeypatch.setattr(show, "EVERY", 0.0)
    said = rpq("convert", bare, *how, "--out", tmp_path / "out").stderr.splitlines()
    counts = [line for line in said if "weights" in line and "MB" in line]
    assert counts[0].startswith("0 of 3 weights, 0.0 of 0.") and counts[-1].startswith("3 of 3 weights, 0.")
    assert "about " in counts[1] and counts[1].endswith(" left") and max(map(len, counts)) <= 60
    assert not any("0.weight" in line for line in said)
    assert "] 0.weight: weight error" in rpq("convert", bare, *how, "--out", tmp_path / "all", "--verbose").stderr


@pytest.mark.parametrize(
    ("what", "done", "total", "said"),
    [
        ("12 of 40 weights, " + show.out_of(1.2e9, 4e9), 1.2e9, 4e9, "12 of 40 weights, 1.2 of 4.0 GB, about 3 min left"),
        ("uploading model-00001-of-2.safetensors and what is more", 1, 2, "uploading m…tensors and what is more: 50 %, about 3 min left"),
        ("3 of 20 windows", 3, 20, "3 of 20 windows, about 3 min left"),
        ("step 3 of 20: loss 0.5", 3, 20, "step 3 of 20: loss 0.5, about 3 min left"),
        ("weight", 0, 0, "weight: about 3 min left"),
    ],
)  # fmt: skip
def test_a_line_of_progress_fits_sixty_columns(what, done, total, said):
    line = show.status(what, done, total, "about 3 min left")
    assert line == said and len(line) <= 60


def test_a_line_comes_while_nothing_is_told(capfd, monkeypatch):
    monkeypatch.setattr(show, "TICK", 0.01)
    monkeypatch.setattr(show, "EVERY", 0.02)
    with show.progress() as tell:
        tell("one long fit", 1, 2)
        seen = ""
        while seen.count("one long fit: 50 %") < 2:
            seen += capfd.readouterr().err


def test_verbose_says_versions_what_was_chosen_and_times(bare):
    said = rpq("plan", bare, *HOW, "--verbose").stderr
    assert (
        "torch 2" in said and "weights" in said and "stay dense" in said and "planned: " in said and "plan took" in said
    )
    assert rpq("plan", bare, *HOW).stderr == ""


def test_quiet_holds_libraries_back_too(capfd):
    with talk.talking("x", {}, quiet=True, verbose=False, log=None):
        warnings.warn("a library's", stacklevel=1)
        talk.say("talk")
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error" and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
        with show.progress() as tell:
            tell("work", 1, 2)
        talk.warn(("ours: use fit='random'",))
    assert capfd.readouterr().err == "warning: ours: use --fit random\n"
    assert "TRANSFORMERS_VERBOSITY" not in os.environ


def test_no_more_than_a_line_every_few_seconds(capfd, monkeypatch):
    def work():
        with show.progress() as tell:
            for i in range(1, 101):
                tell(f"step {i}", i, 100)

    work()
    assert capfd.readouterr().err == ""  # it took no seconds
    monkeypatch.setattr(show, "EVERY", 0.0)
    work()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("step 1: 1 %, about ") and lines[0].endswith(" left") and lines[-1] == "step 100: 100 %"


@pytest.mark.parametrize(
    ("seconds", "said"), [(8.4, "8 s"), (99, "99 s"), (190, "3 min"), (5 * 3600, "5 h 0 min"), (4830, "80 min")]
)
def test_times_in_the_unit_that_fits(seconds, said):
    assert show.duration(seconds) == said


def test_what_an_earlier_run_did_says_nothing_of_the_pace():
    pace = show.Pace()
    pace.skip(90)
    assert pace.left(90, 100) == "" and pace.left(95, 100).startswith("about ") and pace.left(100, 100) == ""


def test_a_bar_fits_sixty_columns(monkeypatch):
    leader, follower = os.openpty()
    with ThreadPoolExecutor(1) as pool, open(follower, "w") as terminal:
        seen = pool.submit(_drain, leader)
        monkeypatch.setattr(sys, "stderr", terminal)
        for name, value in {"TERM": "xterm", "COLUMNS": "60", "NO_COLOR": "1"}.items():
            monkeypatch.setenv(name, value)
        with show.progress() as tell:
            tell("model.layers.31.self_attn.an_uncommonly_long_name.weight", 1, 8)
            tell("model.layers.31.self_attn.an_uncommonly_long_name.weight", 2, 8)
        monkeypatch.undo()
        terminal.close()
    os.close(leader)
    lines = [line for line in seen.result().replace("\r", "\n").splitlines() if "25%" in line]
    assert lines and all(len(line.rpartition("\x1b[2K")[2]) <= 60 for line in lines)
    assert "model.layers" in lines[0] and "━" in lines[0] and "left" in lines[0]


def _drain(leader):
    data = b""
    with suppress(OSError):
        while part := os.read(leader, 4096):
            data += part
    return data.decode()


@pytest.mark.parametrize(
    ("python", "command_line"),
    [
        ("small exists; pass overwrite=True", "small exists; pass --overwrite"),
        ("pass allow_pickle=True to read", "pass --allow-pickle to read"),
        ("for your own model give factory='package:callable'", "for your own model give --factory package:callable"),
        ("use scales='float32'", "use --rule '*:scales=float32'"),
        ("pass private=False, or", "pass --public, or"),
        ("rule 'a:grow=True,fit=x' sets", "rule 'a:grow=True,fit=x' sets"),
        ("the file says name='x'", "the file says name='x'"),
    ],
)
def test_the_librarys_keywords_become_options(python, command_line):
    assert as_flags(python) == command_line
