"""Comparisons of censored steps, of paired sets and of ranks within sets, each with effect, interval and test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from pyunlearn.metrics import StepsToForget, mean_interval, paired_difference
from pyunlearn.metrics._binomial import clopper_pearson

DRAWS = 1000
Pair = tuple[StepsToForget, StepsToForget]


class Effect(NamedTuple):
    """An effect with its 95 % interval and the p-value of a two-sided test on n units."""

    effect: float
    low: float
    high: float
    pvalue: float
    n: int


def longer(a: StepsToForget, b: StepsToForget) -> float:
    """Return P(b takes longer than a) + P(tie) / 2 over all pairs; a pair whose order censoring hides is a tie."""
    return float(_longer(a, b).mean())


def steps_effect(strata: Sequence[Pair]) -> Effect:
    """Compare steps by the mean of `longer` over strata.

    The interval is DeLong's over the examples of each set, on the logit scale (Clopper-Pearson's where that would have
    no width); the strata's log-rank tests are combined (Stouffer).
    """
    each = [_longer(a, b) for a, b in strata]
    estimate = float(np.mean([pairs.mean() for pairs in each]))
    low, high = _share_interval(estimate, each)
    zs, weights = [], []
    for a, b in strata:
        events = int((~a.censored).sum() + (~b.censored).sum())
        if events and len(set(np.concatenate([a.steps, b.steps]).tolist())) > 1:
            z = stats.logrank(*(stats.CensoredData.right_censored(x.steps, x.censored) for x in (a, b))).statistic
            if np.isfinite(z):
                zs.append(z)
                weights.append(np.sqrt(events))
    pvalue = 1.0
    if zs:
        pvalue = float(2 * stats.norm.sf(abs(np.dot(weights, zs)) / np.linalg.norm(weights)))
    units = sum(len(a.steps) + len(b.steps) for a, b in strata)
    return Effect(estimate, low, high, pvalue, units)


def _share_interval(share: float, strata: Sequence[Any]) -> tuple[float, float]:
    """Compute the 95 % interval of a share that is the mean over strata of the means of (n, m) pairs."""
    variance = 0.0
    for side in (pairs.mean(axis) for pairs in strata for axis in (0, 1)):  # the mean of each example's pairs
        variance += side.var(ddof=1) / side.size / len(strata) ** 2 if side.size > 1 else np.inf
    if not 1e-24 < variance < np.inf or not 0 < share < 1:
        count = sum(min(pairs.shape) for pairs in strata)  # pairs that have no example in common
        low, high = clopper_pearson(share * count, count, 0.95)
        return float(low), float(high)
    width = stats.norm.ppf(0.975) * np.sqrt(variance) / (share * (1 - share))
    low, high = special.expit(special.logit(share) + np.array([-width, width]))
    return float(low), float(high)


def matched_effect(pairs: Sequence[tuple[float, bool, float, bool]], seed: int = 0) -> Effect:
    """Compare pairs of examples (steps, censored, steps, censored); interval over pairs, sign test without ties."""
    if not pairs:
        return Effect(np.nan, np.nan, np.nan, 1.0, 0)
    outcomes = np.array([longer(_one(*pair[:2]), _one(*pair[2:])) for pair in pairs])
    interval = mean_interval(outcomes, bounds=(0, 1), seed=seed, draws=DRAWS)
    wins, losses = int((outcomes > 0.5).sum()), int((outcomes < 0.5).sum())
    pvalue = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Effect(*interval, pvalue, len(outcomes))


def _one(steps: float, censored: bool) -> StepsToForget:
    return StepsToForget(np.array([steps]), np.array([censored]))


def difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Effect:
    """Compare pairs of sets by mean(second - first); t interval over pairs, sign-flip permutation test."""
    if not len(first):
        return Effect(np.nan, np.nan, np.nan, 1.0, 0)
    test = paired_difference(first, second, seed=seed)
    return Effect(test.estimate, test.low, test.high, test.pvalue, len(first))


def wins(first: Sequence[float], second: Sequence[float]) -> Effect:
    """Return the share of pairs where the second is lower, among those that differ; Wilson interval, sign test.

    Infinite means never.
    """
    outcomes = [0.5 if a == b else float(b < a) for a, b in zip(first, second, strict=True)]
    if not outcomes:
        return Effect(np.nan, np.nan, np.nan, 1.0, 0)
    won, lost = outcomes.count(1.0), outcomes.count(0.0)
    if not won + lost:
        return Effect(0.5, 0.0, 1.0, 1.0, 0)
    test = stats.binomtest(won, won + lost)
    interval = test.proportion_ci(method="wilson")
    return Effect(won / (won + lost), float(interval.low), float(interval.high), float(test.pvalue), won + lost)


def rank_correlation(sets: Sequence[tuple[Any, StepsToForget]], seed: int = 0) -> Effect:
    """Return the mean Spearman correlation of a property with the steps within sets, weighted by their size.

    Examples censored at a run's end share the highest rank. The interval is a bootstrap over the examples of each set,
    the test a permutation of the property within sets.
    """
    usable = [(np.asarray(x), _ranked(t)) for x, t in sets]
    usable = [(x, t) for x, t in usable if np.ptp(x) > 0 and np.ptp(t) > 0]
    if not usable:
        return Effect(np.nan, np.nan, np.nan, 1.0, 0)
    rng = np.random.default_rng(seed)
    estimate = float(_pooled([(x[None], t[None]) for x, t in usable])[0])
    resampled = [rng.integers(len(x), size=(DRAWS, len(x))) for x, _ in usable]
    boot = _pooled([(x[i], t[i]) for (x, t), i in zip(usable, resampled, strict=True)])
    null = _pooled([(rng.permuted(np.tile(x, (DRAWS, 1)), axis=1), np.tile(t, (DRAWS, 1))) for x, t in usable])
    pvalue = (1 + int((np.abs(null) >= abs(estimate) - 1e-12).sum())) / (1 + DRAWS)
    low, high = np.nanquantile(boot, [0.025, 0.975])
    return Effect(estimate, float(low), float(high), float(pvalue), sum(len(x) for x, _ in usable))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): the chance of any false positive stays below the level."""
    order, adjusted, highest = np.argsort(pvalues, kind="stable"), [0.0] * len(pvalues), 0.0
    for rank, i in enumerate(order.tolist()):
        highest = max(highest, min(1.0, pvalues[i] * (len(pvalues) - rank)))
        adjusted[i] = highest
    return adjusted


