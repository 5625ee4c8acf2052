"""Confidence: t and bootstrap intervals of aggregates, and a paired test of two measurements of the same texts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._bounded_mean import bounded_mean
from pyunlearn.metrics._check import Floats, at_least_one, between, numbers, one_of, same_length

FEWEST = 6
"""Texts below which a percentile bootstrap has no interval: of 3 texts the widest possible one covers 75 %."""
_AT_ONCE = 2**22  # resampled numbers in memory at a time


class Interval(NamedTuple):
    """Estimate with its confidence interval, in the unit of the values."""

    estimate: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Mean of after - before over the same texts, with interval and p-value: the result of paired_difference."""

    estimate: float
    low: float
    high: float
    pvalue: float
    exact: bool
    """True where the p-value counts every assignment of signs, False where it samples them."""


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 2000,
    method: str = "percentile",
) -> Interval:
    """Compute statistic(values) with a bootstrap interval: the texts are resampled with replacement.

    "percentile" takes quantiles of the resampled statistics in the tails that make the interval of a mean as wide as
    Student's t (Hesterberg 2015), not (1 -+ confidence) / 2, with which it would cover 87 % for 6 texts; "bca" shifts
    them for bias and skewness. Of a normal law 95 % intervals cover 93 to 96 % from 6 texts on; of a skewed one
    (exponential) 86 to 92 % below 20. The texts count as independent draws from their source: the interval does not
    cover another seed of training.

    Args:
        values: (n,) one number per text.
        statistic: values -> a number; called with `axis` where it has that argument, as numpy's functions have.
        confidence: between 0 and 1.
        seed: the same seed returns the same interval.
        draws: number of resamples.
        method: "percentile" or "bca".

    Returns:
        Interval(estimate, low, high). Equal values have an interval of no width; fewer than 6 have NaN ends, because
        their resamples do not reach far enough: see mean_interval. So has "bca" where leaving out any one value does
        not change the statistic, as for a median of ties: it has no acceleration then; take "percentile".

    Raises:
        ArgumentError: no values, NaN or Inf, an unknown method, a confidence outside (0, 1), draws below 1.

    Example:
        >>> estimate, low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], np.median)
        >>> estimate, low < estimate < high
        (3.5, True)

    See Also:
        mean_interval: for a mean. aggregate_interval: for statistics of several columns. paired_difference: for a
        change.

    Source: Efron 1987, J. Am. Stat. Assoc. 82, 171-185; Hesterberg 2015, Am. Stat. 69, 371-386; scipy.stats.bootstrap.
    """
    x = numbers("values", values, empty=False)
    between("confidence", confidence, 0, 1)
    one_of("method", method, ("percentile", "bca"))
    at_least_one(draws=draws)
    estimate = float(statistic(x))
    if x.size < FEWEST:
        return Interval(estimate, np.nan, np.nan)
    if np.ptp(x) == 0:
        return Interval(estimate, estimate, estimate)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # NaN ends, see Returns
        interval = stats.bootstrap(
            (x,),
            statistic,
            confidence_level=1 - 2 * tail(confidence, x.size),
            n_resamples=draws,
            method={"bca": "BCa"}.get(method, method),
            batch=max(1, _AT_ONCE // x.size),
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(estimate, float(interval.low), float(interval.high))


def mean_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    *,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> Interval:
    """Compute the mean with Student's t interval, which covers as stated for a few values too.

        mean +- t_{n-1}((1 + confidence) / 2) * sd / sqrt(n)

    It assumes independent values of a law near to normal. For numbers between two bounds, such as shares and
    probabilities, which are skewed where their mean is near to a bound, pass `bounds`. The interval is then Student's t
    on the logit scale, widened to the studentized bootstrap on that scale (at the tail that a resample of n texts needs
    to be as wide as t), and nowhere wider than Gaffke's interval, which is Clopper-Pearson's for values at the bounds.
    95 % intervals of log-normal and beta laws, and of laws with 70 % zeros, cover 92 to 100 % for 3 to 100 values: few
    values have a wide interval, because rare large ones may be missing. Without bounds, 95 % intervals of such values
    cover 63 to 90 % for 20 and fewer.

    Args:
        values: (n,) one number per text, or one difference per text.
        confidence: between 0 and 1.
        bounds: the least and the largest number possible, such as (0, 1).
        seed: of the resamples, with bounds: the same seed returns the same interval.
        draws: number of resamples, with bounds.

    Returns:
        Interval(estimate, low, high). Equal values have an interval of no width, with bounds one that tells what n
        equal values leave open; one value has NaN ends.

    Raises:
        ArgumentError: no values, NaN or Inf, a confidence outside (0, 1), a value beyond the bounds.

    Example:
        >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
        [2.0, -0.48, 4.48]
        >>> [round(x, 1) for x in mean_interval([0.0] * 20, bounds=(0, 1))]
        [0.0, 0.0, 0.2]

    See Also:
        bootstrap_interval: of other statistics. paired_difference: with a p-value.
        mean_exposure_interval: of exposures.

    Source: Student 1908, Biometrika 6, 1-25. Studentized bootstrap: Efron and Tibshirani 1993, chapter 12. Its tails:
        Hesterberg 2015, Am. Stat. 69, 371-386. The widest: Gaffke 2005, Math. Methods Stat. 14, 451-467, and
        Learned-Miller and Thomas 2019, arXiv 1905.06208.
    """
    x = numbers("values", values, empty=False)
    between("confidence", confidence, 0, 1)
    mean = float(x.mean())
    if bounds is not None:
        at_least_one(draws=draws)
        least, most = (float(bound) for bound in bounds)
        if not (least < most and least <= x.min() + 1e-12 and x.max() - 1e-12 <= most):
            raise ArgumentError(f"values must lie within bounds={bounds!r}, got {x.min()} to {x.max()}")
    if x.size == 1:
        return Interval(mean, np.nan, np.nan)
    if bounds is not None:
        low, high = bounded_mean(np.clip((x - least) / (most - least), 0, 1), confidence, seed, draws)
        return Interval(mean, min(mean, least + (most - least) * low), max(mean, least + (most - least) * high))
    half = float(stats.t.ppf((1 + confidence) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size)) if np.ptp(x) else 0.0
    return Interval(mean, mean - half, mean + half)


def aggregate_interval(
    statistic: Callable[..., Any],
    *columns: Sequence[Any] | NDArray[Any],
    sets: Sequence[int] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 1000,
) -> Interval:
    """Compute statistic(*columns) with a percentile bootstrap interval, for statistics that are not a per-text mean.

        low, high = quantiles a and 1 - a of statistic(columns[0][i], columns[1][i], ...)
                    over `draws` resamples i of the n texts, a = Phi(-sqrt(n / (n - 1)) t_{n-1}((1 + confidence) / 2))

    Whole texts are resampled with replacement, all columns of a text together: a text keeps its length, its true
    answer, its score before. So the difference of two models on the same texts is paired:
    `aggregate_interval(lambda a, b, n: perplexity(b, n) - perplexity(a, n), before, after, tokens)`. The ends are
    resampled values, the outer neighbours of each quantile. Range and direction are the statistic's. The tail a is the
    one with which the interval of a mean is as wide as Student's t; 95 % intervals of a perplexity cover 90 to 95 %
    from 6 texts on. It has no width where no resample differs: a score at its limit for every text.

    Args:
        statistic: the columns -> a number. Array columns arrive as arrays, all others as lists.
        columns: of n texts each, in the same order: arrays of shape (n, ...) or lists of strings or of lists.
        sets: for each column the number of its set of texts, such as (0, 1, 0, 1): sets are resampled independently,
            columns of one set together, and sets may differ in size. None: all columns are of the same texts.
        confidence: between 0 and 1.
        seed: the same seed returns the same interval.
        draws: number of resamples, each of which costs one call of the statistic.

    Returns:
        Interval(estimate, low, high); NaN ends where a set has fewer than 6 texts, whose resamples do not reach far
        enough.

    Raises:
        ArgumentError: no column, an empty one, columns of one set that differ in length, a statistic that returns no
            number.

    Example:
        >>> tokens = [10, 20, 30, 40, 10, 20]
        >>> correct = [9, 15, 30, 20, 5, 16]
        >>> estimate, low, high = aggregate_interval(lambda c, t: sum(c) / sum(t), correct, tokens, draws=200)
        >>> estimate, low <= estimate <= high
        (0.7307692307692307, True)

    See Also:
        bootstrap_interval: for a statistic of one number per text. mean_interval: for their mean.

    Source: Efron and Tibshirani 1993, chapter 13; the tail: Hesterberg 2015, Am. Stat. 69, 371-386; of BLEU:
        Koehn 2004.
    """
    names = [0] * len(columns) if sets is None else list(sets)
    between("confidence", confidence, 0, 1)
    at_least_one(draws=draws)
    sizes = _sizes(columns, names)
    estimate = _number(statistic(*columns))
    if min(sizes.values()) < FEWEST:
        return Interval(estimate, np.nan, np.nan)
    rng, resampled = np.random.default_rng(seed), np.empty(draws)
    for k in range(draws):
        drawn = {name: rng.integers(0, n, n) for name, n in sizes.items()}
        resampled[k] = _number(
            statistic(*(_take(column, drawn[name]) for name, column in zip(names, columns, strict=True)))
        )
    return Interval(estimate, *percentiles(resampled, tail(confidence, min(sizes.values()))))


def _sizes(columns: Sequence[Any], names: Sequence[int]) -> dict[int, int]:
    """Check that the columns of each set have one length, and return the length of each set."""
    if not columns or len(names) != len(columns):
        raise ArgumentError(
            f"sets must name the set of texts of each of one or more columns, got {len(names)} for {len(columns)} "
            "columns"
        )
    sizes: dict[int, int] = {}
    for i, (name, column) in enumerate(zip(names, columns, strict=True)):
        if isinstance(column, str) or not hasattr(column, "__len__") or getattr(column, "shape", None) == ():
            raise ArgumentError(
                f"columns[{i}] must be a list or an array of one entry for each text, got one {type(column).__name__}"
            )
        if len(column) == 0:
            raise ArgumentError(f"columns[{i}] must hold one entry for each of one or more texts, and is empty")
        if len(column) != sizes.setdefault(name, len(column)):
            raise ArgumentError(
                f"columns of the same texts must be equally long, got {len(column)} entries in columns[{i}] and "
                f"{sizes[name]} before it"
            )
    return sizes


def tail(confidence: float, n: int) -> float:
    """Compute the tail where a resampled mean of n texts is as far out as Student's t: Phi(-sqrt(n / (n - 1)) t)."""
    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    return float(stats.norm.cdf(-t * np.sqrt(n / (n - 1))))


def percentiles(values: Floats, tail: float) -> tuple[float, float]:
    """Compute the ends of a percentile interval as two of the values: interpolating infinite ones would make NaN."""
    low = np.quantile(values, tail, method="lower")
    return float(low), float(np.quantile(values, 1 - tail, method="higher"))


def _take(column: Sequence[Any] | NDArray[Any], indices: NDArray[np.int64]) -> Any:
    """Select the entries of an array or of a list."""
    return column[indices] if not isinstance(column, Sequence) else [column[i] for i in indices]


def _number(value: Any) -> float:
    """Return one number as float; raise ArgumentError for anything else."""
    if np.ndim(value) != 0 or isinstance(value, str):
        raise ArgumentError(f"statistic must return one number, got {type(value).__name__}")
    return float(value)


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 9999,
    alternative: str = "two-sided",
) -> PairedDifference:
    """Compute mean(after - before) over the same texts, its t interval and a sign-flip permutation p-value.

    If before and after are exchangeable within each text, every assignment of signs to the n differences is equally
    likely; the p-value is the share of assignments whose mean is at least as extreme. All 2^n are counted where that
    is at most `draws` + 1 (n up to 13 by default: the smallest two-sided p-value is then 2 / 2^n), else `draws` random
    ones and the identity: (1 + #) / (1 + draws), never 0. Interval and test may disagree at the edge. Texts are the
    unit: tokens of one text are not independent.

    Args:
        before: (n,) one number per text.
        after: (n,) the same texts, in the same order.
        confidence: of the interval, between 0 and 1.
        seed: the same seed returns the same numbers.
        draws: random assignments of the test.
        alternative: "two-sided", "greater" (after > before) or "less".

    Returns:
        PairedDifference(estimate, low, high, pvalue, exact), in the unit of the values; above 0: it rose.

    Raises:
        ArgumentError: different lengths, no values, NaN or Inf, an unknown alternative.

    Example:
        >>> change = paired_difference([1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.5])
        >>> change.estimate, change.pvalue, change.exact
        (0.5, 0.125, True)

    See Also:
        mean_interval: the interval used here.
    """
    a, b = numbers("before", before, empty=False), numbers("after", after, empty=False)
    same_length("before", a, "after", b)
    one_of("alternative", alternative, ("two-sided", "greater", "less"))
    interval = mean_interval(b - a, confidence=confidence)
    exact = a.size < 63 and 2**a.size <= draws + 1
    if a.size == 1:  # scipy needs two; with one difference both signs are equally extreme
        pvalue = 1.0 if alternative == "two-sided" or (alternative == "greater") != (b > a)[0] else 0.5
    else:
        pvalue = stats.permutation_test(
            (b, a),
            _mean_difference,
            permutation_type="samples",
            vectorized=True,
            alternative=alternative,
            n_resamples=2**a.size if exact else draws,
            batch=max(1, _AT_ONCE // a.size),
            random_state=np.random.default_rng(seed),
        ).pvalue
    return PairedDifference(*interval, float(pvalue), exact)


def _mean_difference(b: Floats, a: Floats, axis: int) -> Floats:
    """Compute the mean of b - a along an axis."""
    return np.mean(b - a, axis=axis)
