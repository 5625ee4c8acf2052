"""Step size of a run: it grows while rounds are cheap and shrinks where they are not.

It is the learning rate up to a limit, and beyond it a factor on the forget loss.
"""

from __future__ import annotations

from typing import NamedTuple

LARGEST_EXPONENT = 6
"""The learning rate is at most 2^6 times its start; accepted rounds do not make it smaller than 1/2^6 of it."""

LARGEST_FORGET_EXPONENT = 6
"""At its limit the learning rate stays, and the forget loss is multiplied by 2^6 at most."""

LARGEST = LARGEST_EXPONENT + LARGEST_FORGET_EXPONENT

MAX_REJECTIONS = 7
"""Number of rolled-back rounds, since half of each budget was last left, that ends a run."""

PATIENCE = 4
"""Number of cheap rounds after which a run tries again a rate that was too large."""

CHEAP, EXPENSIVE = 1 / 16, 1 / 4
"""Shares of a budget that one round may use: up to the first the rate may grow, above the second it shrinks."""


NEAR, FAR = 1 / 2, 1.0
"""Nats a token by which a round may move its examples on average: up to the first the rate may grow, above the second
it shrinks. Longer steps carry examples past the level of the non-members."""

STUCK = 1 / 8
"""Nats a token: beyond the largest learning rate the step size grows where a round moves its examples by no more."""

TOLERATED = 1 / 8
"""Share of the active examples that a round may unsettle at no consequence: they are restored meanwhile."""


class StepSize(NamedTuple):
    """Step size as a power of two, and the rolled-back rounds in a row that led to it.

    >>> StepSize().after(accepted=True, budget_used=0.1, round_cost=0.0).rate(1e-5)
    2e-05
    >>> StepSize().after(accepted=False)
    StepSize(exponent=-1, rejections=1, largest=-1, cheap=0)
    """

    exponent: int = 0
    rejections: int = 0
    largest: int = LARGEST
    """Exponent that is reached by doubling: below the last at which a round was rolled back or unsettled examples."""
    cheap: int = 0
    """Cheap rounds at the largest exponent; after PATIENCE of them it is raised."""

    def rate(self, start: float) -> float:
        """Return the learning rate of a run that started at `start`."""
        return float(start * 2.0 ** min(self.exponent, LARGEST_EXPONENT))

    @property
    def forget_weight(self) -> float:
        """Factor on the forget loss: above 1 where rounds at the largest learning rate moved hardly anything."""
        return float(2.0 ** max(self.exponent - LARGEST_EXPONENT, 0))

    @property
    def exhausted(self) -> bool:
        """True where so many rounds in a row were rolled back that a smaller rate is of no use."""
        return self.rejections >= MAX_REJECTIONS

    def after(
        self,
        *,
        accepted: bool,
        budget_used: float = 0.0,
        round_cost: float = 0.0,
        moved: float = 0.0,
        settled: int = 0,
        unsettled: int = 0,
        active: int = 0,
    ) -> StepSize:
        """Return the step size of the next round.

        It doubles after a short, cheap round that unsettled at most an eighth of the active examples, if half of each
        budget is left or the round used none; beyond the largest learning rate only if the round was STUCK. It is
        halved after a round that was rolled back, long or expensive, or that unsettled more than an eighth of them and
        more than it settled; a rollback takes the factor on the forget loss back to 1. After the first and the last of
        these it returns to that size only after PATIENCE cheap rounds.

        Args:
            accepted: False where the round was rolled back.
            budget_used: largest share of a budget that is used now.
            round_cost: largest share of a budget that this round used.
            moved: mean change of the log-likelihoods of the round's examples, nats a token.
            settled: examples that reached the level of the non-members in this round.
            unsettled: examples that fell below it in this round, or crossed it from one side to the other.
            active: examples that are still above it.
        """
        if not accepted:
            smaller = min(self.exponent - 1, LARGEST_EXPONENT)
            return StepSize(smaller, self.rejections + 1, min(self.largest, max(smaller, -LARGEST_EXPONENT)))
        rejections = 0 if budget_used <= 1 / 2 else self.rejections
        smaller = min(self.exponent, max(self.exponent - 1, -LARGEST_EXPONENT))
        if unsettled > max(settled, TOLERATED * active):
            return StepSize(smaller, rejections, min(self.largest, smaller))
        if round_cost > EXPENSIVE or moved > FAR:
            return StepSize(smaller, rejections, self.largest)
        free = budget_used <= 1 / 2 or round_cost <= 0
        if free and round_cost <= CHEAP and moved <= NEAR and unsettled <= TOLERATED * active:
            if self.exponent >= LARGEST_EXPONENT and moved > STUCK:
                return StepSize(self.exponent, rejections, self.largest)
            if self.exponent < self.largest:
                return StepSize(self.exponent + 1, rejections, self.largest)
            if self.cheap + 1 < PATIENCE or self.largest == LARGEST:
                return StepSize(self.exponent, rejections, self.largest, self.cheap + 1)
            return StepSize(self.exponent + 1, rejections, self.largest + 1)
        return StepSize(self.exponent, rejections, self.largest)
