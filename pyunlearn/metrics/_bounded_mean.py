"""Interval of the mean of numbers between two bounds: a studentized bootstrap on the logit scale."""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from pyunlearn.metrics._check import Floats

_AT_ONCE = 2**22  # resampled numbers in memory at a time


def bounded_mean(x: Floats, confidence: float, seed: int, draws: int) -> tuple[float, float]:
    """Compute the ends of the interval of a mean of numbers from 0 to 1; mean_interval has the formula.

    Args:
        x: (n,) two numbers or more, 0 to 1.
        confidence: between 0 and 1.
        seed: seed of the resamples.
        draws: number of resamples.

    Returns:
        low and high end, 0 to 1.
    """
    n, mean, tail = x.size, float(x.mean()), (1 - confidence) / 2
    rng = np.random.default_rng(seed)
    least, most = _gaffke(x, tail, rng, draws)
    error = float(x.std(ddof=1) / np.sqrt(n)) / max(mean * (1 - mean), np.finfo(float).tiny)  # of logit(mean)
    if not error or not 0 < mean < 1:  # equal values, or a spread that underflows
        return min(least, mean), max(most, mean)
    t = float(stats.t.ppf(1 - tail, n - 1))
    wider = stats.norm.cdf(-t * np.sqrt(n / (n - 1)))  # the tail of a resample of n texts that is as far out as t
    studentized = _studentized(x, rng, draws)
    below, above = np.quantile(studentized, wider, method="lower"), np.quantile(studentized, 1 - wider, method="higher")
    center = special.logit(mean)
    low, high = special.expit(center - max(t, above) * error), special.expit(center - min(-t, below) * error)
    return min(mean, max(least, float(low))), max(mean, min(most, float(high)))


def _gaffke(x: Floats, tail: float, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """Compute Gaffke's bounds: quantiles of the mean with Dirichlet(1, ..., 1) weights on the values and one bound."""
    low, high = [], []
    for start in range(0, draws, step := max(1, _AT_ONCE // (x.size + 1))):
        weights = rng.standard_exponential((min(step, draws - start), x.size + 1))
        total = weights.sum(1)
        low.append(weights[:, 1:] @ x / total)
        high.append(low[-1] + weights[:, 0] / total)
    return float(np.quantile(np.concatenate(low), tail)), float(np.quantile(np.concatenate(high), 1 - tail))


def _studentized(x: Floats, rng: np.random.Generator, draws: int) -> Floats:
    """Compute (logit(mean of a resample) - logit(mean)) / its own standard error, (draws,); inf without spread."""
    n, center, out = x.size, float(x.mean()), []
    squares = (x - center) ** 2
    for start in range(0, draws, step := max(1, _AT_ONCE // n)):
        times = rng.multinomial(n, np.full(n, 1 / n), min(step, draws - start))
        mean = times @ x / n
        variance = (times @ squares / n - (mean - center) ** 2) / (n - 1)
        flat = (variance <= 1e-12 * squares.mean()) | (mean <= 0) | (mean >= 1)  # all of one value
        with np.errstate(all="ignore"):
            t = (special.logit(mean) - special.logit(center)) * mean * (1 - mean) / np.sqrt(variance)
        out.append(np.where(flat, np.where(mean > center, np.inf, -np.inf), t))
    return np.concatenate(out)
