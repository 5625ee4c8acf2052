"""pyunlearn methods and pyunlearn edits: what there is to choose from."""

from __future__ import annotations

import json
import shutil
from typing import Any

from pyunlearn.cli.options import AsJson


def methods(as_json: AsJson = False) -> None:
    """List the unlearning methods: what each needs and costs, its source, its options with their defaults.

    Examples:

    `pyunlearn methods`

    `pyunlearn methods --json`
    """
    from pyunlearn.methods import ALIASES, METHODS

    names = ("name", "roles", "needs", "pairs", "token", "kind", "passes", "options", "source")
    rows: list[dict[str, Any]] = [{name: getattr(m, name) for name in names} for m in METHODS.values()]
    if as_json:
        print(json.dumps({"methods": rows, "aliases": ALIASES}, indent=2))
        return
    _print_catalogue(
        rows,
        ("name", "needs", "passes", "source"),
        "passes: texts that go forward and backward for one example in one step; with rmu and adaptive_rmu up to their "
        "layer only. With --retain, NAME+nll also trains on the retain set and NAME+kl keeps the reference model's "
        "distributions there; graddiff is ga+nll. Set an option with --set name=value.",
    )


def edits(as_json: AsJson = False) -> None:
    """List the edits of `pyunlearn edit`: what each needs, its source, its options with their defaults.

    Examples:

    `pyunlearn edits`

    `pyunlearn edits --json`
    """
    from pyunlearn.edits import EDITS

    rows = [{"name": n, "needs": e.needs, "options": e.options, "source": e.source} for n, e in EDITS.items()]
    if as_json:
        print(json.dumps({"edits": rows}, indent=2))
        return
    _print_catalogue(
        rows, ("name", "needs", "source"), "Set an option with --set name=value. What each does: docs/edits.md."
    )


def _print_catalogue(rows: list[dict[str, Any]], columns: tuple[str, ...], note: str) -> None:
    from pyunlearn.report.catalogue import catalogue

    print(catalogue(rows, columns, note, width=shutil.get_terminal_size().columns))
