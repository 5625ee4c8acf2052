"""An attack for a terminal: a row for each text, and a row for each form of attack."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from pyunlearn.attacks.result import AttackedExample, AttackResult, TrialSummary
from pyunlearn.report.table import SHOWN, plain_table, record_table, text_cell, verdict_cell

_ORDER = ("still exposed", "comes back", "doubtful", "no likelier", "stays forgotten", "untested")


def attack_table(result: AttackResult, *, show_text: bool = False) -> Table:
    """Return a row for each text, 30 at most, the worst first: its verdict, and its strongest attack with exposure."""
    table = record_table("what comes back under attack", ["exposure\nbits", "interval\nbits"])
    table.add_column("strongest attack")
    order = sorted(result.examples, key=lambda e: (_ORDER.index(e.verdict), -(e.combined_exposure or 0.0)))
    for e in order[:SHOWN]:
        table.add_row(
            e.label,
            text_cell(e.text, show_text),
            verdict_cell(e.verdict),
            "-" if e.exposure is None else f"{e.exposure:.1f}",
            _interval(e),
            e.strongest or "-",
        )
    if len(order) > SHOWN:
        table.caption = f"and {len(order) - SHOWN} more: see attack.json"
    return table


def trial_table(result: AttackResult) -> Table:
    """Return a row for each form of attack: how many texts stand out, and the mean likelihoods."""
    table = plain_table("forms of attack, and mean log-likelihoods in nats a token")
    table.add_column("attack", min_width=24)
    names = ("texts\ntested", "stand out\n4.32 bits", "unseen\nwould", "p of\nthe set", "forget\nset", "non-\nmembers")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for t in result.trials:
        table.add_row(*trial_cells(t).values())
    return table


def trial_cells(t: TrialSummary) -> dict[str, str]:
    """Return the numbers of one form of attack, as text, in the order of the columns."""
    return {
        "name": t.name,
        "tested": str(t.tested),
        "returned": str(t.returned),
        "unseen": f"{t.tested / 20:.1f}",
        "p": "-" if t.set_pvalue is None else f"{t.set_pvalue:.2g}",
        "forget": "-" if t.log_likelihood is None else f"{t.log_likelihood:.2f}",
        "non_members": "-" if t.non_member_log_likelihood is None else f"{t.non_member_log_likelihood:.2f}",
    }


def show_attack(console: Console, result: AttackResult, *, show_text: bool = False) -> None:
    """Print the forms of attack, the texts unless all of them stay forgotten, and the sentences."""
    console.print(trial_table(result))
    if not result.passed:
        console.print(attack_table(result, show_text=show_text))
    for line in attack_lines(result):
        console.print(line, highlight=False, markup=False)


def attack_lines(result: AttackResult) -> list[str]:
    """Return the sentences below the tables: the verdict on the set, what it rests on, what was left out."""
    count = result.non_member_count
    fewest = min((t.details.get("non_members", count) for t in result.trials), default=count)
    texts = f"{fewest} to {count} texts" if fewest < count else f"{count} texts"
    compared = f"compared with {texts} under the same attacks: {result.non_members}"
    return [result.headline, compared, *result.notes]


def _interval(e: AttackedExample) -> str:
    if e.interval is None or math.isnan(e.interval[0]):
        return "-"
    low, high = e.interval
    return f"{low:.1f} to {high:.1f}" if math.isfinite(high) else f"{low:.1f} or more"
