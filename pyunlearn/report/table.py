"""Tables of a run and of an edit, for a terminal of 80 columns or more: one line for each record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pyunlearn.data.redaction import masked
from pyunlearn.errors import printable
from pyunlearn.unlearning.result import Result

if TYPE_CHECKING:
    from pyunlearn.edits import EditResult

COLOURS = {
    "forgotten": "green",
    "no likelier": "cyan",
    "not memorized": "cyan",
    "undecided": "cyan",
    "still exposed": "yellow",
    "over-unlearned": "red",
    "stays forgotten": "green",
    "untested": "cyan",
    "doubtful": "yellow",
    "comes back": "red",
}
UNCERTAIN = "? more non-members might change this verdict"
SHOWN = 30  # records in a table; the file holds all


def result_table(result: Result, names: Sequence[str] | None = None, *, show_text: bool = False) -> Table:
    """Return a row for each forget example, 30 at most: verdict, likelihood, exposure and greedy match, and steps.

    Args:
        result: what `pyunlearn.unlearn` returned.
        names: a name for each example, in place of the start of its text.
        show_text: show the start of each text, which is masked otherwise.
    """
    numbers = ["log-likelihood\nnats a token", "exposure\nbits", "greedy\nmatch", "steps"]
    table = record_table("texts to forget", numbers)
    for e in result.examples[:SHOWN]:
        table.add_row(
            e.label,
            cell(names[e.index if e.record is None else e.record]) if names else text_cell(e.text, show_text),
            verdict_cell(e.verdict, certain=e.certain),
            f"{e.log_likelihood_before:.2f} → {e.log_likelihood_after:.2f}",
            f"{e.exposure_before:.1f} → {e.exposure_after:.1f}",
            f"{e.greedy_match_before:.0%} → {e.greedy_match_after:.0%}",
            str(e.steps),
        )
    captions = [UNCERTAIN] if not all(e.certain for e in result.examples) else []
    if len(result.examples) > SHOWN:
        captions.append(f"and {len(result.examples) - SHOWN} more: see result.json")
    table.caption = "\n".join(captions) or None
    return table


def utility_line(result: Result) -> str:
    """Return one sentence about the utility set and the non-members: their change, and the budgets."""
    u = result.utility
    parts = [
        f"utility ({u.measured_on}, {u.sequences} texts): {u.nll_before:.3f} → {u.nll_after:.3f} nats a token, "
        f"{_rise(u.relative_rise, u.interval)}, at most {u.budget:.0%} allowed"
    ]
    if u.holdout_rise is not None and u.holdout_budget is not None:
        parts.append(f"holdout: {_rise(u.holdout_rise, u.holdout_interval)}, at most {u.holdout_budget:.0%} allowed")
    return "; ".join([*parts, f"drift of the non-members: {u.non_member_drift:+.3f} nats a token"])


def _rise(estimate: float, interval: tuple[float, float] | None) -> str:
    shown = "no interval" if interval is None else f"95 % interval {interval[0]:+.1%} to {interval[1]:+.1%}"
    return f"{estimate:+.1%} ({shown})"


def edit_table(edited: EditResult) -> Table:
    """Return a row for each role: the mean negative log-likelihood of its texts before and after, nats a token."""
    table = plain_table(f"effect of {edited.edit}")
    table.add_column("texts")
    for name in ("before\nnats a token", "after\nnats a token", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for role, before in edited.nll_before.items():
        after = edited.nll_after[role]
        table.add_row(role, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    return table


def edit_line(edited: EditResult) -> str:
    """Return one sentence: how many weights have changed, and the edit's own numbers."""
    size = sum(p.numel() for p in edited.model.parameters())
    numbers = [
        f"{k.replace('_', ' ')} {v:.3g}"
        for k, v in edited.diagnostics.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    changed = f"{sum(edited.changed.values())} of {size} weights changed, in {len(edited.changed)} parameters"
    return "; ".join([changed, *numbers])


def record_table(title: str, numbers: Sequence[str]) -> Table:
    """Return an empty table with the columns index, text, verdict and `numbers`; the text takes the width that is left.

    Rows are filled with `cell`, `text_cell` and `verdict_cell`.
    """
    table = plain_table(title)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("text", min_width=5)
    table.add_column("verdict", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def cell(text: str) -> Text:
    """Return the start of a text as a cell of one line; with no markup and no control characters."""
    return Text(printable(" ".join(text.split())[:60]), no_wrap=True, overflow="ellipsis")


def text_cell(text: str, show_text: bool) -> Text:
    """Return the start of a text as a cell; masked, its first four words, unless `show_text`."""
    return cell(text if show_text else masked(" ".join(text.split()[:4])))


def verdict_cell(verdict: str, *, certain: bool = True) -> Text:
    """Return a verdict in its colour, with a question mark where more non-members might change it."""
    return Text(verdict, style=COLOURS[verdict]).append("" if certain else " ?")


def plain_table(title: str) -> Table:
    """Return an empty table without columns."""
    return Table(
        title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