def _longer(a: StepsToForget, b: StepsToForget) -> Any:
    """Return (n, m): 1 where b's example takes longer than a's, 0 where a's does, 1/2 where neither is known."""
    s, t = np.asarray(a.steps)[:, None], np.asarray(b.steps)[None, :]
    ended_s, ended_t = ~np.asarray(a.censored)[:, None], ~np.asarray(b.censored)[None, :]
    second = ended_s & ((t > s) | ((t == s) & ~ended_t))  # a censored one lasts longer than what ended at its step
    first = ended_t & ((s > t) | ((s == t) & ~ended_s))
    return second + 0.5 * ~(second | first)


def _ranked(t: StepsToForget) -> Any:
    return np.where(t.censored, np.max(t.steps) + 1, t.steps)


def _pooled(sets: Sequence[tuple[Any, Any]]) -> Any:
    """Average the Spearman correlations (D,) of several sets, weighted by size n; a constant variable is skipped."""
    total, weight = 0.0, 0.0
    for x, t in sets:
        a, b = (r - r.mean(1, keepdims=True) for r in (stats.rankdata(x, axis=1), stats.rankdata(t, axis=1)))
        norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        usable = norm > 0
        total = total + np.where(usable, (a * b).sum(1) / np.where(usable, norm, 1.0), 0.0) * x.shape[1]
        weight = weight + usable * x.shape[1]
    return np.where(weight > 0, total / np.maximum(weight, 1), np.nan)
