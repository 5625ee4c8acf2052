"""Lists for a terminal: methods and edits with their options, and verdicts with their reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

_INDENT = "    "


def catalogue(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], note: str, *, width: int = 80) -> str:
    """Return one line for each row, with its `columns` in line, and its options below it; nothing is cut off.

    >>> print(catalogue([{"name": "npo", "needs": ("reference",), "options": {"beta": 0.1}}], ("name", "needs"), "."))
    name  needs
    npo   reference
        beta=0.1
    <BLANKLINE>
    .

    Args:
        rows: a dict for each, in which "options" is a dict of names and defaults.
        columns: the entries that stand on the line.
        note: a paragraph below all.
        width: columns of the terminal; options and note are wrapped there.
    """
    cells = [list(columns), *([_words(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    blocks = [lines[0]]
    for line, row in zip(lines[1:], rows, strict=True):
        blocks.append(line)
        options = "  ".join(f"{name}={value}" for name, value in row["options"].items())
        if options:
            blocks.append(_wrapped(options, width, _INDENT))
    return "\n".join([*blocks, "", _wrapped(note, width)])


def verdict_lines(rows: Sequence[tuple[str, str, str]], width: int = 80) -> list[str]:
    """Return a block for each (verdict, claim, reason): verdict and claim, and the reason below, wrapped at `width`."""
    widest = max((len(verdict) for verdict, _, _ in rows), default=0)
    lines = []
    for verdict, claim, reason in rows:
        lines.append(_wrapped(claim, width, " " * (widest + 2), first=verdict.ljust(widest + 2)))
        lines.append(_wrapped(reason, width, " " * (widest + 4)))
    return lines


def _words(value: Any) -> str:
    return (", ".join(value) or "-") if isinstance(value, (tuple, list)) else str(value)


def _wrapped(text: str, width: int, indent: str = "", *, first: str | None = None) -> str:
    start = indent if first is None else first
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)
