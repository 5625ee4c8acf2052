"""Per-example stopping and the utility budget: selection of active examples, acceptance of rounds, verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics import SIGNIFICANT, generalized_exposure, mean_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """Forgetting and utility after a round."""

    log_likelihood: Floats  # (B,) of the forget set, mean a token, nats
    exposure: Floats  # (B,) anchored, bits
    upper_exposure: Floats  # (B,) the same for texts less likely than the non-members: over-unlearning
    utility_nll: Floats  # (W,) of the utility set, mean negative log-likelihood a token, nats
    utility_rise: float  # relative rise of its mean; NaN where a number is not finite


class StoppingRule:
    """Decision for each example whether it is unlearned further, and for each round whether it is accepted.

    An example is *memorized* where its exposure is significant at 5 %, and *active* while it is memorized and above
    `target_exposure`. A round is rejected where the utility set lost more than `utility_budget`, or where an example
    became less likely than 95 % of the non-members.

    Args:
        log_likelihood: (B,) of the forget set under the original model, mean a token, nats.
        non_member_scores: (m,) negative log-likelihoods of the non-members under the original model, nats a token.
        utility_nll: (W,) of the utility set under the original model, nats a token.
        target_exposure: bits at or below which an example is no longer active.
        utility_budget: allowed relative rise of the utility set's mean (of at least 1 nat).

    >>> rule = StoppingRule(
    ...     np.array([-0.1, -3.0]), np.linspace(2, 4, 40), np.array([2.0]), target_exposure=1.44, utility_budget=0.05
    ... )
    >>> rule.active.tolist()
    [0]
    >>> rule.rejection_reason(rule.measurement(np.array([-2.5, -3.0]), np.array([2.2])))
    'utility budget'
    """

    def __init__(
        self,
        log_likelihood: Floats,
        non_member_scores: Floats,
        utility_nll: Floats,
        *,
        target_exposure: float,
        utility_budget: float,
    ) -> None:
        self.non_member_scores, self.utility_before = non_member_scores, utility_nll
        self.target_exposure, self.utility_budget = target_exposure, utility_budget
        self.significant = SIGNIFICANT - 1e-9  # 19 non-members reach it exactly
        self.initial = self.measurement(log_likelihood, utility_nll)
        self.current = self.initial
        self.memorized = self.initial.exposure >= self.significant  # (B,)

    def measurement(self, log_likelihood: Floats, utility_nll: Floats) -> Measurement:
        """Return exposures and utility from (B,) log-likelihoods of the forget set and (W,) NLLs of the utility set."""
        if not (np.isfinite(log_likelihood).all() and np.isfinite(utility_nll).all()):
            nan = np.full(len(log_likelihood), np.nan)
            return Measurement(log_likelihood, nan, nan, utility_nll, math.nan)
        exposure = generalized_exposure(-log_likelihood, self.non_member_scores)
        before = self.utility_before.mean()
        rise = (utility_nll.mean() - before) / max(before, 1.0)
        return Measurement(log_likelihood, exposure.lower, exposure.upper, utility_nll, float(rise))

    @property
    def active(self) -> NDArray[np.int64]:
        """Indices of the active examples."""
        return np.flatnonzero(self.memorized & (self.current.exposure > self.target_exposure))

    def rejection_reason(self, measurement: Measurement) -> str | None:
        """Return the reason to roll back a round that ended with this measurement, or None."""
        if not math.isfinite(measurement.utility_rise):
            return "not finite"
        if measurement.utility_rise > self.utility_budget:
            return "utility budget"
        return "over-unlearning" if self._over_unlearned(measurement).any() else None

    def verdicts(self) -> list[str]:
        """Return one of result.VERDICTS for each example."""
        over = self._over_unlearned(self.current)
        forgotten = self.current.exposure <= self.target_exposure
        return [
            "over-unlearned" if o else "not memorized" if not m else "forgotten" if f else "still exposed"
            for o, m, f in zip(over, self.memorized, forgotten, strict=True)
        ]

    def utility_interval(self) -> tuple[float, float] | None:
        """Return the 95 % t interval of the relative rise over the utility set, paired; None for one text.

        The rise is a ratio, mean(after - before) / max(mean(before), 1), whose error is to first order the mean of
        after - before - rise * before, over the same divisor.
        """
        before, after = self.utility_before, self.current.utility_nll
        if len(before) == 1:
            return None
        scale, rise = max(float(before.mean()), 1.0), self.current.utility_rise
        errors = after - before - (rise * before if scale > 1 else 0)
        _, low, high = mean_interval(rise + (errors - errors.mean()) / scale)
        return low, high

    def _over_unlearned(self, measurement: Measurement) -> NDArray[np.bool_]:
        over: NDArray[np.bool_] = measurement.upper_exposure >= self.significant
        return over & (self.initial.upper_exposure < self.significant)
