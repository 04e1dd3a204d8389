"""The report as a page and as a card: which layers hurt, where the bytes are, every name as text."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import rpq_convert as rpq
from rpq_convert.report.html import card, page
from rpq_convert.report.schema import Report, Row


def made(blocks: int, *, measured: bool = True, calibrated: bool = True, prefix: str = "model.layers") -> Report:
    """Return the report of a model of so many blocks of three weights and a norm, errors growing with the block."""
    rows = [row("model.embed.weight", (1000, 64), measured, None)]
    for i in range(blocks):
        for part, share in (("mlp.up", 1.0), ("mlp.down", 2.1), ("attn.q", 0.53)):
            output = share * 1e-3 * (i + 1) if calibrated else None
            rows.append(row(f"{prefix}.{i}.{part}.weight", (64, 64), measured, output))
        rows.append(
            Row(f"{prefix}.{i}.norm.weight", "Norm", (64,), "float32", "dense", "one axis", 256, other_bytes=256)
        )
    return Report("tiny", tuple(rows), options={"bits": 4}, version="0.1.0")


@cache
def shown(blocks: int, **kind: bool) -> str:
    return page(made(blocks, **kind))


def row(name: str, shape: tuple[int, int], measured: bool, output: float | None) -> Row:
    n = shape[0] * shape[1]
    found = {"error": 0.01, "worst": 0.02, "seconds": 1.0} if measured else {}
    found |= {"output_error": output, "worst_output": 3 * output} if measured and output is not None else {}
    return Row(
        name, "Linear", shape, "float32", "rpq", "4 bits", 4 * n, codebook_bytes=1024, code_bytes=n // 2, scale_bytes=2 * shape[0],
        spec="dim 2, 1 book", expected_error=0.009, **found,
    )  # fmt: skip


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def classes(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def worst_of(text: str) -> list[str]:
    table = text[text.index('<table class="stack">') :]
    return [
        re.sub("<[^>]+>", "", cell)
        for cell in re.findall(r'<td class="wide">(.*?)<div', table[: table.index("</table>")])
    ]


def test_the_page_names_the_ten_layers_that_hurt_most_by_the_error_of_their_outputs():
    report, text = made(6), shown(6)
    errors = {r.name: r.output_error for r in report.rows if r.output_error}
    assert sorted(errors.values())[-11] < sorted(errors.values())[-10]  # no tie decides
    found = worst_of(text)
    assert set(found) == set(sorted(errors, key=lambda n: -errors[n])[:10])
    assert [errors[n] for n in found] == sorted(map(errors.get, found), reverse=True)
    assert "largest output error" in text and "0.01w" in text  # the embedding's, whose outputs were not measured


def test_without_calibration_the_error_is_called_that_of_weights_and_in_a_plan_expected():
    assert "largest weight error" in shown(6, calibrated=False)
    plan = shown(6, measured=False)
    assert "nothing is converted yet" in plan and "expected weight error" in plan and "~0.009" in plan
    assert '<table class="stack">' not in plan  # nothing was measured: no layer is known to hurt


def test_the_chart_says_every_layers_error_and_follows_the_colour_of_the_text():
    report = made(6)
    drawn = re.search(r"<svg.*?</svg>", shown(6), re.DOTALL)[0]
    chart = ElementTree.fromstring(drawn)
    assert chart.get("role") == "img" and "Output error" in chart.get("aria-label")
    said = [t.text for t in chart.iter("title")]
    assert said[0] == chart.get("aria-label")
    assert {s.split(":")[0] for s in said[1:]} == {r.name for r in report.rows if r.decision == "rpq"}
    text = "".join(chart.itertext())
    assert all(role in text for role in ("mlp.up", "mlp.down", "attn.q", "model.embed", "bits per weight"))
    assert "currentColor" in drawn and "#000000" not in drawn and "#010203" not in drawn
    ids = [e.get("id") for e in chart.iter() if e.get("id")]
    assert len(ids) == len(set(ids)) and all(f"#{i}" in drawn for i in ids)


def test_the_treemap_has_the_areas_of_the_bytes():
    report = made(6)
    cells = [a for t, a in Page(shown(6)).tags if t == "div" and "--heat" in (a.get("style") or "")]
    sizes = {}
    for cell in cells:
        sides = dict(re.findall(r"(width|height):([\d.]+)%", cell["style"]))
        sizes[cell["title"].split(":")[0]] = float(sides["width"]) * float(sides["height"]) / 1e4
    assert sum(sizes.values()) == pytest.approx(1, abs=0.01)
    assert sizes["model.embed.weight"] == pytest.approx(report.rows[0].bytes / report.bytes, abs=0.005)


def test_groups_unfold_to_their_rows():
    found = Page(shown(6))
    text = "".join(found.text)
    assert sum(t == "details" for t, _ in found.tags) == 5  # embedding, three weights, the norm
    assert (
        all(f"model.layers.{i}.mlp.up.weight" in text for i in range(6)) and "model.layers.{0…5}.mlp.up.weight" in text
    )


def test_a_page_is_one_file_that_is_the_same_every_time_and_knows_both_colour_schemes_and_paper():
    text = shown(6)
    assert text == page(made(6))
    assert "http" not in text and not any(t in ("link", "img", "iframe") for t, _ in Page(text).tags)
    for needed in ("prefers-color-scheme:dark", "@media print", "max-width:640px", "width=device-width"):
        assert needed in text


def test_a_model_of_2000_tensors_fits_in_a_megabyte():
    report = made(500)
    assert len(report.rows) == 2001
    assert len(page(report).encode()) < 1_000_000


NAMES = [
    "<script>alert(1)</script>", "a'\"b", "$\\frac$", "_hidden", "层.0.权重", "\x1b[31m", "{{ 7 * 7 }}", "a" * 300, "]]>", "&lt;", "",
]  # fmt: skip


def test_every_name_is_shown_as_text():
    """In both views, in charts, groups, options, files, warnings and evaluations."""
    rows = tuple(row(f"{name}.{i}", (64, 64), True, 0.01) for name in NAMES for i in range(2))
    for name in NAMES:
        report = Report(
            name, rows, warnings=(name,), options={name: {name: [name]}}, version="0.1.0",
            evaluations=({"on": name, "kind": name, "samples": 3, "metrics": {name: 1.5}},),
        )  # fmt: skip
        for text in (page(report), card(report)) if name in NAMES[:1] else (page(replace(report, rows=rows[:2])),):
            tags = {t for t, _ in Page(text).tags}
            assert "<script>alert" not in text and "\x1b" not in text and "49" not in "".join(Page(text).text)
            assert tags <= KNOWN, tags - KNOWN
            assert not any(k.startswith("on") for _, attrs in Page(text).tags for k in attrs)


TAGS = """html head meta title style body main p h1 h2 div span b i ul li section table thead tbody tr th td details summary small
dl dt dd code sup input select option script br wbr svg g path use defs text tspan clippath rect"""
KNOWN = set(TAGS.split())


@pytest.mark.parametrize("rows", [(), (Row("b", "", (3,), "float32", "buffer", "buffer", 12, other_bytes=12),)])
def test_a_report_without_converted_parameters_has_no_chart(rows):
    report = Report("empty", rows)
    for text in (page(report), card(report)):
        assert "<svg" not in text and "empty" in text


def test_errors_of_zero_are_drawn_as_none():
    rows = tuple(
        replace(r, output_error=0.0, worst_output=0.0, error=0.0, worst=0.0)
        for r in made(6).rows
        if r.decision == "rpq"
    )
    assert "no error" in page(Report("exact", rows))


def test_quality_is_said_in_words():
    metrics = {"perplexity": 32.31, "base_perplexity": 30.087, "ratio": 1.0739, "kl": 0.0851, "top1_agreement": 0.8175}
    found = {"on": "test.txt", "kind": "language model", "samples": 6132, "metrics": metrics}
    report = replace(made(6), evaluations=(found,))
    said = (
        "test.txt (6,132 tokens): perplexity 32.31, the base's 30.09; 1.074 times the base's; divergence 0.0851 nats per token; "
        "the same first choice as the base in 81.8 %"
    )
    assert said.replace("'", "&#39;") in page(report) and said.replace("'", "&#39;") in card(report)
    assert said in " ".join(report.to_terminal().split())


def test_cards_share_a_page_in_the_colours_of_the_notebook():
    """No script, no id, no colour of text or paper of its own; groups unfold."""
    text = made(6)._repr_html_()
    found = Page(text)
    assert not any("script" in t or "id" in a for t, a in found.tags if t not in ("path", "clippath"))
    assert (
        "prefers-color-scheme" not in text and "#fff" not in text.partition("--")[2].partition(".rpq{--ink:inherit")[2]
    )
    assert "<svg" in text and text.count("<details") == 6
    assert len(text) < 100_000
    assert rpq.Report.from_json(made(6).to_json())._repr_html_() == text
