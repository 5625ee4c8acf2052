"""Steps to forget: how long each example of a run stayed exposed, with censoring."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import CensoredData, ecdf

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._arrays import Booleans, Floats, finite, same_length, truths


class StepsToForget(NamedTuple):
    """When each example was first forgotten."""

    steps: Floats
    """(n,) the step; of a censored example the last one looked at."""
    censored: Booleans
    """(n,) true where the run ended before."""


def steps_to_forget(exposures: ArrayLike, threshold: float, *, steps: ArrayLike | None = None) -> StepsToForget:
    """The first step at which each example's exposure is at most the threshold: tau(x) = min{k : GE_k(x) <= g}.

    Args:
        exposures: (K, n) exposure of each example at K moments, the first of them before the run; bits.
        threshold: g, bits: 1.443 (`NULL_MEAN`), or 4.32 (`SIGNIFICANT`).
        steps: (K,) the step of each moment, rising; 0 to K - 1 if not given.

    Returns:
        StepsToForget. High = hard. An example that is still exposed at the end has no number: its steps are *censored*, and a mean that
        leaves such out, or takes the last step for them, makes hard sets look easy. See `median_steps`.

    Raises:
        ArgumentError: exposures that are not finite, steps that do not rise or do not fit.

    Source: ours, for the question of Baluta et al. 2024, arXiv 2411.04388.
    """
    found = finite(exposures, "exposures", dimensions=2)
    moments = np.arange(len(found)) if steps is None else finite(steps, "steps", dimensions=1)
    same_length(found, moments, "exposures and steps")
    if (np.diff(moments) <= 0).any():
        raise ArgumentError("steps must rise from one moment to the next.")
    gone = found <= threshold
    censored = np.asarray(~gone.any(axis=0))
    return StepsToForget(np.where(censored, moments[-1], moments[gone.argmax(axis=0)]).astype(np.float64), censored)


def median_steps(steps: ArrayLike, censored: ArrayLike) -> float:
    """The Kaplan-Meier median: the first step by which at least half of the examples are forgotten, censoring allowed for.

    Args:
        steps, censored: (n,) as in StepsToForget.

    Returns:
        Steps; inf where the survival curve never comes down to one half. High = hard.

    Raises:
        ArgumentError: steps that are not finite, arrays of different lengths.

    Source: Kaplan and Meier 1958, by scipy.stats.ecdf.
    """
    times, cut = finite(steps, "steps", dimensions=1), truths(censored, "censored")
    same_length(times, cut, "steps and censored")
    survival = ecdf(CensoredData.right_censored(times, cut)).sf
    below = survival.probabilities <= 0.5 + 1e-12
    return float(survival.quantiles[below.argmax()]) if below.any() else np.inf
