"""Read the texts of a run by role; of a retain set that is larger than a run can use, a part is drawn as it is read."""

from __future__ import annotations

import random
from collections.abc import Mapping

from pyunlearn.data.examples import Example, examples_of, read_examples, rows_of
from pyunlearn.data.files import Rows

__all__ = ["RETAIN_AT_MOST", "read_roles"]

RETAIN_AT_MOST = 100_000
"""Largest number of retain texts of a run: from more, this number is drawn."""


def read_roles(sources: Mapping[str, object], *, turns: str | None) -> tuple[dict[str, list[Example]], list[str]]:
    """Read the texts of a run.

    Args:
        sources: role -> texts as `read_examples` takes them: forget, retain, holdout; None is left out. From a
            retain set of more than `RETAIN_AT_MOST` texts that number is drawn at random in one pass, for a run trains
            on random texts of it; the other rows are not looked at.
        turns: one of TURNS, or None, see `read_examples`.

    Returns:
        The examples of each role in order, and a sentence where a part was drawn.

    Raises:
        DataError, DependencyError: as `read_examples`.
    """
    examples, notes = {}, []
    for role, source in sources.items():
        if role == "retain" and source is not None:
            rows, total = _drawn(rows_of(source, role), RETAIN_AT_MOST)
            examples[role] = examples_of(iter(rows), role, turns)
            if total > len(rows):
                notes.append(f"Of {total:,} retain texts, {len(rows):,} were drawn at random; the rest is not used.")
        elif role == "forget" or source is not None:
            examples[role] = read_examples(source, role=role, turns=turns)
    return examples, notes


def _drawn(rows: Rows, count: int) -> tuple[list[tuple[str, object]], int]:
    """Return `count` rows at random, the same each time, in order, or all where there are no more; and their number.

    Source: Vitter 1985, doi 10.1145/3147.3165, algorithm R.
    """
    drawn: list[tuple[int, tuple[str, object]]] = []
    r, total = random.Random(0), 0
    for total, row in enumerate(rows, 1):
        at = total - 1 if total <= count else r.randrange(total)
        if at < count:
            drawn[at : at + 1] = [(total, row)]
    return [row for _, row in sorted(drawn, key=lambda each: each[0])], total
