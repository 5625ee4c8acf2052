"""One table of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from pyunlearn.result import Result

_COLOURS = {"forgotten": "green", "not memorized": "cyan", "still exposed": "yellow", "over-unlearned": "red"}
_SHOWN = 30


def result_table(result: Result, names: Sequence[str] | None = None) -> Table:
    """A row for each forget example (the first 30): likelihood, exposure and greedy match before and after, verdict, steps.

    `names` replaces the beginning of each text.
    """
    table = Table(title="what was to be forgotten", title_justify="left", caption_justify="left")
    table.add_column("text", max_width=36, no_wrap=True, overflow="ellipsis")
    for name in ("log-likelihood\nnats a token", "exposure\nbits", "greedy match"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("steps", justify="right")
    for e in result.examples[:_SHOWN]:
        table.add_row(
            escape(names[e.index] if names else " ".join(e.text.split())),
            f"{e.log_likelihood_before:.2f} → {e.log_likelihood_after:.2f}",
            f"{e.exposure_before:.1f} → {e.exposure_after:.1f}",
            f"{e.greedy_match_before:.0%} → {e.greedy_match_after:.0%}",
            f"[{_COLOURS[e.verdict]}]{e.verdict}[/]",
            str(e.steps),
        )
    if len(result.examples) > _SHOWN:
        table.caption = f"and {len(result.examples) - _SHOWN} more: see result.json"
    return table


def utility_line(result: Result) -> str:
    """One line: what the run cost elsewhere."""
    u = result.utility
    low, high = u.interval
    return (
        f"utility ({u.measured_on}, {u.sequences} texts): {u.nll_before:.3f} → {u.nll_after:.3f} nats a token, {u.relative_rise:+.1%} "
        f"(95 % interval {low:+.1%} to {high:+.1%}) of {u.budget:.0%} allowed; references drifted by {u.reference_drift:+.3f} nats a token"
    )
