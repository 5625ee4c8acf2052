"""Confidence: an interval on every aggregate, and whether two measurements of the same texts differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, between, numbers, one_of, same_length

_AT_ONCE = 2**22  # resampled numbers in memory at a time


class Interval(NamedTuple):
    """An estimate and the confidence interval around it, in the unit of the values."""

    estimate: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """after - before over the same texts: see paired_difference."""

    estimate: float
    low: float
    high: float
    pvalue: float
    exact: bool
    """The p-value counts every assignment of signs, not a random sample of them."""


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 2000,
    method: str = "percentile",
) -> Interval:
    """statistic(values) with a bootstrap interval: the texts are drawn again with replacement, `draws` times.

    "percentile" takes the quantiles (1 - confidence) / 2 and (1 + confidence) / 2 of the resampled statistics; "bca" shifts them for bias and
    skewness (Efron 1987, J. Am. Stat. Assoc. 82, 171-185; scipy.stats.bootstrap), which is worth its cost for skewed values. The texts are taken
    as independent draws from their source: the interval says nothing about another seed of training. Below about 10 texts either is too narrow.

    Args:
        values: (n,) one number for each text.
        statistic: values -> a number; called with `axis` where it has such an argument, as numpy's have.
        confidence: between 0 and 1.
        seed: the same seed gives the same interval.
        draws: resamples.
        method: "percentile" or "bca".

    Returns:
        Interval(estimate, low, high). Equal values give an interval of no width. Of one value nothing can be said: low and high are NaN.

    Raises:
        ArgumentError: no values, a value that is not finite, an unknown method, a confidence outside (0, 1).
    """
    x = numbers("values", values, least=1)
    between("confidence", confidence, 0, 1)
    one_of("method", method, ("percentile", "bca"))
    if draws < 1:
        raise ArgumentError(f"draws must be 1 or more, got {draws}")
    estimate = float(statistic(x))
    if x.size == 1:
        return Interval(estimate, np.nan, np.nan)
    if np.ptp(x) == 0:
        return Interval(estimate, estimate, estimate)
    found = stats.bootstrap(
        (x,), statistic, confidence_level=confidence, n_resamples=draws, method={"bca": "BCa"}.get(method, method),
        batch=max(1, _AT_ONCE // x.size), random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(estimate, float(found.low), float(found.high))


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 9999,
    alternative: str = "two-sided",
) -> PairedDifference:
    """mean(after - before) over the same texts, with a bootstrap interval and the p-value of a sign-flip permutation test.

    If before and after are exchangeable within each text, every assignment of signs to the n differences is equally likely; the p-value is the
    share of assignments whose mean is at least as far out. All 2^n are counted where that is at most `draws` + 1 (n up to 13 by default: the
    smallest two-sided p-value is then 2 / 2^n), else `draws` random ones, and the identity: (1 + #) / (1 + draws), never 0. The interval
    and the test may disagree at the edge. Texts are the unit: tokens of one text are not independent.

    Args:
        before: (n,) one number for each text.
        after: (n,) the same texts, in the same order.
        confidence: of the interval, between 0 and 1.
        seed: the same seed gives the same numbers.
        draws: resamples of the interval and random assignments of the test.
        alternative: "two-sided", or "greater" (after > before) or "less".

    Returns:
        PairedDifference(estimate, low, high, pvalue, exact), in the unit of the values; above 0: it rose.

    Raises:
        ArgumentError: different lengths, no values, a value that is not finite, an unknown alternative.
    """
    a, b = numbers("before", before, least=1), numbers("after", after, least=1)
    same_length("before", a, "after", b)
    one_of("alternative", alternative, ("two-sided", "greater", "less"))
    interval = bootstrap_interval(b - a, confidence=confidence, seed=seed, draws=draws)
    exact = a.size < 63 and 2**a.size <= draws + 1
    if a.size == 1:  # scipy wants two: of one difference both signs are equally far out
        pvalue = 1.0 if alternative == "two-sided" or (alternative == "greater") != (b > a)[0] else 0.5
    else:
        pvalue = stats.permutation_test(
            (b, a), _mean_difference, permutation_type="samples", vectorized=True, alternative=alternative,
            n_resamples=2**a.size if exact else draws, batch=max(1, _AT_ONCE // a.size), random_state=np.random.default_rng(seed),
        ).pvalue  # fmt: skip
    return PairedDifference(*interval, float(pvalue), exact)


def _mean_difference(b: Floats, a: Floats, axis: int) -> Floats:
    return np.mean(b - a, axis=axis)
