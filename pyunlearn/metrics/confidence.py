"""Confidence: an interval on every aggregate, and whether two measurements of the same texts differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
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


def aggregate_interval(
    statistic: Callable[..., Any],
    *columns: Sequence[Any] | NDArray[Any],
    sets: Sequence[int] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 1000,
) -> Interval:
    """statistic(*columns) with a percentile bootstrap interval, for aggregates that are no mean of one number a text: corpus scores, ratios of sums.

        low, high = quantiles (1 -+ confidence) / 2 of statistic(columns[0][i], columns[1][i], ...) over `draws` draws of the n texts i

    Whole texts are drawn again, with replacement, and all their columns with them: a text keeps its reference, its length, its score before. So the
    difference of two models on the same texts is paired: `aggregate_interval(lambda a, b, n: perplexity(b, n) - perplexity(a, n), before, after, tokens)`.
    Efron and Tibshirani 1993, chapter 13; of BLEU: Koehn 2004. The ends are resampled values, the outer ones of the two beside each quantile.
    Range and direction are the statistic's. As for bootstrap_interval, below about 10 texts it is too narrow, and it has no width where no resample
    differs: a score at its limit for every text.

    Args:
        statistic: the columns -> a number. It gets what has a shape as an array, any other column as a list.
        columns: of n texts each, in the same order: arrays of shape (n, ...) or lists (of strings, or of lists of references).
        sets: for each column the set of texts that it is of, such as (0, 1, 0, 1): sets are drawn independently, columns of one set together, and sets
            may differ in size. None: all are of the same texts.
        confidence: between 0 and 1.
        seed: the same seed gives the same interval.
        draws: resamples, each of which costs one call of the statistic.

    Returns:
        Interval(estimate, low, high). Where a set is one text nothing can be said: low and high are NaN.

    Raises:
        ArgumentError: no column, an empty one, columns of one set that differ in length, a statistic that gives no number.
    """
    of = [0] * len(columns) if sets is None else list(sets)
    if not columns or len(of) != len(columns):
        raise ArgumentError(
            f"sets must say of each of one or more columns which texts it is of, got {len(of)} for {len(columns)} columns"
        )
    between("confidence", confidence, 0, 1)
    if draws < 1:
        raise ArgumentError(f"draws must be 1 or more, got {draws}")
    sizes: dict[int, int] = {}
    for i, (name, column) in enumerate(zip(of, columns, strict=True)):
        if isinstance(column, str) or not hasattr(column, "__len__") or getattr(column, "shape", None) == ():
            raise ArgumentError(
                f"columns[{i}] must be a list or an array of one entry for each text, got one {type(column).__name__}"
            )
        if len(column) == 0:
            raise ArgumentError(f"columns[{i}] must hold one entry for each of one or more texts, and is empty")
        if len(column) != sizes.setdefault(name, len(column)):
            raise ArgumentError(
                f"columns of the same texts must be equally long, got {len(column)} entries in columns[{i}] and {sizes[name]} before it"
            )
    estimate = _number(statistic(*columns))
    if min(sizes.values()) == 1:
        return Interval(estimate, np.nan, np.nan)
    rng, found = np.random.default_rng(seed), np.empty(draws)
    for k in range(draws):
        drawn = {name: rng.integers(0, n, n) for name, n in sizes.items()}
        found[k] = _number(statistic(*(_of(column, drawn[name]) for name, column in zip(of, columns, strict=True))))
    return Interval(estimate, *percentiles(found, confidence))


def percentiles(found: Floats, confidence: float) -> tuple[float, float]:
    """The ends of a percentile interval: values that were found, so that infinite ones do not make NaN between them."""
    low = np.quantile(found, (1 - confidence) / 2, method="lower")
    return float(low), float(np.quantile(found, (1 + confidence) / 2, method="higher"))


def _of(column: Sequence[Any] | NDArray[Any], places: NDArray[np.int64]) -> Any:
    return column[places] if not isinstance(column, Sequence) else [column[i] for i in places]


def _number(value: Any) -> float:
    if np.ndim(value) != 0 or isinstance(value, str):
        raise ArgumentError(f"statistic must give one number, got {type(value).__name__}")
    return float(value)


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
