"""The report's views on a real conversion."""

import csv
import io
import re
from html.parser import HTMLParser

import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.report.text import diff, megabytes


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
    assert "total" in diff(r, r)


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
