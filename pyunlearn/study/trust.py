"""The table of the evaluation of the metrics: one row for each metric and kind of forget set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyunlearn.metrics import auc, discoveries
from pyunlearn.metrics._binomial import clopper_pearson
from pyunlearn.study.calls import AUDITS, CLEAN, KNOWN, LIRA
from pyunlearn.study.unlearners import ASCENT, COLLAPSE, NOISE, NOTHING, REFUSE, RELABEL, RETRAINED, UNLEARNERS

Row = dict[str, Any]
POWER, CAUGHT = 0.8, 0.95
"""Least power, and least share of a ruined model that is caught, with which a metric can be trusted."""
FEWEST_RUINED = 5
"""Models that an unlearner has to ruin for a share of them."""
FEWEST_AUDITED = 6
"""Seeds whose sets are audited, below which nothing is called trusted: one of fewer can be wrong without notice."""
RULE = (
    f"Trusted, with sets of {FEWEST_AUDITED} seeds or more, are metrics whose type-I error can be 5 % by its interval, "
    "in which a seed counts once, for its sets share their models: for text from the least dose on from which "
    f"they call {POWER:.0%} of the sets still known that nothing was done to, and for ruin by an unlearner (refuse "
    f"always, noise, collapse) after which they call {CAUGHT:.0%} of the models anything but clean, of those whose "
    "test NLL is above that of every retrained model by more than the budget (5 %, of 1 nat at least), if there are "
    f"{FEWEST_RUINED} of these."
)
RUINED = (REFUSE, NOISE, COLLAPSE)
_COMPARED = (NOTHING, RETRAINED, ASCENT)  # in the agreement with the standard: refusal and ruin are beyond it


def table(states: Sequence[Row]) -> list[Row]:
    """Return a row for each kind of forget set and metric.

    Args:
        states: what `evaluate_metrics` writes of each model: unlearner, kind, dose, seed, gold, gold_call, metrics.
    """
    rows = []
    for kind in dict.fromkeys(s["kind"] for s in states):
        own = [s for s in states if s["kind"] == kind]
        rows += [_row(kind, name, own) for name in own[0]["metrics"]]
    return rows


def summary(states: Sequence[Row]) -> list[Row]:
    """Return a row for each kind, dose and unlearner: where it leaves the set, and what it costs."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for s in states:
        groups.setdefault((s["kind"], s["dose"], s["unlearner"]), []).append(s)
    order = list(UNLEARNERS)
    return [
        {
            "kind": kind,
            "dose": dose,
            "unlearner": name,
            "models": len(group),
            "distance": float(np.mean([s["distance"] for s in group])),
            "test_nll_rise": float(np.mean([s["test_nll_rise"] for s in group])),
            "ruined": float(np.mean([s["ruined"] for s in group])),
            "still known by t scores": float(np.mean([s["gold_call"] == KNOWN for s in group])),
        }
        for (kind, dose, name), group in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1], order.index(g[0][2])))
    ]


def sanity_lines(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each kind and form of the audit: how many models it passes and fails that it should."""
    lines = []
    for row in rows:
        if row["metric"] in AUDITS:
            power = [v for name, v in row.items() if name.startswith("power_dose_")][-1]
            ruined = [f"{_failed(row, u)} after {u}" for u in RUINED if row[f"clean: {u}"] is not None]
            fails = f"fails {', '.join(ruined)}" if ruined else "too few models were ruined to say what it fails"
            lines.append(
                f"{row['metric']}, kind {row['kind']}: passes {1 - row['type_1_error']:.0%} of retrained models; calls "
                f"{power:.0%} of untouched ones still known at the largest dose; {fails}."
            )
    return lines


def _failed(row: Row, unlearner: str) -> str:
    return f"{1 - row[f'clean: {unlearner}']:.0%}"


def _row(kind: str, metric: str, states: Sequence[Row]) -> Row:
    doses = sorted({s["dose"] for s in states})
    calls = {u: [(s, s["metrics"][metric]) for s in states if s["unlearner"] == u] for u in UNLEARNERS}
    oracle = calls[RETRAINED]
    wrong = float(np.mean([c["call"] != CLEAN for _, c in oracle]))
    seeds = len({s["seed"] for s, _ in oracle})
    low, high = clopper_pearson(wrong * seeds, seeds, 0.95)
    covers = [c["covers"] for _, c in oracle if c["covers"] is not None]
    power = {d: _share([c["call"] == KNOWN for s, c in calls[NOTHING] if s["dose"] == d]) for d in doses}
    clean = {u: _share([c["call"] == CLEAN for s, c in calls[u] if s["ruined"]], FEWEST_RUINED) for u in RUINED}
    clean |= {u: _share([c["call"] == CLEAN for _, c in calls[u]]) for u in (RELABEL, ASCENT)}
    row: Row = {
        "kind": kind,
        "metric": metric,
        "type_1_error": wrong,
        "type_1_low": float(low),
        "type_1_high": float(high),
        "coverage": _share(covers),
        **{f"power_dose_{d}": p for d, p in power.items()},
        **{f"clean: {u}": share for u, share in clean.items()},
        "agreement_auc": None if metric == LIRA else _agreement([(s, c) for u in _COMPARED for s, c in calls[u]]),
        "equal_calls": _share(
            [(c["call"] == KNOWN) == (s["gold_call"] == KNOWN) for u in _COMPARED for s, c in calls[u]]
        ),
    }
    few = f"too few seeds: {seeds} of {FEWEST_AUDITED}"
    return row | {"trusted_for": few if seeds < FEWEST_AUDITED else _trusted(float(low), power, clean)}


def _share(values: Sequence[Any], fewest: int = 1) -> float | None:
    return float(np.mean(values)) if len(values) >= fewest else None


def _agreement(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """Return the area under the ROC curve of a metric of examples for those that are known by their t scores.

    Known is what stands out in its set at a false discovery rate of 5 %.
    """
    if any(c["examples"] is None for _, c in pairs):
        return None
    values = np.concatenate([c["examples"] for _, c in pairs])
    known = np.concatenate([discoveries(-np.log2(s["gold"]), rate=0.05).significant for s, _ in pairs])
    if known.all() or not known.any():
        return None
    return float(auc(-values[known], -values[~known]).estimate)


def _trusted(low: float, power: dict[int, float | None], clean: dict[str, float | None]) -> str:
    if low > 0.05:
        return "nothing: calls retrained models wrong"
    enough = [d for d in power if all((power[e] or 0) >= POWER for e in power if e >= d)]
    uses = [f"text from dose {min(enough)} on"] if enough else []
    caught = [u for u in RUINED if (share := clean[u]) is not None and 1 - share >= CAUGHT]
    return "; ".join([*uses, *([f"ruin by {', '.join(caught)}"] if caught else [])]) or "nothing: misses"
