"""The commands that tell: presets, and the environment."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from . import options as o
from .app import examples, group
from .errors import catching


@group.command(epilog=examples("rpq presets", "rpq presets 4bit > mine.toml"))
@catching
def presets(name: Annotated[str | None, Argument(metavar="[NAME]", help="Print this preset's TOML.")] = None) -> None:
    """List the presets, or print one as a start for your own."""
    from importlib.resources import files

    from rpq_convert.planning.rules import load_preset, preset_names

    if name is None:
        print("\n".join(_table([load_preset(known) for known in preset_names()])))
        return
    load_preset(name)
    path: Any = Path(name) if name.endswith(".toml") else files("rpq_convert.configs") / f"{name}.toml"
    print(path.read_text("utf8").rstrip("\n"))


ABOUT = """\
* the default. smaller: than float32, SmolLM2-135M's files. SmolLM2: perplexity as a multiple of the dense model's.
MiniLM: mean cosine of sentences with the dense model's. ViT: pictures that get the dense model's class.
fast: weights alone. good: calibrated on synthetic inputs (ViT: on its data). best: calibrated on data and tuned.
minutes: of SmolLM2, about, on one thread. docs/quality.md has more, `rpq convert` measures your model.
Presets are as small in memory as on disk. --bits from 3 to 7 keep more in the same bytes on disk: codes are
entropy-coded there, and one byte each in memory."""


def _table(presets: list[Any]) -> list[str]:
    """Return what each preset costs and keeps, as it was measured, and what the columns mean."""
    from rpq_convert.planning.options import DEFAULT_PRESET
    from rpq_convert.report.measured import DATA, FAST, SELF, TUNED, row

    def pair(key: str, bits: float, coded: bool, show: Any, efforts: tuple[str, ...] = (FAST, SELF, TUNED)) -> str:
        found = [row(key, bits, effort, coded=coded) for effort in efforts]
        while found and found[-1] is None:
            found.pop()
        return " / ".join("-" if r is None else show(r) for r in found)

    def times(r: Any) -> str:
        return f"{r.value:,.0f}x" if r.value >= 100 else f"{r.value:.2f}x"

    def minutes(r: Any) -> str:
        return f"{r.minutes:.0f}" if r.minutes > 1 else f"{r.minutes:.1f}"

    lines = [f"{'preset':<10} {'bits':>5} {'smaller':>8}   {'SmolLM2':<23} {'MiniLM':<12} {'ViT':<20} minutes"]
    lines.append(
        f"{'':<27}{'fast / good / best':<23} {'fast / good':<12} {'fast / good / best':<20} fast / good / best"
    )

    def line(name: str, bits: float, coded: bool) -> str:
        known = row("smollm2", bits, FAST, coded=coded) or row("smollm2", bits, TUNED, coded=coded)
        cells = (
            pair("smollm2", bits, coded, times), pair("minilm", bits, coded, lambda r: f"{r.value:.2f}", (FAST, SELF)),
            pair("vit", bits, coded, lambda r: f"{100 * r.value:.0f} %", (FAST, DATA, TUNED)), pair("smollm2", bits, coded, minutes),
        )  # fmt: skip
        smaller = "" if known is None else f"{known.smaller:.1f}x"
        shown = " ".join(f"{cell:<{width}}" for cell, width in zip(cells, (23, 12, 20, 10)))
        return f"{name:<10} {bits:>5g} {smaller:>8}   {shown}".rstrip()

    for preset in sorted(presets, key=lambda p: -p.settings.get("bits", 0)):
        if (bits := preset.settings.get("bits")) is None:
            lines.append(f"{preset.name:<10} {preset.description}")
        else:
            lines.append(line(preset.name + "*" * (preset.name == DEFAULT_PRESET), bits, False))
            if row("smollm2", bits, FAST, coded=True):
                lines.append(line(f"--bits {bits:g}", bits, True))
    return [*lines, "", *ABOUT.splitlines()]


@group.command(epilog=examples("rpq env"))
@catching
def env(json: o.Json = False) -> None:
    """Show versions and the machine, and say how to fix a torchvision that does not fit torch."""
    from .environment import facts

    found = facts()
    if json:
        print(jsonlib.dumps(found, indent=1))
    else:
        for key, value in found.items():
            print(f"{key:<14} {value}")
