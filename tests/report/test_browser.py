"""Pages in a real browser: nothing is wider than the screen or cut, text is readable, on three widths and in both colour schemes.

Needs Chromium (Debian: `apt-get install chromium`). The pictures are kept in the folder that RPQ_ARTEFACTS names, else in
tests/artefacts/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_html import made

from rpq_convert.report.compare import compare
from rpq_convert.report.html import card, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip
ARTEFACTS = Path(os.environ.get("RPQ_ARTEFACTS", Path(__file__).parent.parent / "artefacts"))
SCHEMES = {"dark": 0, "light": 1}  # Chromium's numbers
# Unfolds everything; then tells the page around it what is wider than the screen, cut, small or of too little contrast.
MEASURE = """<script>
for(const d of document.querySelectorAll('details'))d.open=true;
const wrong=[],canvas=document.createElement('canvas').getContext('2d',{willReadFrequently:true});canvas.canvas.width=canvas.canvas.height=1;
const pixel=(...colours)=>{canvas.fillStyle='#fff';canvas.fillRect(0,0,1,1);for(const c of colours){canvas.fillStyle=c;canvas.fillRect(0,0,1,1)}
return [...canvas.getImageData(0,0,1,1).data].slice(0,3)};
const light=rgb=>{const [r,g,b]=rgb.map(v=>(v/=255)<=.04045?v/12.92:((v+.055)/1.055)**2.4);return .2126*r+.7152*g+.0722*b};
const wide=document.documentElement.clientWidth;
if(document.documentElement.scrollWidth>wide)wrong.push('the page is '+document.documentElement.scrollWidth+' wide on '+wide);
const walk=document.createTreeWalker(document.body,NodeFilter.SHOW_TEXT);let texts=0,least=99;
while(walk.nextNode()){const node=walk.currentNode,e=node.parentElement;
if(!node.data.trim()||e.closest('script,style,title,option')||!e.checkVisibility())continue;
const range=document.createRange();range.selectNodeContents(node);const box=range.getBoundingClientRect();
if(!box.width)continue;texts++;
if(box.left<-.5||box.right>wide+.5)wrong.push('cut by the screen: '+node.data);
for(let p=e;p;p=p.parentElement){const s=getComputedStyle(p);
if(s.overflowX!=='visible'&&!(p instanceof SVGElement)){const b=p.getBoundingClientRect();
if(box.right>b.right+1&&!p.matches('.side-by-side'))wrong.push('cut: '+node.data)}}
const chain=[];for(let p=e;p;p=p.parentElement)chain.unshift(getComputedStyle(p).backgroundColor);
const style=getComputedStyle(e),canvas_of=getComputedStyle(document.documentElement).colorScheme;
const ink=e instanceof SVGElement?style.fill:style.color,paper=light(pixel(...chain)),text=light(pixel(...chain,ink));
const contrast=(Math.max(paper,text)+.05)/(Math.min(paper,text)+.05);least=Math.min(least,contrast);
if(contrast<4.5)wrong.push('contrast '+contrast.toFixed(2)+': '+node.data);
const size=e instanceof SVGElement?box.height:parseFloat(style.fontSize);
if(size<8.5)wrong.push('text of '+size.toFixed(1)+' px: '+node.data)}
parent.postMessage({wrong,texts,least,dark:matchMedia('(prefers-color-scheme:dark)').matches,wide},'*');
</script>"""

# A window is at least 500 wide; a frame can be narrower.
FRAME = """<!doctype html><meta name=color-scheme content='light dark'><script>
onmessage=e=>document.title='measured '+JSON.stringify(e.data)</script><iframe src="{name}.html" style="width:{width}px;height:2400px;border:0">"""


def chromium(file: Path, width: int, scheme: str, *what: str) -> str:
    """Run Chromium with a new profile beside the file; return what it prints."""
    place = file.parent / f"profile-{file.stem}-{width}-{scheme}"
    flags = (
        f"--user-data-dir={place}",
        f"--window-size={width},2400",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    )
    done = subprocess.run([CHROMIUM, *FLAGS, *flags, *what, file.as_uri()], capture_output=True, text=True, timeout=300)
    shutil.rmtree(place, ignore_errors=True)
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return a folder with report, plan and comparison as pages, and two cards on the dark page of a notebook."""
    place = tmp_path_factory.mktemp("pages")
    long = "model.a_very_long_name_of_a_module_without_any_break_in_it.layers"
    report = made(12, prefix=long)
    shown = {"report": page(report), "plan": page(made(3, measured=False))}
    shown["diff"] = compare(
        [("a-folder-with-a-long-name", report), ("b", made(12, calibrated=False, prefix=long))]
    ).to_html()
    for name, paper, ink in (
        ("card-light", "#fff", "rgba(0,0,0,.87)"),
        ("card-dark", "#111111", "rgba(255,255,255,.87)"),
    ):
        shown[name] = f"<!doctype html><body style='background:{paper};color:{ink}'>{2 * card(report)}"
    for name, text in shown.items():
        (place / f"{name}.html").write_text(text, "utf8")
        (place / f"{name}-measured.html").write_text(text + MEASURE, "utf8")
    return place


CASES = [(name, width, scheme) for name in ("report", "diff") for width in (390, 800, 1280) for scheme in SCHEMES]
CASES += [("plan", 390, "light"), ("card-light", 390, "dark"), ("card-dark", 800, "light")]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to show pages in (Debian: apt-get install chromium)")
@pytest.mark.parametrize("name, width, scheme", CASES)
def test_a_page_fits_the_screen_and_is_readable(pages, name, width, scheme):
    frame = pages / f"{name}-{width}-frame.html"
    frame.write_text(FRAME.format(name=f"{name}-measured", width=width))
    printed = chromium(frame, width + 100, scheme, "--virtual-time-budget=5000", "--dump-dom")
    found = json.loads(re.search(r"<title>measured (\{.*?\})</title>", printed)[1])
    ARTEFACTS.mkdir(exist_ok=True)
    chromium(pages / f"{name}.html", width, scheme, f"--screenshot={ARTEFACTS / f'{name}-{width}-{scheme}.png'}")
    assert not found["wrong"], found["wrong"][:10]
    assert found["texts"] > 30 and found["wide"] == width and found["dark"] == (scheme == "dark")
    assert (ARTEFACTS / f"{name}-{width}-{scheme}.png").stat().st_size > 10_000
