"""Steps to forget: how long each example of a run stayed exposed, with censoring."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import CensoredData, ecdf

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Booleans, Floats, finite, same_length, truths


class StepsToForget(NamedTuple):
    """Step at which each example was first forgotten."""

    steps: Floats
    """(n,) the step; for a censored example the last one measured."""
    censored: Booleans
    """(n,) true where the run ended before the example was forgotten."""


def steps_to_forget(exposures: ArrayLike, threshold: float, *, steps: ArrayLike | None = None) -> StepsToForget:
    """Return the first step at which each example's exposure is at most the threshold.

        tau(x) = min{k : GE_k(x) <= g}

    An example that is still exposed at the end has no number: it is *censored*, and a mean that leaves censored
    examples out, or takes the last step for them, makes hard sets look easy. See `median_steps`.

    Args:
        exposures: (K, n) exposure of each example at K measurements, the first of them before the run; bits.
        threshold: g, bits: 1.443 (`NULL_MEAN`), or 4.32 (`SIGNIFICANT`).
        steps: (K,) the step of each measurement, ascending; default 0 to K - 1.

    Returns:
        StepsToForget(steps, censored). High = hard.

    Raises:
        ArgumentError: NaN or Inf, steps that do not ascend, another number of steps than of measurements.

    Example:
        >>> result = steps_to_forget([[6.0, 6.0], [2.0, 5.0], [1.0, 4.0]], threshold=1.443, steps=[0, 8, 16])
        >>> result.steps.tolist(), result.censored.tolist()
        ([16.0, 16.0], [False, True])

    See Also:
        median_steps: the median with censoring. generalized_exposure: the exposures.

    Source: ours, for the question of Baluta et al. 2024, arXiv 2411.04388.
    """
    bits = finite("exposures", exposures, dimensions=2)
    at = np.arange(len(bits)) if steps is None else finite("steps", steps, dimensions=1)
    if len(at) != len(bits):
        raise ArgumentError(f"steps must hold one step for each of the {len(bits)} rows of exposures, got {len(at)}")
    if (np.diff(at) <= 0).any():
        raise ArgumentError("steps must ascend from one measurement to the next")
    gone = bits <= threshold
    censored = np.asarray(~gone.any(axis=0))
    return StepsToForget(np.where(censored, at[-1], at[gone.argmax(axis=0)]).astype(np.float64), censored)


def median_steps(steps: ArrayLike, censored: ArrayLike) -> float:
    """Compute the Kaplan-Meier median: the first step by which at least half of the examples are forgotten.

    Args:
        steps: (n,) as in StepsToForget.
        censored: (n,) as in StepsToForget.

    Returns:
        Steps; inf where the survival curve never falls to one half. High = hard.

    Raises:
        ArgumentError: NaN or Inf, arrays of different lengths.

    Example:
        >>> median_steps([2, 4, 9, 9], [False, False, True, True])
        4.0

    Source: Kaplan and Meier 1958, by scipy.stats.ecdf.
    """
    times, cut = finite("steps", steps, dimensions=1), truths("censored", censored)
    same_length("steps", times, "censored", cut)
    survival = ecdf(CensoredData.right_censored(times, cut)).sf
    below = survival.probabilities <= 0.5 + 1e-12
    return float(survival.quantiles[below.argmax()]) if below.any() else np.inf
