"""The call of each metric on a forget set under a model: still known, clean or damaged, by one rule at 5 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pyunlearn.auditing.result import Audit
from pyunlearn.metrics import (
    NULL_MEAN,
    discoveries,
    exact_memorization,
    exposure_two_sample_test,
    extraction_strength,
    forget_quality,
    generalized_exposure,
    lira_score,
    logit_score,
    mean_interval,
    paired_difference,
)
from pyunlearn.study.readings import Reader, View
from pyunlearn.unlearning.budget import UTILITY_BUDGET, Budget
from pyunlearn.unlearning.config import UnlearnConfig

KNOWN, CLEAN, DAMAGED = "still known", "clean", "damaged"
LEVEL = 0.05
LIRA = "U-LiRA"
"""Like the standard, but by a normal law in place of Student's t."""
WHOLE = "whole audit"
WHOLE_RETRAINED = "whole audit, budget from retraining"
_ALONE, _ORIGINAL, _REFERENCE = "model alone", "original", "reference model"
AUDITS = (f"verdicts ({_ALONE})", f"verdicts ({_ORIGINAL})", WHOLE, WHOLE_RETRAINED)
"""The metrics that are what an audit says as a whole."""


class Call(NamedTuple):
    """The call of one metric on one set under one model."""

    call: str
    """One of KNOWN, CLEAN, DAMAGED."""
    value: float | None = None
    """The number that the rule reads; None where there is none."""
    covers: bool | None = None
    """True where the metric's 95 % interval holds what it is on average under retraining; None without an interval."""
    examples: list[float] | None = None
    """(n,) the metric of each example, high = known; None where it is of the set alone."""


@dataclass(frozen=True)
class Evidence:
    """All that the metrics read of one set under one model.

    unseen  the log-likelihoods (n, K) of the set under the K other models that never saw it
    unseen_test  (K,) mean test NLL of these models
    """

    reader: Reader
    view: View
    unseen: NDArray[np.float64]
    unseen_test: NDArray[np.float64]

    @cached_property
    def audits(self) -> dict[str, Audit]:
        """The audit of the model alone, with the original model, and with a model that never saw the set."""
        audit, view = self.reader.audit, self.view
        return {
            _ALONE: audit(view),
            _ORIGINAL: audit(view, original=True),
            _REFERENCE: audit(view, reference=True),
        }

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """(n,) LiRA's statistic under the model."""
        return logit_score(-self.view.now.nll(self.view.forget))

    @cached_property
    def gold(self) -> NDArray[np.float64]:
        """(n,) one-sided p-values of each text's t score among the models that never saw it: low = known."""
        return t_pvalue(self.scores, logit_score(self.unseen.ravel()).reshape(self.unseen.shape))

    @cached_property
    def gold_call(self) -> str:
        """KNOWN where a text stands out by its t score at a false discovery rate of 5 %."""
        return KNOWN if _any_stands_out(-np.log2(self.gold)) else CLEAN

    @cached_property
    def rise(self) -> float:
        """Rise of the mean test NLL from the original model, nats a token."""
        return float((self.view.now.nll(self.reader.test) - self.view.original.nll(self.reader.test)).mean())

    @cached_property
    def ruined(self) -> bool:
        """True where the mean test NLL is above that of every model that never saw the set, by more than the budget."""
        own, worst = float(self.view.now.nll(self.reader.test).mean()), float(self.unseen_test.max())
        return own - worst > UnlearnConfig.utility_budget * max(worst, 1.0)

    @cached_property
    def over_budget(self) -> bool:
        """True where the upper end of the rise of the test NLL is above the default budget of `unlearn`."""
        budget = Budget(UTILITY_BUDGET, self.view.original.nll(self.reader.test), UnlearnConfig.utility_budget)
        return budget.exceeded(budget.rise(self.view.now.nll(self.reader.test)))


def t_pvalue(scores: Any, unseen: Any) -> NDArray[np.float64]:
    """Return (n,) P(T <= t) of scores (n,) as one more draw of the normal law of `unseen` (n, K): low = below them."""
    models = unseen.shape[1]
    spread = np.maximum(unseen.std(1, ddof=1), 1e-12) * math.sqrt(1 + 1 / models)
    pvalues: NDArray[np.float64] = stats.t.cdf((scores - unseen.mean(1)) / spread, models - 1)
    return np.maximum(pvalues, 1e-300)


def calls(evidence: Evidence) -> dict[str, Call]:
    """Return metric -> what it says, of every metric that is evaluated."""
    rows: dict[str, Call] = {}
    for name, audit in evidence.audits.items():
        rows |= _of_exposures(f" ({name})", audit)
    rows |= _of_membership(evidence.audits[_ALONE], leak=False)
    rows |= _of_membership(evidence.audits[_REFERENCE], leak=True)
    rows |= _against_retrained(evidence)
    rows[LIRA] = _lira(evidence)
    rows |= _of_damage(evidence)
    return rows | _whole(evidence)


def _any_stands_out(bits: Any) -> bool:
    return bool(discoveries(bits, rate=LEVEL).significant.any())


def _by_interval(interval: Any, null: float, above: str, below: str, examples: Any = None) -> Call:
    """Return the call of an interval (estimate, low, high): CLEAN where it holds `null`, or has no ends."""
    estimate, low, high = (float(x) for x in interval[:3])
    listed = None if examples is None else [float(x) for x in examples]
    if math.isnan(low) or math.isnan(high):
        return Call(CLEAN, estimate, None, listed)
    call = above if low > null else below if high < null else CLEAN
    return Call(call, estimate, low <= null <= high, listed)


