"""Membership attacks of an audit: how well scores of the texts tell the forget set from the holdout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from pyunlearn import metrics
from pyunlearn.auditing.responses import AuditTexts, Responses
from pyunlearn.auditing.result import Membership
from pyunlearn.data.comparison import groups_of_copies
from pyunlearn.metrics import auc

Floats = NDArray[np.float64]
_K = 0.4  # the share of tokens of min-k, as in MUSE and TOFU
_TOLD_APART = 0.05  # p-value, over all membership scores


class MembershipAttacks:
    """Membership scores of an audit's texts, and the attacks by each; the holdout is what was not trained on.

    Of texts that have other forms too, the set is that of the texts as they are.

    Args:
        texts: the texts of the audit, with a holdout.
        now: outputs of the audited model.
        before: outputs of the model before unlearning; None without one.
        retrained: outputs of a model that never saw the forget set; None without one.
        seed: of the intervals.
    """

    def __init__(
        self, texts: AuditTexts, now: Responses, before: Responses | None, retrained: Responses | None, *, seed: int
    ) -> None:
        self.texts, self.seed = texts, seed
        self.now, self.before, self.retrained = now, before, retrained
        self.as_they_are = texts.as_they_are

    def attacks(self) -> list[Membership]:
        """Attack the forget set with every score."""
        before = {} if self.before is None else self._both_sides(self.before)
        retrained = {} if self.retrained is None else self._both_sides(self.retrained)
        attacks = []
        for name, (forget, holdout) in self._both_sides(self.now).items():
            leak = None
            if name in retrained and auc(*retrained[name]).estimate < 1:  # against 1 nothing can be measured
                leak = metrics.privleak_interval(forget, holdout, *retrained[name], seed=self.seed)
            attacks.append(
                Membership(
                    score=name,
                    auc=auc(forget, holdout),
                    tpr_at_1_percent=metrics.tpr_at_fpr(forget, holdout, 0.01),
                    tpr_at_0_1_percent=metrics.tpr_at_fpr(forget, holdout, 0.001),
                    roc=roc_curve(forget, holdout),
                    auc_before=auc(*before[name]) if name in before else None,
                    privleak=leak,
                )
            )
        return attacks

    def told_apart(self, attacks: list[Membership]) -> list[str]:
        """Say where a score tells the forget set from the holdout, for audits that pass.

        Windows of one text and copies depend on each other: sets that have some are not tested.
        """
        forget = [self.texts.forget[i] for i in self.as_they_are]
        in_windows = any(part.windows > 1 for part in self.texts.parts)
        if in_windows or any(map(groups_of_copies, (forget, self.texts.holdout))):
            return []
        score, pvalue = told_apart(self._both_sides(self.now))
        if pvalue > _TOLD_APART:
            return []
        (area,) = (m.auc.estimate for m in attacks if m.score == score)
        return [
            f"As a set, the forget texts look {'more' if area > 0.5 else 'less'} trained-on than the holdout, by the "
            f"membership score {score} (AUC {area:.2f}, p = {pvalue:.1g} for the best of {len(attacks)}). "
            "No verdict depends on this."
        ]

    def scores(self, responses: Responses, role: str = "forget") -> dict[str, Floats]:
        """Return the membership scores of the texts of one role, by name; low = like a member.

        Of the non-members those of the holdout as it is.
        """
        of_forget = role == "forget"
        examples = self.texts.forget if of_forget else self.texts.holdout
        forced = responses.statistics[role].part(0, len(examples))  # other forms of the holdout come after it
        mean = forced.mean_log_likelihood
        tokens, entropy, variance = (forced.each(x) for x in (forced.log_likelihood, forced.entropy, forced.variance))
        scores = {
            "loss": metrics.loss_score(mean),
            "zlib": metrics.zlib_score(mean, [e.scored_text for e in examples]),
            "min_k": metrics.min_k_score(tokens, k=_K),
            "min_k_plus_plus": metrics.min_k_plus_plus_score(tokens, entropy, variance, k=_K),
        }
        if self.retrained is not None and responses is not self.retrained:
            reference = self.retrained.statistics[role].part(0, len(examples))
            scores["reference"] = metrics.reference_score(mean, reference.mean_log_likelihood)
        return scores

    def _both_sides(self, responses: Responses) -> dict[str, tuple[Floats, Floats]]:
        """Return name -> (scores of the forget set, scores of the holdout)."""
        forget, holdout = (self.scores(responses, role) for role in ("forget", "non_members"))
        return {name: (forget[name][self.as_they_are], holdout[name]) for name in forget}


def told_apart(sides: dict[str, tuple[Floats, Floats]]) -> tuple[str, float]:
    """Return the membership score that differs most between two sets of texts, and a p-value over all scores.

    That is the rank-sum test's for this score, times the number of scores.

    >>> told_apart({"loss": (np.arange(9), np.arange(9)), "zlib": (np.arange(9), np.arange(9) + 20)})
    ('zlib', 0.0008245896041233825)
    """
    pvalues = {name: float(np.nan_to_num(mannwhitneyu(*each).pvalue, nan=1.0)) for name, each in sides.items()}
    name = min(pvalues, key=pvalues.__getitem__)
    return name, min(1.0, len(sides) * pvalues[name])


def roc_curve(forget: Floats, holdout: Floats) -> list[tuple[float, float]]:
    """Return (false, true) positive rates at every threshold, low scores being members, from (0, 0) to (1, 1).

    >>> roc_curve(np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """
    thresholds = np.unique(np.concatenate([forget, holdout]))
    rates = [np.searchsorted(np.sort(side), thresholds, side="right") / len(side) for side in (holdout, forget)]
    return [(0.0, 0.0), *zip(*(rate.tolist() for rate in rates), strict=True)]
