"""`rpq diff`: two and more folders, reports and plans side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.report.compare import compare
from rpq_convert.report.schema import read_report

METRICS = {"perplexity": 32.31, "base_perplexity": 30.087}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(64, 128) for _ in range(5)), "head": nn.Linear(128, 64)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with `a/` and `b/` (4 bits; the head at 8), `c/` (2 bits, evaluated), and `plan.json` of 4 bits."""
    place = tmp_path_factory.mktemp("compared")
    for name, options in {"a": {}, "b": {"rules": [{"match": "head*", "bits": 8}]}, "c": {"bits": 2}}.items():
        made = model()
        rpq.convert(made, **{"bits": 4, **options})
        rpq.save(made, place / name)
    report = read_report(place / "c/rpq_report.json")
    found = {"on": "test.txt", "kind": "language model", "samples": 99, "metrics": METRICS}
    (place / "c/rpq_report.json").write_text(replace(report, evaluations=(found,)).to_json())
    (place / "plan.json").write_text(rpq.plan(model(), bits=4).to_json())
    return place


def named(folders, *names):
    return compare([(folders / n, read_report(folders / n / "rpq_report.json")) for n in names])


def test_groups_that_differ_are_named_once_with_their_bytes_and_errors(folders):
    found = named(folders, "a", "b")
    (group,) = found.groups
    a, b = (rows[0] for rows in group.rows)
    assert (group.name, group.count) == ("head.weight", 1) and a.bytes < b.bytes and a.error > b.error
    assert found.same == len(found.reports[0].rows) - 1
    text = found.to_terminal(80)
    assert (
        f"{a.bytes / 1e6:.3f}" in text
        and f"{b.error:.2g}" in text
        and "layers" not in text.split("groups that differ")[1]
    )
    assert found.options["rules"][0] is None


def test_three_and_their_metrics(folders):
    found = named(folders, "a", "b", "c")
    assert found.names == ("a", "b", "c")
    assert found.metrics["perplexity, test.txt (99 tokens)"] == [None, None, 32.31]
    assert [g.name for g in found.groups] == ["layers.{0…4}.weight", "head.weight"]
    assert found.groups[0].count == 5 and all(len(rows) == 5 for rows in found.groups[0].rows)
    data = json.loads(found.to_json())
    assert data["sizes"]["after, bytes"] == [r.bytes for r in found.reports] and data["options"]["bits"] == [4, 4, 2]
    assert data["groups"][0]["reports"][2]["bytes"] == sum(r.bytes for r in found.groups[0].rows[2])
    page = found.to_html()
    assert page == named(folders, "a", "b", "c").to_html() and "http" not in page
    assert page.count("<svg") == 1 and page.count("<details") == 2 and "32.31" in page


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(folders, width):
    for names in (("a", "b"), ("a", "b", "c"), ("a", "b", "c", "a", "b", "c", "a")):
        lines = named(folders, *names).to_terminal(width).splitlines()
        assert max(map(len, lines)) <= width


def test_a_calibrated_report_beside_a_plain_one_differs_in_its_errors_alone():
    plain = rpq.convert(model(), bits=4)
    rows = tuple(replace(r, output_error=0.001, worst_output=0.01) if r.decision == "rpq" else r for r in plain.rows)
    found = compare([("plain", plain), ("calibrated", replace(plain, rows=rows))])
    assert len(found.groups) == 2 and found.lines()["output error"] == ["–", "0.001"]
    text = found.to_terminal(100)
    assert "relative squared error of the weights" in text and "output on its calibration inputs" in text


def test_the_same_report_twice_and_models_that_have_nothing_in_common(folders):
    same = named(folders, "a", "a")
    assert same.names == ("a (1)", "a (2)") and not same.groups and "no group of parameters differs" in str(same)
    other = rpq.plan(nn.Sequential(nn.Linear(64, 64)), bits=4).report("other")
    found = compare([("x/a", same.reports[0]), ("y/a", other)])
    assert (
        found.names == ("x/a", "y/a")
        and "no parameter in common" in str(found)
        and "no parameter in common" in found.to_html()
    )
    assert any(not rows for g in found.groups for rows in g.rows) and "not in it" in str(found)


NAMES = ["<b>x</b>", "\x1b[31m", "$x$", "_x"]


def test_names_are_shown_as_text():
    rows = rpq.convert(model(), bits=4).rows
    reports = [
        rpq.Report(n, tuple(replace(r, name=n + r.name) for r in rows), options={n: n}, warnings=(n,)) for n in NAMES
    ]
    found = compare(list(zip(NAMES, reports)))
    assert "\x1b" not in found.to_terminal() + found.to_html() and "<b>x" not in found.to_html()
    assert "\x1b" not in found.to_json()


# ---- the command -----------------------------------------------------------------------------------------------------


def rpq_diff(*words, cwd) -> subprocess.CompletedProcess:
    """Run the command in a process that has no torch to import."""
    code = "import sys; sys.modules['torch'] = None; from rpq_convert.cli import group; group()"
    return subprocess.run(
        [sys.executable, "-c", code, "diff", *map(str, words)], cwd=cwd, capture_output=True, text=True
    )


def test_the_command_reads_folders_and_reports_without_torch(folders, tmp_path):
    report = tmp_path / "report.json"
    report.write_text((folders / "b/rpq_report.json").read_text())
    done = rpq_diff("a", "c", report, "--html", tmp_path / "diff.html", "--json", cwd=folders)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["names"] == ["a", "c", "report.json"] and "wrote" in done.stderr
    assert "head.weight" in (tmp_path / "diff.html").read_text()


@pytest.mark.parametrize(
    "words, code, said",
    [
        (("a",), 2, "two or more"),
        (("a", "./nothing"), 4, "nothing does not exist"),
        (("a", "."), 4, "no converted folder"),
        (("a", "b", "--html", "no/such/folder.html"), 4, "no/such does not exist"),
        (("a", "a/config.json"), 4, "is not a report"),
    ],
)
def test_what_cannot_be_compared_is_said(folders, words, code, said):
    done = rpq_diff(*words, cwd=folders)
    assert done.returncode == code and said in done.stderr and not done.stdout


def test_plans_are_compared_with_folders(folders, monkeypatch, capsys):
    from rpq_convert.cli import group

    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit) as ended:
        group(["diff", "plan.json", "a"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "plan.json" in shown and "layers.{0…4}.weight x5" in shown and "~" in shown
