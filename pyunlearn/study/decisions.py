"""The decision rule: one number per seed and claim, Student's t over seeds, four outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.05
"""Probability of a wrong difference on any of the claims that are tested together, and of each wrong likeness."""
POWER = 0.8
"""Probability of a decision at the number of seeds that an undecided claim would need."""
FEWEST_SEEDS = 6
"""A study of fewer seeds decides nothing."""
OUTCOMES = ("supported", "contradicted", "no material difference", "undecided")
_SEEDS = np.arange(FEWEST_SEEDS, 1001)


class Decision(NamedTuple):
    """Outcome of one claim, with the numbers behind it. Means above 0 speak for the claim."""

    outcome: str
    """One of OUTCOMES."""
    mean: float
    low: float
    """Lower end of the 95 % t interval of the mean over seeds."""
    high: float
    deviation: float
    """Standard deviation between seeds."""
    pvalue: float
    """Of the two-sided one-sample t test against 0."""
    pvalue_holm: float
    """The same, adjusted for the claims that are tested together (Holm 1979)."""
    pvalue_margin: float
    """Of the two one-sided t tests (TOST) against a mean at or beyond the margin."""
    margin: float
    seeds: int
    seeds_needed: int | None
    """Undecided: seeds at which a mean and a deviation like these would decide in 80 % of studies; None: over 1000."""


def decide(contrasts: Mapping[str, Sequence[float]], margins: Mapping[str, float]) -> dict[str, Decision]:
    """Decide the claims that are tested together.

    - *no material difference*: both one-sided t tests against the margin have p < 0.05, so the 90 % interval of the
      mean lies within it. Each claim has this chance of a wrong likeness: it is not shared among them.
    - *supported*, *contradicted*: otherwise, where the two-sided t test has p < 0.05 after Holm's adjustment; the sign
      of the mean says which.
    - *undecided*: neither, or fewer than 6 seeds, or a seed whose contrast is not finite.

    Args:
        contrasts: claim -> (S,) one number per seed, above 0 where the seed speaks for the claim.
        margins: claim -> distance from 0 that does not matter, in the unit of the contrasts.

    >>> decide({"steps": [1.2, 0.9, 1.4, 1.1, 1.0, 1.3]}, {"steps": 0.3})["steps"].outcome
    'supported'
    """
    values = {claim: np.asarray(x, dtype=np.float64) for claim, x in contrasts.items()}
    pvalues = {claim: _difference_pvalue(x) for claim, x in values.items()}
    adjusted = dict(zip(values, holm(list(pvalues.values())), strict=True))
    level = LEVEL / len(values)
    return {c: _decision(x, margins[c], pvalues[c], adjusted[c], level) for c, x in values.items()}


def holm(pvalues: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): the chance of any false positive stays below the level."""
    order, adjusted, highest = np.argsort(pvalues, kind="stable"), [0.0] * len(pvalues), 0.0
    for rank, i in enumerate(order.tolist()):
        highest = max(highest, min(1.0, pvalues[i] * (len(pvalues) - rank)))
        adjusted[i] = highest
    return adjusted


def seeds_needed(mean: float, deviation: float, margin: float, level: float = LEVEL / 5) -> int | None:
    """Return the least number of seeds that would decide in 80 % of studies; None where it is over 1000.

    A difference is decided by the two-sided t test at `level`, the first of Holm's five; no material difference by
    TOST at 0.05.

    >>> seeds_needed(mean=1.0, deviation=1.0, margin=0.1), seeds_needed(mean=0.0, deviation=1.0, margin=1.0)
    (16, 11)
    """
    if not (math.isfinite(mean) and math.isfinite(deviation)):
        return None
    enough = _power(mean, deviation, margin, level) >= POWER
    return int(_SEEDS[enough.argmax()]) if enough.any() else None


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of (S,) numbers and the ends of its 95 % t interval; NaN ends for one number."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return float(x.mean()), math.nan, math.nan
    half = float(special.stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def _decision(x: Any, margin: float, pvalue: float, adjusted: float, level: float) -> Decision:
    mean, low, high = interval(x)
    deviation = float(x.std(ddof=1)) if len(x) > 1 else math.nan
    alike = _margin_pvalue(x, margin)
    outcome = "undecided"
    if len(x) >= FEWEST_SEEDS and math.isfinite(mean):
        if alike < LEVEL:
            outcome = "no material difference"
        elif adjusted < LEVEL:
            outcome = "supported" if mean > 0 else "contradicted"
    needed = seeds_needed(mean, deviation, margin, level) if outcome == "undecided" else None
    return Decision(outcome, mean, low, high, deviation, pvalue, adjusted, alike, margin, len(x), needed)


def _difference_pvalue(x: Any) -> float:
    error = _standard_error(x)
    return float(2 * special.stdtr(len(x) - 1, -abs(x.mean()) / error)) if error else 1.0


def _margin_pvalue(x: Any, margin: float) -> float:
    error = _standard_error(x)
    return float(special.stdtr(len(x) - 1, -(margin - abs(x.mean())) / error)) if error else 1.0


def _standard_error(x: Any) -> float:
    """Return the standard error of the mean; 0 where the numbers do not tell it."""
    if len(x) < 2 or not np.isfinite(x).all():
        return 0.0
    return float(max(x.std(ddof=1), 1e-12) / math.sqrt(len(x)))


def _power(mean: float, deviation: float, margin: float, level: float) -> Any:
    """Return (n,) the probability of a decision with each of _SEEDS: the larger of a difference's and of none's."""
    error = max(deviation, 1e-12) / np.sqrt(_SEEDS)
    difference = _exceeds(1 - level / 2, abs(mean) / error)
    sides = [_exceeds(1 - LEVEL, (margin + sign * mean) / error) for sign in (1, -1)]
    return np.maximum(difference, sides[0] + sides[1] - 1)


def _exceeds(level: float, shift: Any) -> Any:
    """Return P(noncentral t > its critical value), by the normal approximation of Johnson and Welch (1940)."""
    critical, freedom = _critical(level), _SEEDS - 1
    z = (critical * (1 - 1 / (4 * freedom)) - shift) / np.sqrt(1 + critical**2 / (2 * freedom))
    return special.ndtr(-z)


@lru_cache
def _critical(level: float) -> Any:
    return special.stdtrit(_SEEDS - 1, level)
