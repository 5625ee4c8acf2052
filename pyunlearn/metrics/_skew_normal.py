"""Skew-normal distribution: penalised fit to scores, and tail probabilities in logarithms, which do not underflow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from pyunlearn.metrics._check import Floats

_NODES, _WEIGHTS = special.roots_laguerre(48)
_PENALTY = 0.87591, 0.85625  # of the shape: see fit
_CANCELS = 1e-6  # below this, scipy's cdf is a difference of numbers near 1 and loses its digits


class SkewNormalFit(NamedTuple):
    """Skew-normal laws fitted to scores: (k,) each, k = 1 for shared non-members, else one per text; NaN = no fit."""

    shape: Floats
    """Skewness parameter; 0 = a normal law, above 0 = the long tail is on the right."""
    location: Floats
    """Location, in the unit of the scores."""
    scale: Floats
    """Scale, above 0, in the unit of the scores."""
    statistic: Floats
    """Kolmogorov-Smirnov distance of the scores from the fitted law, 0 to 1; low = a good fit."""
    pvalue: Floats
    """P-value of that distance; too large, because the law was fitted to the same scores. A small one still counts."""


def fit(scores: Floats, selected: NDArray[np.bool_]) -> SkewNormalFit:
    """Fit a skew-normal law by penalised maximum likelihood to each selected row whose numbers are not all equal.

    The penalty is 0.876 ln(1 + 0.856 shape^2). Without it the shape of a few dozen numbers is often infinite, and a
    tail that ends there gives exposures of 10^15 bits.

    Args:
        scores: (k, m), finite.
        selected: (k,) rows to fit.

    Returns:
        SkewNormalFit, (k,) each; NaN where nothing was fitted.

    Source: Azzalini and Arellano-Valle 2013, J. Stat. Plan. Inference 143, 419-433.
    """
    parameters = np.full((5, len(scores)), np.nan)
    for i in np.flatnonzero(selected & (np.ptp(scores, axis=1) > 0)):
        row = scores[i]
        center, spread = row.mean(), row.std()
        standard = (row - center) / spread
        shape, location, scale = _fit_one(standard)
        test = stats.kstest(standard, stats.skewnorm(shape, location, scale).cdf)
        parameters[:, i] = shape, center + spread * location, spread * scale, test.statistic, test.pvalue
    return SkewNormalFit(*parameters)


def _fit_one(x: Floats) -> tuple[float, float, float]:
    """Compute shape, location and scale for numbers of mean 0 and standard deviation 1."""

    def cost(p: Floats) -> tuple[float, Floats]:
        """Compute the penalised negative log-likelihood and its gradient by shape, location and ln scale."""
        shape, width = p[0], np.exp(p[2])
        z = (x - p[1]) / width
        hazard = np.exp(stats.norm.logpdf(shape * z) - special.log_ndtr(shape * z))
        value = _PENALTY[0] * np.log1p(_PENALTY[1] * shape**2) + len(x) * p[2] - _log_pdf(z, shape).sum()
        by_shape = 2 * _PENALTY[0] * _PENALTY[1] * shape / (1 + _PENALTY[1] * shape**2)
        slope = z - shape * hazard  # derivative of -log density by z
        return value, np.array([by_shape - z @ hazard, -slope.sum() / width, len(x) - z @ slope])

    # Start from the law with the same moments. Its skewness is 0.4292 (delta^2 / (pi / 2 - delta^2))^(3/2)
    # with delta = shape / sqrt(1 + shape^2).
    skewness = np.clip(np.mean(x**3), -0.9, 0.9)
    ratio = abs(skewness / (2 - np.pi / 2)) ** (2 / 3)
    delta = np.sign(skewness) * np.sqrt(np.pi / 2 * ratio / (1 + ratio))
    scale = 1 / np.sqrt(1 - 2 * delta**2 / np.pi)
    start = [delta / np.sqrt(1 - delta**2), -scale * delta * np.sqrt(2 / np.pi), np.log(scale)]
    shape, location, log_scale = optimize.minimize(cost, start, jac=True, method="BFGS").x
    return float(shape), float(location), float(np.exp(log_scale))


def _log_pdf(z: Floats, shape: Floats | float) -> Floats:
    """Compute the log density of the standard skew-normal law at z."""
    return np.log(2) + stats.norm.logpdf(z) + special.log_ndtr(shape * z)


def log_cdf(x: Floats, law: SkewNormalFit) -> Floats:
    """Compute ln P(X <= x), (n,), finite however far out; NaN where nothing was fitted.

    Below a cdf of 1e-6 this is log pdf(z) plus the logarithm of the integral of pdf(z - u) / pdf(z) over u > 0, by
    Gauss-Laguerre quadrature with the slope of log pdf at z as rate.
    """
    z = (x - law.location) / law.scale
    shape = np.broadcast_to(law.shape, z.shape)
    with np.errstate(all="ignore"):
        out = np.log(stats.skewnorm.cdf(z, shape))
        far = out < np.log(_CANCELS)
        t, a = z[far], shape[far]
        rate = -t + a * np.exp(stats.norm.logpdf(a * t) - special.log_ndtr(a * t))
        inside = _log_pdf(t[:, None] - _NODES / rate[:, None], a[:, None]) - _log_pdf(t, a)[:, None] + _NODES
        out[far] = _log_pdf(t, a) + np.log(np.exp(inside) @ _WEIGHTS / rate)
    return out


def log_survival(x: Floats, law: SkewNormalFit) -> Floats:
    """Compute ln P(X >= x), (n,), as the cdf of the mirrored law."""
    return log_cdf(-x, law._replace(shape=-law.shape, location=-law.location))
