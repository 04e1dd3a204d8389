"""The pictures of docs/first-hour.md: the commands of that page, run on all-MiniLM-L6-v2 (`make test` installs it).

    python benchmarks/first_hour.py [--into docs/images]

Terminals become SVG through rich, pages PNG through Chromium (Debian: `apt-get install chromium`). A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from real_models import minilm_folder
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LINES = 92, 34  # of a terminal
COMMANDS = {  # picture -> the command that it shows
    "plan": "rpq plan my-model --bits 4",
    "convert": "rpq convert my-model --bits 4 --calibrate self --samples 16",
    "convert-2bit": "rpq convert my-model --bits 2 --effort fast --out my-model-2bit -q",
    "verify": "rpq verify my-model-rpq",
    "report": "rpq audit my-model-rpq --format html --output report.html",
    "diff": "rpq diff my-model-rpq my-model-2bit",
}
SHOWN = ("plan", "convert", "diff")  # as terminals
PAGES = {"report": "report.html"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def main(into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(minilm_folder(), Path(place, "my-model"))
        for name, command in COMMANDS.items():
            said = run(command, Path(place))
            if name in SHOWN:
                (into / f"{name}.svg").write_text(terminal(command, said, name), "utf8")
            if name in PAGES:
                screenshot(Path(place, PAGES[name]), into / f"{name}.png")
    for picture in sorted(into.iterdir()):
        print(f"{picture.name}: {picture.stat().st_size:,} bytes")


def run(command: str, place: Path) -> str:
    """Return what a command prints, errors with it, in the order of a terminal."""
    program, *words = shlex.split(command)
    tool = Path(sys.executable).with_name(program)
    environment = {
        **os.environ,
        "COLUMNS": str(WIDTH),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [tool, *words], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout}")
    return done.stdout


def terminal(command: str, said: str, name: str) -> str:
    """Return a terminal with a command and what it printed as SVG that loads no font; a long middle is left out."""
    lines = [line for line in said.rstrip().splitlines() if not re.match(r"\[\d+/\d+\]|Loading weights", line)]
    if len(lines) > LINES:
        lines = [*lines[: LINES // 2], f"… {len(lines) - LINES} lines …", *lines[-(LINES - LINES // 2) :]]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", style="bold green"))
    console.print(Text("\n".join(lines)), highlight=True)
    drawn = console.export_svg(title=command, unique_id=name)
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def screenshot(page: Path, picture: Path) -> None:
    if CHROMIUM is None:
        sys.exit("there is no Chromium to show pages in; install it (Debian: apt-get install chromium)")
    profile = page.with_name("profile")
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--blink-settings=preferredColorScheme=1",
        f"--user-data-dir={profile}", "--window-size=1180,1180", f"--screenshot={picture}",
    )  # fmt: skip
    subprocess.run([CHROMIUM, *flags, page.as_uri()], check=True, capture_output=True)
    shutil.rmtree(profile, ignore_errors=True)
    with Image.open(picture) as drawn:
        small = drawn.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    small.save(picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "images")
    main(parser.parse_args().into)
