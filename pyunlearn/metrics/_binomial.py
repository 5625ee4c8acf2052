"""Exact confidence interval of a share, for every metric that counts texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pyunlearn.metrics._check import Floats


def clopper_pearson(count: ArrayLike, n: ArrayLike, confidence: float) -> tuple[Floats, Floats]:
    """Compute the two-sided Clopper-Pearson interval of a share of which `count` of n were observed.

    Args:
        count: (...) observed counts, 0 to n, not necessarily whole numbers.
        n: number of trials, one or (...).
        confidence: between 0 and 1.

    Returns:
        (...) low and high ends, 0 to 1.

    Example:
        >>> low, high = clopper_pearson(0, 10, 0.95)
        >>> round(float(low), 3), round(float(high), 3)
        (0.0, 0.308)

    Source: Clopper and Pearson 1934, Biometrika 26, 404-413.
    """
    c, n, tail = np.asarray(count, dtype=np.float64), np.asarray(n), (1 - confidence) / 2
    with np.errstate(all="ignore"):  # Beta(0, .) and Beta(., 0) are NaN: the ends are 0 and 1
        low = np.where(c <= 0, 0.0, stats.beta.ppf(tail, c, n - c + 1))
        high = np.where(c >= n, 1.0, stats.beta.ppf(1 - tail, c + 1, n - c))
    return low, high
