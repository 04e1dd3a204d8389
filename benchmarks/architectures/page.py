"""docs/architectures.md, from the lines of docs/architectures.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
INTRODUCTION = """# Architectures

Model types of transformers {version}, tiny and with random weights, at 8 bits. Printed by `python -m benchmarks.architectures`, which goes on
where it was stopped; `--page` writes this page from `docs/architectures.jsonl` alone.

The class of a model type that holds the most goes all ways:

- **convert**: its dense folder becomes a converted one.
- **load by**: every class that the dense folder serves (itself, Auto classes, others of its module, classes of parts) loads the converted
  folder. Nothing is new that the dense folder has, decoded weights are near the dense ones, everything else is equal.
- **in memory**, **on load**: `rpq.convert` and `RPQConfig` give the folder's tensors bit for bit. Outputs are those of the decoded model,
  where inputs could be guessed.
- **save again**: `save_pretrained` and `from_pretrained` give the same tensors.
- **restore**: the folder that `rpq.restore_checkpoint` writes holds exactly the decoded weights.

"Right" is one of these that holds, "refused" one that ends in one line of ours, and "wrong" all else.
"""


def page(rows: Sequence[Row], known: int, version: str) -> str:
    """Return the page.

    Args:
        known: how many model types there are.
    """
    tried = [r for r in rows if r["steps"]]
    steps = [seen for row in tried for seen in row["steps"].values()]
    right, refused = steps.count("right"), sum(s.startswith("refused") for s in steps)
    unbuilt = [r for r in rows if not r["steps"]]
    whole = sum(all(s == "right" for s in r["steps"].values()) and not r.get("stopped") for r in tried)
    parts = [
        INTRODUCTION.format(version=version),
        f"\nOf {known} model types {len(rows)} have been tried: {len(tried)} were built, {whole} of them are right throughout; "
        f"{len(unbuilt)} were not built. {known - len(rows)} have not been tried. Of {len(steps)} steps {right} are right, "
        f"{refused} refused, {len(steps) - right - refused} wrong.\n",
        "\n## Tried\n\n| model type | class | right | else |\n|---|---|---:|---|\n",
        *(_line(row) for row in sorted(tried, key=lambda r: r["type"])),
        "\n## Not built\n\n| model type | why |\n|---|---|\n",
        *(
            f"| {r['type']} | {_cell(r.get('not_built') or r.get('stopped', ''))} |\n"
            for r in sorted(unbuilt, key=lambda r: r["type"])
        ),
    ]
    return "".join(parts)


def _line(row: Row) -> str:
    steps = row["steps"]
    odd = [f"{name}: {seen}" for name, seen in steps.items() if seen != "right"]
    odd += [row["stopped"]] if row.get("stopped") else []
    return f"| {row['type']} | {row['source']} | {list(steps.values()).count('right')} of {len(steps)} | {_cell('; '.join(odd))} |\n"


def _cell(text: str) -> str:
    text = " ".join(text.replace("|", "\\|").replace("`", "'").split())[:200]
    return text.replace("[", "\\[")  # no link
