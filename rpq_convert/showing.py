"""Showing: text that comes from files, made safe for what it is shown in: a terminal, Markdown, CSV, HTML.

A name in a checkpoint may hold anything: escape codes that rewrite a terminal, marks that turn the reading direction, a
formula, a table's own syntax.
"""

from __future__ import annotations

import html
import logging
import re
import unicodedata
from typing import Any

KEPT = "\u200c\u200d"  # joiners of ordinary scripts and emoji
FORMULA = ("=", "+", "-", "@", "\t", "\r")
MARKS = re.compile(r"([\\`|\[\]!])")


def _hidden(character: str) -> bool:
    """Whether a character is shown as nothing, moves what follows, or breaks the line."""
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and character not in KEPT)


def printable(text: str, *, lines: bool = False) -> str:
    """Return text with control characters and direction marks written out, such as `\\x1b`.

    Args:
        lines: keep line breaks, of text that has several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _hidden(c) and not (lines and c == "\n") else c for c in text)


def one_line(text: str) -> str:
    """Return text on one line, printable."""
    return printable(" ".join(re.split(r"[ \t\r\n]+", text.strip())))


def notice(text: str) -> None:
    """Say in one line what a user should know and need not act on: a log record, which Python shows on stderr by default."""
    logging.getLogger("rpq_convert").warning("%s", one_line(text))


def html_text(text: Any) -> str:
    """Return anything as the text of an HTML element or a quoted attribute."""
    return html.escape(printable(str(text)))


def csv_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula; numbers as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def markdown_text(text: Any) -> str:
    """Return anything as Markdown that shows it, in a table or beside one."""
    return MARKS.sub(r"\\\1", html.escape(printable(str(text)), quote=False))


def markdown_code(text: str) -> str:
    """Return a name as a code span; one with backticks as ordinary text, since a span would end there."""
    shown = printable(text)
    return markdown_text(shown) if "`" in shown else f"`{shown.replace('|', chr(92) + '|')}`"


def duration(seconds: float) -> str:
    """Return a time in the unit that fits, such as `8 s`, `3 min` or `1 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