def _verdict_call(audit: Audit) -> str:
    if "still exposed" in audit.verdicts:
        return KNOWN
    return CLEAN if audit.passed else DAMAGED if "over-unlearned" in audit.verdicts else KNOWN


def _of_exposures(view: str, audit: Audit) -> dict[str, Call]:
    exposures = [e.exposure for e in audit.examples]
    still = [float(e.verdict == "still exposed") for e in audit.examples]
    null, top = audit.null_test, audit.top_test
    away = CLEAN if null.pvalue >= LEVEL else KNOWN if null.mean > NULL_MEAN else DAMAGED
    return {
        f"verdicts{view}": Call(_verdict_call(audit), sum(still), None, still),
        f"top test{view}": Call(KNOWN if top.pvalue < LEVEL else CLEAN, top.pvalue),
        f"null test{view}": Call(away, null.pvalue),
        f"mean exposure{view}": _by_interval(null.mean_interval, NULL_MEAN, KNOWN, DAMAGED, exposures),
    }


def _of_membership(audit: Audit, *, leak: bool) -> dict[str, Call]:
    """Return the calls of the membership attacks; with `leak` those that need a reference model."""
    rows: dict[str, Call] = {}
    for m in audit.membership:
        if leak and m.privleak is not None:
            rows[f"PrivLeak, {m.score}"] = _by_interval(m.privleak, 0.0, DAMAGED, KNOWN)
        if (m.score == "reference") != leak:
            continue
        scores = [-e.now.membership[m.score] for e in audit.examples]
        rate = m.tpr_at_1_percent
        rows[f"AUC, {m.score}"] = _by_interval(m.auc, 0.5, KNOWN, DAMAGED, scores)
        rows[f"TPR at 1 %, {m.score}"] = _by_interval(rate, 0.01, KNOWN, CLEAN)
    return rows


def _against_retrained(evidence: Evidence) -> dict[str, Call]:
    """Return the calls of the metrics that compare the set under the model with the set under a retrained one."""
    reader, view = evidence.reader, evidence.view
    exposures = [
        generalized_exposure(each.nll(view.forget), each.nll(view.others)).lower for each in (view.now, view.reference)
    ]
    test = exposure_two_sample_test(*exposures)
    higher = KNOWN if test.mean > float(exposures[1].mean()) else DAMAGED
    rows = {"two-sample test": Call(higher if test.pvalue < LEVEL else CLEAN, test.pvalue)}
    matches = [each.each(each.rank == 0) for each in (r.of(view.forget) for r in (view.now, view.reference))]
    for name, share in _SHARES.items():
        mine, other = (np.array([share(m) for m in each]) for each in matches)
        rows[name] = _by_interval(paired_difference(other, mine), 0.0, KNOWN, DAMAGED, mine - other)
    ratio, other_ratio = (reader.truth_ratios(each, view.forget) for each in (view.now, view.reference))
    quality = forget_quality(np.exp(ratio), np.exp(other_ratio))
    lower = KNOWN if np.median(ratio) < np.median(other_ratio) else DAMAGED
    rows["forget quality"] = Call(lower if quality.pvalue < LEVEL else CLEAN, quality.pvalue)
    rows["truth ratio"] = _by_interval(mean_interval(ratio - other_ratio), 0.0, DAMAGED, KNOWN, other_ratio - ratio)
    return rows


_SHARES: dict[str, Callable[[Any], float]] = {
    "extraction strength": extraction_strength,
    "exact memorization": exact_memorization,
}


def _lira(evidence: Evidence) -> Call:
    unseen = logit_score(evidence.unseen.ravel()).reshape(evidence.unseen.shape)
    bits = -lira_score(evidence.scores, unseen) / math.log(2)
    return Call(KNOWN if _any_stands_out(bits) else CLEAN, float(bits.max()), None, bits.tolist())


def _of_damage(evidence: Evidence) -> dict[str, Call]:
    audit = evidence.audits[_ORIGINAL]
    assert audit.utility is not None
    assert audit.non_members.drift is not None
    change = audit.utility.change
    return {
        "retain utility": _by_interval(change, 0.0, DAMAGED, CLEAN),
        "retain utility, budget": Call(DAMAGED if evidence.over_budget else CLEAN, evidence.rise),
        "non-member drift": _by_interval(audit.non_members.drift, 0.0, DAMAGED, CLEAN),
        "writing": Call(DAMAGED if audit.collapsed else CLEAN),
    }


def _whole(evidence: Evidence) -> dict[str, Call]:
    """Return what the parts say together: the verdicts of the model alone, the utility budget and the writing."""
    known = _verdict_call(evidence.audits[_ALONE]) == KNOWN
    written = evidence.audits[_ORIGINAL].collapsed
    worse = {WHOLE: evidence.over_budget, WHOLE_RETRAINED: evidence.ruined}
    return {name: Call(KNOWN if known else DAMAGED if over or written else CLEAN) for name, over in worse.items()}


def unseen_scores(readings: Sequence[Any], forget: Sequence[int]) -> NDArray[np.float64]:
    """Return (n, K) mean log-likelihoods of a set under K models, nats per token."""
    return np.stack([-reading.nll(forget) for reading in readings], axis=1)
