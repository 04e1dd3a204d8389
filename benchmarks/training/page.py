"""docs/training.md and its curves, from the lines of docs/training.jsonl. Its words are written by hand, around the marks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training.tasks import TASKS, Task

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "training.md"
START, END = "<!-- {}: python -m benchmarks.training page -->", "<!-- end of {} -->"
Line = dict[str, Any]


def write(lines: Sequence[Line]) -> None:
    """Put tables between their marks in the page, and draw the curves."""
    text = PAGE.read_text("utf8")
    tables = {"rows": rows, "entanglement": entanglement, "cost": cost, "memory": memory}
    for name, make in tables.items():
        start, end = START.format(name), END.format(name)
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n{make(lines)}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, "utf8")
    for task in TASKS.values():
        curves(task, [x for x in lines if x["kind"] == "entanglement" and x["task"] == task.name])


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    align = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", align, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def rows(lines: Sequence[Line]) -> str:
    """One table for a task and a width: the metric of every row, its bytes and its learning rate."""
    parts = []
    for task in TASKS.values():
        for width in task.widths:
            runs = [x for x in lines if x["kind"] == "run" and x["task"] == task.name and x["width"] == width]
            if runs := _at_best_rate(task, runs):
                parts.append(f"### {task.name}, width {width}\n\n{_rows(task, runs)}")
    return "\n".join(parts)


def _at_best_rate(task: Task, runs: Sequence[Line]) -> list[Line]:
    """Return the runs of each row at its rate: that of most seeds, then the best on the validation part. Made small: with dense."""
    seen: dict[tuple[str, int], dict[float, list[Line]]] = {}
    for x in runs:
        if x.get("trained"):
            seen.setdefault((x["row"], x["times"]), {}).setdefault(x["rate"], []).append(x)

    def rank(some: Sequence[Line]) -> tuple[int, float]:
        return len(some), task.better * float(some[0].get("validation", some[0][task.metric]))

    rates = {row: max(found, key=lambda rate: rank(found[rate])) for row, found in seen.items()}
    after = rates.get(("dense", 1))
    return [x for x in runs if x["rate"] == rates.get((x["row"], x["times"]), after)]


def _rows(task: Task, runs: Sequence[Line]) -> str:
    dense = [x for x in runs if x["row"] == "dense"]
    base = statistics.mean(x[task.metric] for x in dense) if dense else None
    body = []
    for times in (1, 4, 8):
        found: dict[str, list[Line]] = {}
        for x in runs:
            if x["times"] == times:
                found.setdefault(x["row"], []).append(x)
        for name, some in sorted(found.items(), key=lambda item: -task.better * _mean(task, item[1])):
            values = [x[task.metric] for x in some]
            spread = f" ± {_number(task, statistics.stdev(values))}" if len(values) > 1 else ""
            against = "" if base is None or name == "dense" else _against(task, _mean(task, some), base)
            size = some[0]["bytes"]
            whole = dense[0]["bytes"] / size if dense else times
            rate = f"{some[0]['rate']:.2g}" if some[0].get("trained") else ""
            trained = f"{some[0]['trained']:,}" if some[0].get("trained") else ""
            body.append(
                [
                    name,
                    f"{size:,}",
                    f"{whole:.1f}",
                    _number(task, _mean(task, some)) + spread,
                    against,
                    trained,
                    rate,
                    str(len(values)),
                ]
            )
    metric = "accuracy" if task.metric == "accuracy" else "loss, nats a character"
    return table(["row", "bytes", "times smaller", metric, "against dense", "trained numbers", "rate", "seeds"], body)


def _mean(task: Task, some: Sequence[Line]) -> float:
    return statistics.mean(x[task.metric] for x in some)


def _number(task: Task, value: float) -> str:
    return f"{value:.4f}" if task.metric == "accuracy" else f"{value:.3f}"


def _against(task: Task, value: float, base: float) -> str:
    if task.metric == "accuracy":
        return f"{100 * (value - base):+.2f} points"
    return f"{100 * (value / base - 1):+.1f} %"


def entanglement(lines: Sequence[Line]) -> str:
    """One table for a task: settings, what they learned, and what their weights look like."""
    parts = []
    for task in TASKS.values():
        found = [x for x in lines if x["kind"] == "entanglement" and x["task"] == task.name]
        if not found:
            continue
        found.sort(
            key=lambda x: (
                x["match"] != "*",
                x["setting"] != "dense",
                x["setting"].startswith("books blocks"),
                x["bytes"],
            )
        )
        body = []
        for x in found:
            name = x["setting"] + ("" if x["match"] == "*" else f", only `{x['match']}`")
            shares = [f"{100 * x[k]:.0f} %" if k in x else "" for k in ("rank", "duplicates", "dead")]
            agree = [f"{x[k]:.3f}" for k in ("alignment before", "alignment after")]
            body.append([name, f"{x['bytes']:,}", f"{x['trained']:,}", _number(task, x[task.metric]), *shares, *agree])
        head = ["setting", "bytes", "trained numbers", task.metric, "rank", "equal sub-vectors", "dead codewords"]
        parts.append(f"### {task.name}, width {task.widths[0]}\n\n" + table([*head, "agreement before", "after"], body))
    return "\n".join(parts)


def cost(lines: Sequence[Line]) -> str:
    """Seconds a step and peak memory of every row, relative to dense."""
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for x in lines:
        if x["kind"] == "cost" and "seconds" in x:
            found.setdefault((x["task"], x["width"], x["times"], x["row"]), {})[x["setting"]] = x
    body = []
    for (task, width, times, row), hows in found.items():
        dense = found[task, width, 1, "dense"]

        def of(how: str, what: str, factor: float, unit: str, hows: Any = hows, dense: Any = dense) -> str:
            if how not in hows:
                return ""
            return f"{hows[how][what] * factor:.0f} {unit} ({hows[how][what] / dense[how][what]:.2f})"

        name = f"{task} {width}: {row}" + (f", {times} times" if times > 1 else "")
        steps = [of(how, "seconds", 1e3, "ms") for how in ("plain", "compiled")]
        body.append([name, *steps, *(of(how, "peak", 1e-6, "MB") for how in ("plain", "checkpointing"))])
    head = ["row", "a step (of dense)", "compiled (of dense compiled)", "peak memory (of dense)", "with checkpointing"]
    return table(head, body) if body else ""


def memory(lines: Sequence[Line]) -> str:
    """Peak memory of large models, dense beside random codes."""
    found = [x for x in lines if x["kind"] == "memory"]
    cases: dict[tuple[str, str], dict[str, Line]] = {}
    for x in found:
        cases.setdefault((x["task"], x["setting"]), {})[x["row"]] = x
    said: Callable[[Line | None], str] = lambda x: (  # noqa: E731
        "does not fit"
        if x is None
        else x["failed"]
        if "failed" in x
        else f"{x['peak'] / 1e9:.2f} GB, {x['seconds']:.1f} s"
    )
    body = []
    for (model, how), both in cases.items():
        ratio = ""
        if all("peak" in both.get(k, {}) for k in ("dense", "rpq")):
            ratio = f"{both['rpq']['peak'] / both['dense']['peak']:.2f}"
        body.append([f"{model}, {how}", said(both.get("dense")), said(both.get("rpq")), ratio])
    return table(["model", "dense", "random codes", "memory"], body) if body else ""


def curves(task: Task, found: Sequence[Line]) -> None:
    """Draw metric against bytes: a curve for numbers of codebooks, one for each family of lengths, the seed's setting marked."""
    if not found:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "training"  # the same file for the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    whole = [x for x in found if x["match"] == "*"]
    families = {
        "dim 8, codebooks 1 to one a block": [x for x in whole if x["setting"].startswith("books") and x["setting"].endswith("dim 8")],
        "4 codebooks, dim 2 to 128": [x for x in whole if x["setting"].startswith("books 4, dim")],
        "a codebook for each block, dim 2 to 128": [x for x in whole if x["setting"].startswith("books blocks")],
    }  # fmt: skip
    for name, some in families.items():
        some = sorted(some, key=lambda x: x["bytes"])
        axes.plot([x["bytes"] / 1e3 for x in some], [x[task.metric] for x in some], "o-", label=name, markersize=4)
        for x in some:
            label = x["setting"].replace("books ", "").replace("dim ", "").replace("blocks", "b")
            axes.annotate(
                label, (x["bytes"] / 1e3, x[task.metric]), fontsize=6, xytext=(2, 3), textcoords="offset points"
            )
    for x in whole:
        if x["setting"] == "codebooks heads":
            axes.plot(x["bytes"] / 1e3, x[task.metric], "k*", markersize=12, label="RPQ-pytorch: heads")
        if x["setting"] == "dense":
            axes.axhline(x[task.metric], color="grey", linestyle=":", label=f"dense, {x['bytes'] / 1e3:,.0f} kB")
    axes.set_xscale("log")
    axes.set_xlabel("kB of weights")
    axes.set_ylabel(f"{task.metric} on validation")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(DOCS / f"training-{task.name}.svg", metadata={"Date": None})
    plt.close(figure)
