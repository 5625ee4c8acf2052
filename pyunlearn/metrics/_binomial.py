"""The exact interval of a share, for everything here that counts texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pyunlearn.metrics._check import Floats


def clopper_pearson(count: ArrayLike, n: int, confidence: float) -> tuple[Floats, Floats]:
    """Two-sided interval of a share of which `count` of n were seen (Biometrika 26, 404-413, 1934); count may lie between whole numbers."""
    c, tail = np.asarray(count, dtype=np.float64), (1 - confidence) / 2
    with np.errstate(all="ignore"):  # Beta(0, .) and Beta(., 0) are NaN: the ends 0 and 1
        low = np.where(c <= 0, 0.0, stats.beta.ppf(tail, c, n - c + 1))
        high = np.where(c >= n, 1.0, stats.beta.ppf(1 - tail, c + 1, n - c))
    return low, high
