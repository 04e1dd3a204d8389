"""The page. Per model: a picture, a table sorted by bytes, the best tool per size, and the cells that failed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from benchmarks.quality.drawing import draw, landing
from benchmarks.quality.tasks import TASKS

Row = dict[str, Any]
HEADER = """# Quality for the bytes, tool by tool

`python -m benchmarks.quality` writes this page from the cells in `docs/quality.jsonl`. The first lines of
`benchmarks/quality/__main__.py` say which files it needs.

- Each tool converts the same dense model on a CPU. The same code then decodes and measures its weights.
- **MB** (10^6 bytes) counts everything that a file holds: codes, codebooks, scales and zero points, and at 16 bits what a tool
  leaves alone.
- **Bits** are all those bytes per parameter. In the settings of rpq-convert they are those of a preset, as small in memory as on disk;
  where they say "entropy-coded", a code takes one byte **in memory**.
- No row of its size or below beats a row in **bold**.
- **Minutes** are of one thread, or of as many as stand beside them, on a shared machine. They show an order of magnitude.
- **Peak MB** is the memory of the tool's process, with the dense model in float32 and imports.
- "Synthetic inputs" are made without data: text that the language model writes, random tokens, noise.
"""
LANDING = "smollm2"  # the task of the README's picture
SIZES = (2.1, 2.6, 3.1, 3.6, 4.1, 4.6, 5.5, 6.2, 8.2)  # bits per parameter, all in


def document(rows: Sequence[Row]) -> str:
    parts = [HEADER]
    for name, task in TASKS.items():
        mine = [r for r in rows if r["task"] == name]
        if mine:
            parts.append(_section(name, task, mine))
    return "\n".join(parts)


def pictures(rows: Sequence[Row]) -> dict[str, str]:
    """Return the pictures that the page shows: file name -> SVG."""
    done = {name: [r for r in rows if r["task"] == name and "error" not in r] for name in TASKS}
    drawn = {_picture(name): draw(TASKS[name], mine) for name, mine in done.items() if len(mine) > 1}
    if _picture(LANDING) in drawn:
        drawn["size-quality.svg"] = landing(TASKS[LANDING], done[LANDING])
    return drawn


def _picture(name: str) -> str:
    return f"quality-{name}.svg"


def _section(name: str, task: Any, rows: Sequence[Row]) -> str:
    done = sorted((r for r in rows if "error" not in r), key=lambda r: r["bytes"])
    failed = [r for r in rows if "error" in r]
    lines = [f"## {task.title}\n"]
    if done:
        lines += [task.note.format(**done[0]["metrics"]), ""]
        if len(done) > 1:
            lines += [f"![loss against bytes, tool by tool]({_picture(name)})", ""]
        columns = task.columns
        lines += [
            "| MB | in memory | bits | tool | settings | "
            + " | ".join(c.replace("_", " ") for c in columns)
            + " | minutes | peak MB |"
        ]
        lines += ["|---" * (7 + len(columns)) + "|"]
        best: float | None = None
        for row in done:
            loss = _loss(task, row)
            leads = best is None or loss < best
            best = loss if leads else best
            sizes = [f"{size / 1e6:.1f}" for size in (row["bytes"], row.get("memory", row["bytes"]))]
            cells = [*sizes, f"{_bits(task, row):.2f}", _title(row), _words(row["settings"])]
            cells += [_figure(c, row["metrics"][c]) for c in columns]
            threads = row.get("threads", 1)
            cells += [
                f"{row['minutes']:.1f}" + f" (x {threads})" * (threads > 1),
                f"{row['peak_mb'] * 2**20 / 1e6:.0f}",
            ]
            lines.append("| " + " | ".join(f"**{c}**" if leads else c for c in cells) + " |")
        lines += ["", *_per_size(task, done)]
    if failed:
        lines += ["", "Could not be run:", ""]
        lines += [f"- {_title(r)}, {_words(r['settings'])}: `{r['error']}`" for r in failed]
    return "\n".join(lines) + "\n"


def _per_size(task: Any, rows: Sequence[Row]) -> list[str]:
    """Rows of the table 'with at most so many bits per parameter, the best peer and the best of this project'."""
    lines = [
        f"| at most, bits all in | best other tool | {task.best} | best rpq-convert | {task.best} |",
        "|---|---|---|---|---|",
    ]
    for limit in SIZES:
        fitting = [r for r in rows if _bits(task, r) <= limit]
        groups = ([r for r in fitting if (r["peer"] == "rpq") is ours] for ours in (False, True))
        cells = []
        for group in groups:
            if not group:
                cells += ["none", ""]
                continue
            first = min(group, key=lambda r: _loss(task, r))
            cells += [f"{_title(first)}, {_words(first['settings'])}", _figure(task.best, first["metrics"][task.best])]
        lines.append(f"| {limit} | " + " | ".join(cells) + " |")
    return lines


def _loss(task: Any, row: Row) -> float:
    value = row["metrics"][task.best]
    return value if task.best == "perplexity" else -value


def _bits(task: Any, row: Row) -> float:
    return 8 * row["bytes"] / task.parameters


def _title(row: Row) -> str:
    return import_module(f"benchmarks.quality.peers.{row['peer']}").TITLE


def _words(settings: Row) -> str:
    """Return settings as a reader would say them."""
    said = {
        "bits": lambda v: f"{v:g} bits", "group": lambda v: f"groups of {v}", "type": str, "dim": lambda v: f"dim {v}",
        "embedding": lambda v: "embedding dense" if v == 16 else f"embedding {v}" + ("" if isinstance(v, str) else " bits"),
        "calibrated": lambda v: "calibrated", "own": lambda v: "calibrated on synthetic inputs", "steps": lambda v: f"{v} steps of tuning",
        "recode": lambda v: "code updates", "codebooks": lambda v: "codebooks of one byte",
        "storage": lambda v: "entropy-coded", "sensitivity": lambda v: "bits shared by sensitivities, measured without data",
        "outliers": lambda v: f"{100 * v:g} % outliers",
        "target_size": lambda v: f"sizes chosen for {v / 1e6:.1f} MB",
        "imatrix": lambda v: "importance matrix", "iters": lambda v: f"{v} iterations",
    }  # fmt: skip
    return ", ".join(said[k](v) if k in said else f"{k} {v}" for k, v in settings.items() if v is not False)


def _figure(column: str, value: float) -> str:
    if column in ("perplexity", "ratio") and value >= 1000:
        return f"{value:.0f}"
    return f"{value:.3f}" if column in ("perplexity", "ratio", "kl") else f"{value:.4f}"
