"""Per-example stopping and the budgets: which examples are unlearned or restored, which rounds count, verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT, Exposure, Verdict, generalized_exposure, verdict
from pyunlearn.metrics.exposure import is_significant
from pyunlearn.metrics.families import families_of
from pyunlearn.metrics.left import Scores, newly_known
from pyunlearn.metrics.verdict import NOT_EXTRACTED, anchor_after, discoveries_within
from pyunlearn.probes.non_members import NonMembers, uncalibrated
from pyunlearn.unlearning.budget import HOLDOUT_BUDGET, UTILITY_BUDGET, Budget, Rise

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

LEAST_WEIGHT = 0.01
"""Least factor on the forget loss."""

LEVEL_MARGIN = 0.1
"""Nats a token below the target at which `match` lets the examples end."""

EXTRACTED_SHARE = 0.8
"""Share of the way from the target to where an example is overshot at which an extracted example is to end."""


MAX_OVERSHOOTS = 4
"""Number of times that an example may fall below the non-members and still be unlearned for what is extracted of it."""


@dataclass(frozen=True)
class Measurement:
    """Forgetting and utility after a round."""

    log_likelihood: Floats  # (B,) of the forget set, mean a token, nats
    exposure: Exposure  # (B,) anchored, bits
    extraction: Floats  # (B,) exposure of the share of first-choice tokens, bits; NaN where it was not measured
    utility_nll: Floats  # (W,) of the utility set, mean negative log-likelihood a token, nats
    utility: Rise  # of the utility set
    holdout: Rise | None  # of the holdout, where it has a budget


class StoppingRule:
    """Decision for each example whether it is unlearned further or restored, and for each round whether it is accepted.

    An example is *memorized* where its exposure is selected among those of the whole set, at the false discovery rate.
    Other forms of texts (`NonMembers.forms`) are compared with the same form of the non-members, and selected among
    themselves, see `families_of`.
    It is *active* while it is memorized and its exposure is above `target_exposure`; when no exposure is, while more of
    it is extracted than of four in five non-members. It is *overshot* from where it is less likely than 95 % of the
    non-members until it is back among them: `ForgetTerm.restore` is its loss then. All others are settled. A round is
    rejected where a number is not finite, or where the utility set or the holdout may have lost more than its budget
    (the upper end of the 95 % interval decides): no single example rejects it.

    Args:
        log_likelihood: (B,) of the forget set under the original model, mean a token, nats.
        non_member_nll: (m,) negative log-likelihoods of the non-members under the original model, nats a token.
        non_member_extracted: (m,) shares of the non-members' tokens that are the original model's first choice.
        utility_nll: (W,) of the utility set under the original model, nats a token.
        target_exposure: bits at or below which an example is no longer active.
        false_discovery_rate: among the examples called memorized, and among those called over-unlearned.
        utility_budget: allowed relative rise of the utility set's mean (of at least 1 nat).
        utility_known: True where the model knows the utility set by heart: the rise is then relative to the mean that
            the forget texts would have if they were unseen.
        utility_gains_capped: True: what a text of the utility set gains counts up to the budget.
        holdout_nll: (H,) of the holdout texts that have a budget, under the original model; None where they have none.
        holdout_budget: allowed relative rise of their mean.
        non_members: what is expected of the examples and of the non-members if they are unseen, which is subtracted
            from their numbers; default: nothing, as for a holdout.

    >>> rule = StoppingRule(
    ...     np.array([-0.1, -3.0]), np.linspace(2, 4, 40), np.linspace(0, 1, 40), np.array([2.0]),
    ...     target_exposure=1.44, utility_budget=0.05,
    ... )
    >>> rule.active.tolist()
    [0]
    >>> rule.rejection_reason(rule.measurement(np.array([-2.5, -3.0]), np.array([2.2])))
    'utility budget'
    """

    def __init__(
        self,
        log_likelihood: Floats,
        non_member_nll: Floats,
        non_member_extracted: Floats,
        utility_nll: Floats,
        *,
        target_exposure: float,
        utility_budget: float,
        holdout_nll: Floats | None = None,
        holdout_budget: float | None = None,
        false_discovery_rate: float = 0.05,
        non_members: NonMembers | None = None,
        utility_known: bool = False,
        utility_gains_capped: bool = False,
    ) -> None:
        self.non_member_nll = non_member_nll
        self.holdout_budget: Budget | None = None
        if holdout_nll is not None and holdout_budget is not None:
            self.holdout_budget = Budget(HOLDOUT_BUDGET, holdout_nll, holdout_budget)
        self.non_members = non_members or uncalibrated("holdout", len(log_likelihood), [], m=len(non_member_nll))
        self.non_member_scores = non_member_nll - self.non_members.own.nll
        self.present = self.non_member_scores  # (m,) under the weights of the last comparison
        self.anchor, self.anchor_is_old = self.non_member_scores, False  # what the present weights are compared with
        self.non_member_extracted = non_member_extracted - self.non_members.own.greedy_match
        self.groups, plain = self.non_members.groups, self.non_members.as_they_are
        of_forget = self.non_members.forget.nll[self.groups[0] == 0]
        unseen = float(of_forget.mean() + self.non_member_scores[plain].mean())
        least = max(1.0, unseen) if utility_known else 1.0
        self.utility_budget = Budget(UTILITY_BUDGET, utility_nll, utility_budget, least, utility_gains_capped)
        self.target_exposure, self.false_discovery_rate = target_exposure, false_discovery_rate
        self.initial = self.measurement(log_likelihood, utility_nll, holdout_nll)
        self.current = self.initial
        self.overshot = np.zeros(len(log_likelihood), dtype=bool)  # (B,) those to restore
        self.overshoots = np.zeros(len(log_likelihood), dtype=np.int64)  # (B,) how often, by steps on itself
        self.stale = np.zeros(len(log_likelihood), dtype=bool)  # (B,) those not scored under the present weights
        self.returning = np.zeros(len(log_likelihood), dtype=bool)  # (B,) those that fine-tuning brings back
        exposure = self.initial.exposure.lower
        self.families = families_of(exposure, *self.groups)  # (B,) in which the memorized ones are selected
        self.memorized, _ = discoveries_within(self.families, exposure, rate=false_discovery_rate)  # (B,)

    def measurement(
        self,
        log_likelihood: Floats,
        utility_nll: Floats,
        holdout_nll: Floats | None = None,
        extraction: Floats | None = None,
    ) -> Measurement:
        """Return exposures and rises.

        Args:
            log_likelihood: (B,) of the forget set.
            utility_nll: (W,) negative log-likelihoods of the utility set.
            holdout_nll: (H,) the same of the holdout; None where it has no budget.
            extraction: (B,) bits, as far as they are known.
        """
        utility, holdout = self.utility_budget.rise(utility_nll), None
        if self.holdout_budget is not None and holdout_nll is not None:
            holdout = self.holdout_budget.rise(holdout_nll)
        nan = np.full(len(log_likelihood), np.nan)
        if not (np.isfinite(log_likelihood).all() and _finite(utility) and _finite(holdout)):
            utility, holdout = Rise(math.nan, None), None if holdout is None else Rise(math.nan, None)
            return Measurement(log_likelihood, Exposure(nan, nan, nan > 0), nan, utility_nll, utility, holdout)
        exposure = generalized_exposure(self._scores(log_likelihood), self.anchor, groups=self.non_members.forms)
        return Measurement(
            log_likelihood, exposure, nan if extraction is None else extraction, utility_nll, utility, holdout
        )

    @property
    def level(self) -> Floats:
        """(B,) mean log-likelihood a token, nats, to which `match` moves the examples now.

        That is a little below the target: LEVEL_MARGIN, or half of the way to where an example is overshot. For an
        example that has come there and is still extracted it is EXTRACTED_SHARE of that way (half of it where only some
        tokens may stay likely, see `likely`), and for one that went too
        far half as much as for others, so that it comes back among them.
        """
        target = self._quantile(self.anchor, 2.0**-self.target_exposure)
        way = self._quantile(self.anchor, 1 - 2.0**-SIGNIFICANT) - target
        near = np.minimum(LEVEL_MARGIN, way / 2)
        below = np.where(self.extracted, EXTRACTED_SHARE * way, near)
        below = np.where(self.likely < 1, way / 2, below)
        below = np.where(self.overshot, near / 2, below)
        return -(self.non_members.forget.nll + target + below)

    @property
    def likely(self) -> Floats:
        """(B,) share of each example's tokens that may stay likelier than its others, see `match`.

        All, but of an example that is still extracted as many as four in five non-members have first choices, if these
        are less than half of its tokens: else its ranks do not tell which tokens were memorized.
        """
        share, extracted = np.ones(len(self.memorized)), self.extracted
        most = self._quantile(self.non_member_extracted, 1 - 2.0**-NOT_EXTRACTED, method="lower")
        allowed = np.clip(most + self.non_members.forget.greedy_match, 0, 1)[extracted]
        share[extracted] = np.where(allowed < 0.5, allowed, 1.0)
        return share

    @property
    def budgets(self) -> list[tuple[Budget, Rise]]:
        """The budgets, each with the rise of the present weights."""
        return self._budgets(self.current)

    @property
    def budget_used(self) -> float:
        """Largest share of a budget that the present weights use, at the upper end of the rise's interval."""
        return max(rise.upper / budget.allowed if budget.allowed else math.inf for budget, rise in self.budgets)

    @property
    def forget_weight(self) -> float:
        """Factor on the forget loss of the next round: small where most of a budget is used."""
        return float(max(LEAST_WEIGHT, (1 - min(max(self.budget_used, 0.0), 1.0)) ** 4))

    @property
    def scores(self) -> dict[str, NDArray[Any]]:
        """Name -> (B,) numbers of the present state, and the anchor (m,), which a resumed run continues from."""
        return {
            "log_likelihood": self.current.log_likelihood,
            "extraction": self.current.extraction,
            "overshot": self.overshot,
            "overshoots": self.overshoots.copy(),
            "stale": self.stale.copy(),
            "anchor": self.anchor,
        }

    def resume(self, scores: dict[str, NDArray[Any]], utility_nll: Floats, holdout_nll: Floats | None) -> None:
        """Continue from the `scores` of a checkpoint, with the budgets' texts scored again."""
        self.anchor, self.anchor_is_old = scores["anchor"], True
        self.current = self.measurement(scores["log_likelihood"], utility_nll, holdout_nll, scores["extraction"])
        self.overshot = scores["overshot"].astype(bool)
        self.overshoots, self.stale = scores["overshoots"].astype(np.int64), scores["stale"].astype(bool)

    def compare_with(self, non_member_nll: Floats) -> None:
        """Compare with the non-members' (m,) negative log-likelihoods under the present weights, see `anchor_after`."""
        self.anchor_is_old = False
        self.present = non_member_nll - self.non_members.own.nll
        self.anchor = anchor_after(self.non_member_scores, self.present, self.groups[1])
        self.refresh(self.rescored(self.current.log_likelihood, self.current.extraction), np.empty(0, dtype=np.int64))

    def rescored(self, log_likelihood: Floats, extraction: Floats) -> Measurement:
        """Return the present measurement with other (B,) log-likelihoods and extractions."""
        exposure = generalized_exposure(self._scores(log_likelihood), self.anchor, groups=self.non_members.forms)
        return replace(self.current, log_likelihood=log_likelihood, exposure=exposure, extraction=extraction)

    def near_target(self, measurement: Measurement) -> Indices:
        """Return the indices of the memorized examples whose exposure has reached the target."""
        return np.flatnonzero(self.memorized & (measurement.exposure.lower <= self.target_exposure))

    def all_near_target(self, measurement: Measurement) -> bool:
        """Return whether no memorized example has an exposure above the target: from then on extraction decides."""
        return not (self.memorized & ~(measurement.exposure.lower <= self.target_exposure)).any()

    def with_extraction(self, measurement: Measurement, indices: Indices, extracted: Floats) -> Measurement:
        """Return the measurement with the extracted shares (0 to 1) of the examples at `indices`."""
        if not len(indices):
            return measurement
        extraction = measurement.extraction.copy()
        excess = extracted - self.non_members.forget.greedy_match[indices]
        groups = None if self.non_members.forms is None else (self.groups[0][indices], self.groups[1])
        extraction[indices] = generalized_exposure(-excess, -self.non_member_extracted, groups=groups).lower
        return replace(measurement, extraction=extraction)

    @property
    def active(self) -> Indices:
        """Indices of the active examples: those that are too likely, and when there are none, those extracted."""
        if not self.all_near_target(self.current):
            return np.flatnonzero(self.memorized & ~(self.current.exposure.lower <= self.target_exposure))
        return np.flatnonzero(self.extracted & ~self.overshot & (self.overshoots < MAX_OVERSHOOTS))

    @property
    def unsettled(self) -> Indices:
        """Indices of the examples that the next round takes: the active, the overshot and the returning ones."""
        return np.union1d(self.active, np.flatnonzero(self.overshot | self.returning))

    @property
    def extracted(self) -> NDArray[np.bool_]:
        """(B,) True for the memorized examples of which more is extracted than of four in five non-members."""
        return self.memorized & (self.current.extraction > max(self.target_exposure, NOT_EXTRACTED))

    @property
    def newly_known(self) -> NDArray[np.bool_]:
        """(B,) True for the examples that were not memorized and stand out now, see `metrics.left.newly_known`."""
        scores = Scores(self._scores(self.current.log_likelihood), self.present)
        return newly_known(scores, self.groups, self.memorized, rate=self.false_discovery_rate)

    def rejection_reason(self, measurement: Measurement) -> str | None:
        """Return the reason to roll back a round that ended with this measurement, or None."""
        if not _finite(measurement.utility):
            return "not finite"
        for budget, rise in self._budgets(measurement):
            if budget.exceeded(rise):
                return budget.name
        return None

    def accept(self, measurement: Measurement, scored: Indices) -> tuple[int, int]:
        """Take the measurement of a round as the present state.

        Args:
            measurement: of the accepted weights.
            scored: indices of the examples that were scored under them; the numbers of the others are older.

        Returns:
            How many examples have reached the level of the non-members in this round, and how many have fallen below
            it or crossed it from one side to the other; of those that were scored before the round too. Examples that
            rise above the target again do not count: those that have just reached it cross it at any step size.
        """
        before, known = self._side, ~self.stale
        self.stale[:], self.anchor_is_old = True, True
        self.refresh(measurement, scored)
        after = self._side
        settled, unsettled = (before != 0) & (after == 0), (after != before) & ((after == -1) | (before * after == -1))
        return int((known & settled).sum()), int((known & unsettled).sum())

    def refresh(self, measurement: Measurement, scored: Indices) -> None:
        """Take later scores under the same weights as `accept` does."""
        upper = measurement.exposure.upper
        below = self.memorized & is_significant(upper)
        if self.non_members.forms is None:  # other forms of a record bring a text below the non-members again and again
            self.overshoots += below & ~self.overshot & ~self.returning
        self.overshot = below | self.overshot & (upper > self._restored)
        self.stale[scored] = False
        self.current = measurement

    @property
    def _side(self) -> NDArray[np.int64]:
        """(B,) 1 for the memorized examples above the target, -1 for overshot ones, 0 for all others."""
        likely = self.memorized & (self.current.exposure.lower > self.target_exposure)
        return likely.astype(np.int64) - self.overshot

    def verdict(self, extracted: Floats, recited: NDArray[np.bool_]) -> Verdict:
        """Return the verdicts on the present weights.

        Args:
            extracted: (B,) shares of the examples' tokens that are the model's first choice, 0 to 1.
            recited: (B,) True where the model continues an example's beginning with its rest.
        """
        return verdict(
            self._scores(self.initial.log_likelihood),
            self._scores(self.current.log_likelihood),
            self.non_member_scores,
            non_member_scores_after=self.anchor,
            extracted=extracted - self.non_members.forget.greedy_match,
            non_member_extracted=self.non_member_extracted,
            recited=recited,
            groups=self.non_members.forms,
            families=self.families,
            target_exposure=self.target_exposure,
            false_discovery_rate=self.false_discovery_rate,
        )

    def _budgets(self, measurement: Measurement) -> list[tuple[Budget, Rise]]:
        pairs = [(self.utility_budget, measurement.utility)]
        if self.holdout_budget is not None and measurement.holdout is not None:
            pairs.append((self.holdout_budget, measurement.holdout))
        return pairs

    @property
    def _restored(self) -> float:
        """Upper exposure, bits, at which an overshot example is restored: half-way to that of one at the target."""
        unlikelier = 1 - 2.0**-self.target_exposure  # share of non-members that are less likely than one at the target
        at_target = -math.log2(unlikelier) if unlikelier > 0 else SIGNIFICANT
        return (SIGNIFICANT + min(SIGNIFICANT, max(NULL_MEAN, at_target))) / 2

    def _quantile(self, values: Floats, share: float, *, method: str = "linear") -> Floats:
        """Return (B,) for each example the quantile of the (m,) values of the non-members in its form."""
        out = np.empty(len(self.groups[0]))
        for form in np.unique(self.groups[0]):
            own = values[self.groups[1] == form]
            out[self.groups[0] == form] = np.quantile(own, share, method=method)  # type: ignore[call-overload]
        return out

    def _scores(self, log_likelihood: Floats) -> Floats:
        """Return (B,) scores of the forget set, low = memorized: NLL less what it would be of unseen text."""
        return -log_likelihood - self.non_members.forget.nll


def _finite(rise: Rise | None) -> bool:
    return rise is None or math.isfinite(rise.estimate)
