"""One table of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pyunlearn.edits import EditResult
from pyunlearn.unlearning.result import Result

COLOURS = {"forgotten": "green", "not memorized": "cyan", "still exposed": "yellow", "over-unlearned": "red"}
SHOWN = 30


def result_table(result: Result, names: Sequence[str] | None = None) -> Table:
    """A row for each forget example (the first 30): likelihood, exposure and greedy match before and after, verdict, steps.

    `names` replaces the beginning of each text.
    """
    table = narrow_table(
        "what was to be forgotten", "text", ["log-likelihood\nnats a token", "exposure\nbits", "greedy match"]
    )
    table.add_column("verdict", no_wrap=True, min_width=14)
    table.add_column("steps", justify="right", no_wrap=True, min_width=5)
    for e in result.examples[:SHOWN]:
        table.add_row(
            escape(names[e.index] if names else beginning(e.text)),
            f"{e.log_likelihood_before:.2f} → {e.log_likelihood_after:.2f}",
            f"{e.exposure_before:.1f} → {e.exposure_after:.1f}",
            f"{e.greedy_match_before:.0%} → {e.greedy_match_after:.0%}",
            f"[{COLOURS[e.verdict]}]{e.verdict}[/]",
            str(e.steps),
        )
    if len(result.examples) > SHOWN:
        table.caption = f"and {len(result.examples) - SHOWN} more: see result.json"
    return table


def edit_table(edited: EditResult) -> Table:
    """A row for each role: the mean negative log-likelihood of its texts before and after an edit, nats a token."""
    table = narrow_table(f"what {edited.edit} did", "texts", ["before\nnats a token", "after\nnats a token", "change"])
    for role, before in edited.nll_before.items():
        after = edited.nll_after[role]
        table.add_row(role, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    return table


def edit_line(edited: EditResult) -> str:
    """One line: how much of the model is another than before, and the edit's own numbers."""
    size = sum(p.numel() for p in edited.model.parameters())
    numbers = [
        f"{k.replace('_', ' ')} {v:.3g}"
        for k, v in edited.diagnostics.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    changed = f"{sum(edited.changed.values())} of {size} weights changed, in {len(edited.changed)} parameters"
    return "; ".join([changed, *numbers])


def narrow_table(title: str, first: str, numbers: Sequence[str]) -> Table:
    """A table that fits 80 columns: the first column gives way, what is measured stays whole."""
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column(first, min_width=12, max_width=36)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, min_width=max(9, *map(len, name.split("\n"))))
    return table


def beginning(text: str) -> str:
    """A text on one line, 60 characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def utility_line(result: Result) -> str:
    """One line: what the run cost elsewhere."""
    u = result.utility
    low, high = u.interval
    return (
        f"utility ({u.measured_on}, {u.sequences} texts): {u.nll_before:.3f} → {u.nll_after:.3f} nats a token, {u.relative_rise:+.1%} "
        f"(95 % interval {low:+.1%} to {high:+.1%}) of {u.budget:.0%} allowed; non-members drifted by {u.non_member_drift:+.3f} nats a token"
    )


def catalogue(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Methods or edits, one a row; nothing is cut off, however narrow the terminal: options take the lines that they need."""
    table = Table(*rows[0], box=None)
    for column in table.columns:
        column.no_wrap, column.overflow = column.header not in ("needs", "options"), "fold"
    for row in rows:
        table.add_row(*(_words(value) for value in row.values()))
    return table


def _words(value: Any) -> str:
    """A cell: names with commas between them, options as name=value, one a line."""
    if isinstance(value, Mapping):
        return "\n".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(value) if isinstance(value, (tuple, list)) else str(value)
