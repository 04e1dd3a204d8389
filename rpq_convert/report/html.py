"""The report as one HTML file: no network, a sortable and filtered table, bars of bytes before and after."""

from __future__ import annotations

from rpq_convert.report.schema import Report
from rpq_convert.report.text import (
    error,
    group,
    left_out,
    legend,
    megabytes,
    number,
    quality,
    shown_error,
    totals,
    worst,
)
from rpq_convert.showing import html_text

STYLE = """
.rpq{font:14px/1.45 system-ui,sans-serif;color:#1c2330;max-width:1200px;margin:auto;padding:1rem}
.rpq h1{font-size:1.4rem;margin:0 0 .2rem}.rpq .sum{font-size:1.05rem;margin:0 0 1rem}
.rpq .cards{display:flex;gap:.8rem;flex-wrap:wrap;margin:0 0 1rem}
.rpq .card{border:1px solid #d5dae3;border-radius:8px;padding:.5rem .9rem}.rpq .card b{display:block;font-size:1.15rem}
.rpq table{border-collapse:collapse;width:100%}.rpq th{cursor:pointer;text-align:left;position:sticky;top:0;background:#f2f4f8}
.rpq th,.rpq td{padding:.3rem .5rem;border-bottom:1px solid #e4e8ef}.rpq td.n{text-align:right;font-variant-numeric:tabular-nums}
.rpq .bar{background:#cfd8ea;height:.7rem;border-radius:3px;min-width:2px}.rpq .bar i{display:block;background:#2d6cdf;height:100%;border-radius:3px}
.rpq .warn{background:#fff4d6;border-left:4px solid #e0a100;padding:.5rem .8rem;margin:.5rem 0;color:#4a3a00}
.rpq input{padding:.35rem .6rem;margin:.2rem 0 .6rem;width:18rem;border:1px solid #c4cad6;border-radius:6px}
@media(prefers-color-scheme:dark){.rpq{color:#e4e8ef;background:#14181f}.rpq th{background:#222936}
.rpq th,.rpq td{border-color:#2c3442}.rpq .card{border-color:#37404f}.rpq .bar{background:#37435a}}
"""
SCRIPT = """
for(const root of document.querySelectorAll('.rpq')){const body=root.querySelector('tbody');
root.querySelectorAll('th').forEach((th,i)=>th.onclick=()=>{const up=th.dataset.up=th.dataset.up=='1'?'':'1';
const key=r=>{const v=r.cells[i].dataset.v;return v===undefined?r.cells[i].textContent:+v};
[...body.rows].sort((a,b)=>(key(a)>key(b)?1:key(a)<key(b)?-1:0)*(up?1:-1)).forEach(r=>body.append(r))});
root.querySelector('input').oninput=e=>{for(const r of body.rows)r.hidden=!r.textContent.toLowerCase().includes(e.target.value.toLowerCase())}}
"""


def fragment(report: Report) -> str:
    """Return the report as an HTML fragment, for notebooks."""
    groups = group(report.rows)
    largest = max((g.dense_bytes for g in groups), default=1) or 1
    rows = "".join(_row(g, largest, report.output_error is not None) for g in groups)
    cards = "".join(
        f"<div class=card>{html_text(label)}<b>{megabytes(report.total(part))}</b></div>"
        for label, part in (
            ("before", "dense_bytes"),
            ("after", "bytes"),
            ("codes", "code_bytes"),
            ("codebooks", "codebook_bytes"),
            ("scales", "scale_bytes"),
            ("outliers", "outlier_bytes"),
            ("kept dense", "other_bytes"),
        )
        if part != "outlier_bytes" or report.total(part)
    )
    warnings = "".join(f"<div class=warn>{html_text(w)}</div>" for w in report.all_warnings)
    measured = "".join(f"<p>{html_text(line)}</p>" for line in quality(report))
    dropped = "".join(f"<li>{html_text(line)}</li>" for line in left_out(report, len(report.dropped)))
    files = "".join(f"<li>{html_text(f.name)}: {f.bytes:,} bytes</li>" for f in report.files)
    head = "".join(
        f"<th>{h}</th>"
        for h in ("tensor", "layer", "shape", "how", "before", "after", "", "bits/weight", "error", "worst output")
    )
    return (
        f"<div class=rpq><style>{STYLE}</style><h1>{html_text(report.title)}</h1><p class=sum>{html_text(totals(report))}</p>"
        f"<div class=cards>{cards}</div>{measured}{warnings}<p>{html_text(legend(report))}</p><input placeholder='filter' aria-label='filter'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"{f'<p>Left out of the source:</p><ul>{dropped}</ul>' if dropped else ''}"
        f"{f'<ul>{files}</ul>' if files else ''}<script>{SCRIPT}</script></div>"
    )


def _row(g, largest: int, mixed: bool) -> str:  # type: ignore[no-untyped-def]
    r = g.first
    how = r.spec if r.decision == "rpq" else f"{r.decision}: {r.reason}"
    many = f" <small>x{len(g.rows)}</small>" if len(g.rows) > 1 else ""
    width, inner = 100 * g.dense_bytes / largest, 100 * min(1.0, g.bytes / g.dense_bytes if g.dense_bytes else 0)
    value, low = error(g.rows)[0] if r.decision == "rpq" else None, worst(g.rows)
    return (
        f"<tr><td>{html_text(g.name)}{many}</td><td>{html_text(r.layer)}</td><td>{html_text('×'.join(map(str, r.shape)))}</td>"
        f"<td>{html_text(how)}</td><td class=n data-v={g.dense_bytes}>{megabytes(g.dense_bytes)}</td>"
        f"<td class=n data-v={g.bytes}>{megabytes(g.bytes)}</td><td data-v={g.dense_bytes} style='width:12rem'>"
        f"<div class=bar style='width:{width:.1f}%'><i style='width:{inner:.1f}%'></i></div></td>"
        f"<td class=n data-v={r.bits_per_weight:.6f}>{r.bits_per_weight:.3f}</td>"
        f"<td class=n data-v={-1 if value is None else value:.9f}>{shown_error(g.rows, mixed=mixed)}</td>"
        f"<td class=n data-v={-1 if low is None else low:.9f}>{number(low)}</td></tr>"
    )


def page(report: Report) -> str:
    """Return the report as one self-contained HTML file."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html_text(report.title)}: RPQ size audit</title><body>{fragment(report)}</body></html>"
    )
