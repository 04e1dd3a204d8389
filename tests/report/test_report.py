"""The report's views on a real conversion."""

import csv
import io
from html.parser import HTMLParser

import torch
from torch import nn

import rpq_convert as rpq
from rpq_convert.report.text import diff


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
