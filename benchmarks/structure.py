"""The shape of the code, counted from the source: rooms, levels, longest files and functions, widest signatures.

    python benchmarks/structure.py                  # the tables of docs/architecture.md
    python benchmarks/structure.py --write          # writes them into that page
    python benchmarks/structure.py --limits         # what is beyond the limits; exit code 1 if there is anything
    python benchmarks/structure.py --root OTHER     # another checkout

A room is a folder or a file of `rpq_convert/`, and `cli/`. A room's level is one more than the highest level that it imports from.
Lines of a function are its lines of code: no docstring, comment or blank line, and not those of functions inside it. Parameters
of commands, which typer reads, are counted as well.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- structure: python benchmarks/structure.py --write -->", "<!-- end of structure -->"
# The last commit before the rooms, counted by this script with --root.
BEFORE = {"rooms": "42 files", "levels": "18", "file": "525", "function": "107", "signature": "36"}
FILE, FUNCTION, SIGNATURE = 350, 60, 10  # limits; a longer file or kernel says why in its docstring
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Counted:
    """A number, and where it is."""

    number: int
    where: str

    def __str__(self) -> str:
        return f"{self.number} (`{self.where}`)" if self.where else str(self.number)


class Code:
    """The files of a checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted([*(root / "rpq_convert").rglob("*.py"), *(root / "cli").rglob("*.py")])

    def room(self, file: Path) -> str:
        parts = file.relative_to(self.root).with_suffix("").parts
        return parts[0] if parts[0] == "cli" else parts[1]

    def rooms(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for file in self.files:
            found.setdefault(self.room(file), []).append(file)
        found.pop("__init__")  # the public names, as text
        return found

    def imported(self, room: str) -> set[str]:
        """Return the other rooms that a room imports."""
        found = set()
        for file in self.rooms()[room]:
            for node in ast.walk(_tree(file)):
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                found |= {n.split(".")[1] for n in names if n.startswith("rpq_convert.")}
        return (found & set(self.rooms())) - {room}

    def levels(self) -> dict[str, int]:
        """Return the level of every room, 1 for those that import no other.

        Raises:
            ValueError: rooms import each other in a circle.
        """
        found: dict[str, int] = {}
        left = {room: self.imported(room) for room in self.rooms()}
        while left:
            ready = [r for r, below in left.items() if below <= set(found)]
            if not ready:
                raise ValueError(f"rooms import each other in a circle: {', '.join(sorted(left))}")
            for room in ready:
                found[room] = 1 + max((found[b] for b in left[room]), default=0)
            for room in ready:
                del left[room]
        return found

    def longest_file(self, files: list[Path]) -> Counted:
        return max((Counted(_lines(f), self._short(f)) for f in files), key=lambda c: c.number)

    def longest_function(self, files: list[Path]) -> Counted:
        return max(self._functions(files, length), key=lambda c: c.number, default=Counted(0, ""))

    def widest_signature(self, files: list[Path]) -> Counted:
        return max(self._functions(files, width), key=lambda c: c.number, default=Counted(0, ""))

    def beyond(self) -> list[str]:
        """Return what is beyond the limits. Whether a docstring says why is for the reader to judge."""
        lines = [f"{self._short(f)}: {_lines(f)} lines" for f in self.files if _lines(f) > FILE]
        lines += [
            f"{c.where}: {c.number} lines of code" for c in self._functions(self.files, length) if c.number > FUNCTION
        ]
        return lines + [
            f"{c.where}: {c.number} parameters" for c in self._functions(self.files, width) if c.number > SIGNATURE
        ]

    def _functions(self, files: list[Path], count) -> Iterator[Counted]:
        for file in files:
            for node in ast.walk(_tree(file)):
                if isinstance(node, Function):
                    yield Counted(count(node, file), f"{self._short(file)}: {node.name}")

    def _short(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix().removeprefix("rpq_convert/")


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf8"))


def _lines(file: Path) -> int:
    return len(file.read_text("utf8").splitlines())


@cache
def _code_lines(file: Path) -> frozenset[int]:
    """Return the numbers of lines that hold code, not only a comment."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text("utf8")).readline)
    return frozenset(n for t in tokens if t.type not in skipped for n in range(t.start[0], t.end[0] + 1))


def length(node: Function, file: Path) -> int:
    """Return a function's lines of code, its signature with them."""
    lines = set(range(node.lineno, (node.end_lineno or 0) + 1))
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    for inner in ast.walk(node):
        if isinstance(inner, Function) and inner is not node:
            lines -= set(range(inner.lineno, (inner.end_lineno or 0) + 1))
    return len(lines & _code_lines(file))


def width(node: Function, file: Path) -> int:
    """Return the number of parameters, `self` and `cls` left out."""
    given = node.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return sum(n not in ("self", "cls") for n in names) + (given.vararg is not None) + (given.kwarg is not None)


def tables(code: Code) -> str:
    """Return the two tables of docs/architecture.md: all of the code before and after, and each room."""
    rooms, levels = code.rooms(), code.levels()
    everything = [f for files in rooms.values() for f in files]
    rows = [
        ("files or rooms side by side", BEFORE["rooms"], f"{len(rooms)} rooms"),
        ("levels of imports", BEFORE["levels"], str(max(levels.values()))),
        ("lines of the longest file", BEFORE["file"], str(code.longest_file(everything))),
        ("lines of code of the longest function", BEFORE["function"], str(code.longest_function(everything))),
        ("parameters of the widest signature", BEFORE["signature"], str(code.widest_signature(everything))),
    ]
    lines = ["| | before | now |", "|---|---|---|", *(f"| {' | '.join(r)} |" for r in rows), ""]
    lines += [
        "| level | room | files | longest file | longest function | widest signature |",
        "|---:|---|---:|---|---|---|",
    ]
    for room in sorted(rooms, key=lambda r: (-levels[r], r)):
        files = rooms[room]
        counts = (code.longest_file(files), code.longest_function(files), code.widest_signature(files))
        cells = [str(c).replace(f"{room}/", "") for c in counts]
        lines.append(f"| {levels[room]} | `{room}` | {len(files)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/architecture.md")
    parser.add_argument("--limits", action="store_true", help="list what is beyond the limits")
    asked = parser.parse_args()
    code = Code(asked.root)
    if asked.limits:
        beyond = code.beyond()
        print("\n".join(beyond))
        return int(bool(beyond))
    text = tables(code)
    if asked.write:
        page = PAGE.read_text("utf8")
        before, rest = page.split(START)
        PAGE.write_text(f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}", "utf8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
