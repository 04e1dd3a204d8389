"""The report's views on a real conversion."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.report.text import megabytes


def report():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(64, 256) for _ in range(12)), "big" * 40: nn.Linear(64, 64)}
    )
    return rpq.convert(model, bits=4, exclude=["layers.3.weight"])


def test_views_agree_with_the_value():
    r = report()
    assert rpq.Report.from_json(r.to_json()) == r
    lines = r.to_terminal(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("layers.{" in line for line in lines)
    assert "excluded" in r.to_markdown() and "layers" in r.to_markdown()
    rows = list(csv.DictReader(io.StringIO(r.to_csv())))
    assert [row["name"] for row in rows] == [row.name for row in r.rows]
    assert sum(int(row["bytes"]) for row in rows) == r.bytes


def test_html_escapes_names():
    model = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(128, 128)})
    text = rpq.convert(model, bits=4).to_html()
    assert "<script>alert" not in text
    HTMLParser().feed(text)
    assert "http" not in text


def test_much_left_dense_is_said():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 512))
    assert any("stay dense" in w for w in rpq.convert(model, bits=4, exclude=["1"]).all_warnings)


def test_megabytes_are_millions_of_bytes_in_every_view():
    """What must fit in 0.2 MB is shown as at most 0.200 MB."""
    assert [megabytes(n) for n in (50_000_000, 49_999_600, 1, 0)] == ["50.000 MB", "50.000 MB", "0.000 MB", "0.000 MB"]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    plan = rpq.plan(model, target_size="0.2MB", sensitivity="shape")
    r = plan.report()
    said = re.search(r"weight files +([\d.]+) MB +([\d,]+) bytes", r.to_terminal())
    assert float(said[1]) == round(int(said[2].replace(",", "")) / 1e6, 3) <= 0.2
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    for view in (r.to_terminal(), r.to_markdown(), r.to_html()):
        assert f"{dense / 1e6:.3f} MB" in view
    shown = [float(line.split()[2]) for line in r.to_terminal().splitlines() if re.match(r"\S+\.weight ", line)]
    assert abs(sum(shown) - sum(x.bytes for x in r.rows if x.decision == "rpq") / 1e6) < 0.002


def test_a_curve_is_in_megabytes_of_ten_to_the_six():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    curve = rpq.sweep(model, points=3, sensitivity="shape")
    assert megabytes(curve.mixed[0].file_bytes) in str(curve)
    assert "2^20" not in curve.to_svg("a")


def calibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 96), nn.Linear(96, 64))
    return rpq.convert(model, bits=4, calibration=[torch.randint(300, (64, 8))])


def test_errors_of_outputs_come_first_and_each_error_says_what_it_is_of():
    r = calibrated()
    text, (table, *layers) = r.to_terminal(100), r.rows[:2]
    lines = [line for line in text.splitlines() if line.startswith(("0.weight", "1.weight"))]
    assert table.output_error is None and f"{table.error:.2g}w" in lines[0]
    assert f"{layers[0].output_error:.2g} " in lines[1] and f"{layers[0].error:.2g}" not in lines[1]
    assert "w: of its weights" in text and "worst: that of the worst output" in text and "~" not in text
    assert r.worst_layer.name in text and r.worst_layer.output_error == max(x.output_error or 0 for x in r.rows)
    assert "| output error | weight error |" in r.to_markdown() and "output_error" in r.to_csv()
    rows = csv.DictReader(io.StringIO(r.to_csv()))
    assert [x["output_error"] for x in rows] == ["" if x.output_error is None else str(x.output_error) for x in r.rows]


def test_planned_errors_are_said_to_be_expected():
    text = str(rpq.plan(nn.Linear(64, 256), bits=4).report("x"))
    assert "~" in text and "expected from the bits, not measured" in text and "worst:" not in text


def test_json_names_the_worst_and_old_reports_are_read():
    r = calibrated()
    data = json.loads(r.to_json())
    assert data["summary"]["worst_layer"] == {
        "name": r.worst_layer.name, "of": "output", "value": r.worst_layer.output_error,
    }  # fmt: skip
    assert data["summary"]["worst_output"]["value"] == max(x.worst_output or 0 for x in r.rows)
    del data["summary"]
    for row in data["rows"]:
        del row["output_error"], row["worst_output"]
    old = rpq.Report.from_dict(data)
    assert old.error == r.error and old.output_error is None
    assert old.worst_layer.error == max(x.error or 0 for x in r.rows)
