"""Budgets of a run: how much less likely some texts may become, tested on the upper end of the rise's interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics import mean_interval

Floats = NDArray[np.float64]

UTILITY_BUDGET, HOLDOUT_BUDGET = "utility budget", "holdout budget"
"""Reasons to reject a round, in the history and in `Result.stopped`."""


class Rise(NamedTuple):
    """Relative rise of the mean negative log-likelihood of some texts; NaN where a number is not finite."""

    estimate: float
    interval: tuple[float, float] | None
    """95 % interval over the texts; None for one text."""
    of_losses: float = math.inf
    """Upper end of the interval of the mean loss, in which a gain counts as 0."""

    @property
    def upper(self) -> float:
        """Upper end of the interval, or of that of the losses if smaller, which a budget bounds; of one text the rise.

        The rise is at most the mean loss. So texts that became likelier, which widen the interval, are no reason to end
        a run.
        """
        return self.estimate if self.interval is None else min(self.interval[1], self.of_losses)


class Budget(NamedTuple):
    """Bound on the rise of some texts' negative log-likelihood.

    >>> budget = Budget(UTILITY_BUDGET, np.array([2.0, 2.0, 2.0]), 0.05)
    >>> rise = budget.rise(np.array([2.0, 2.04, 2.08]))
    >>> round(rise.estimate, 3), round(rise.upper, 3), budget.exceeded(rise)
    (0.02, 0.07, True)
    """

    name: str
    """UTILITY_BUDGET or HOLDOUT_BUDGET."""
    before: Floats
    """(n,) of the texts under the original model, mean a token, nats."""
    allowed: float
    """Relative rise up to which a round is accepted."""
    least: float = 1.0
    """Nats a token: the rise is relative to the mean before, or to this where the mean is smaller."""
    gains_capped: bool = False
    """True: what a text gains counts up to `allowed`, so that a gain of few does not hide the loss of others."""

    def rise(self, after: Floats) -> Rise:
        """Return the relative rise of the mean, of at least `least`, with its paired 95 % t interval.

        The rise is a ratio, mean(after - before) / max(mean(before), least), whose error is to first order the mean of
        after - before - rise * before, over the same divisor.

        Args:
            after: (n,) negative log-likelihoods of the same texts, nats a token.
        """
        if not np.isfinite(after).all():
            return Rise(math.nan, None)
        before = self.before
        after = np.maximum(after, (1 - self.allowed) * before) if self.gains_capped else after
        scale = max(float(before.mean()), self.least)
        estimate = float((after.mean() - before.mean()) / scale)
        if len(before) == 1:
            return Rise(estimate, None)
        errors = after - before - (estimate * before if scale > self.least else 0)
        _, low, high = mean_interval(estimate + (errors - errors.mean()) / scale)
        _, _, of_losses = mean_interval(np.maximum(after - before, 0) / scale)
        return Rise(estimate, (low, high), of_losses)

    def exceeded(self, rise: Rise) -> bool:
        """Return whether the upper end of the rise's interval is above the budget."""
        return rise.upper > self.allowed


def budget_notes(stopped: str, history: Sequence[Mapping[str, Any]], budgets: Sequence[Budget]) -> list[str]:
    """Return what is to be noted on a run that ended by a budget, one sentence each.

    Args:
        stopped: the reason why it ended, see `Result.stopped`.
        history: the records of its steps.
        budgets: its budgets.
    """
    notes = []
    for budget in budgets:
        if budget.name != stopped:
            continue
        texts = stopped.split()[0]
        if stopped == HOLDOUT_BUDGET:
            notes.append(
                f"The run ended because unseen text like the forget set would have lost more than {budget.allowed:.0%} "
                "(holdout_budget). Where the model knows this kind of text from the forget set alone, a model trained "
                "without it would lose as much: pass a larger holdout_budget, or None."
            )
        last = [r for r in history if r.get("rejection_reason") == stopped][-1:]
        if any(r[f"{texts}_rise"] is not None and r[f"{texts}_rise"] <= budget.allowed for r in last):
            source = "retain and holdout" if stopped == UTILITY_BUDGET else "holdout"
            notes.append(
                f"The last round was rolled back although the mean rise was within the {stopped}: with "
                f"{len(budget.before)} texts its interval reached beyond. More {source} texts would make it narrower."
            )
    return notes
