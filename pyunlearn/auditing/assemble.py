"""Compute all audit metrics from collected model outputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from pyunlearn import metrics
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.auditing.responses import AuditTexts, Responses
from pyunlearn.auditing.result import (
    Audit,
    AuditedExample,
    Measures,
    Membership,
    NonMembers,
    RetainUtility,
    Writing,
)
from pyunlearn.data.comparison import groups_of_copies
from pyunlearn.metrics import (
    Interval,
    auc,
    exposure_null_test,
    exposure_top_test,
    generalized_exposure,
    non_member_drift,
    paired_difference,
    verdict,
)
from pyunlearn.metrics._binomial import clopper_pearson
from pyunlearn.metrics.left import Left, Scores, left
from pyunlearn.metrics.verdict import anchor_after
from pyunlearn.probes.non_members import capped, evidence_notes
from pyunlearn.probes.recitation import LONGEST, is_guessed, recited

Floats = NDArray[np.float64]
_K = 0.4  # the share of tokens of min-k, as in MUSE and TOFU
_TOLD_APART = 0.05  # p-value, over all membership scores
_WORSE = 0.10  # relative rise of the non-members' NLL, 1 nat at least, from which a model has become worse
_OVER = "over-unlearned"
_ROUGE = importlib.util.find_spec("rouge_score") is not None


class AuditAssembler:
    """Verdicts and metrics of an audit, computed from the outputs of up to three models.

    Args:
        texts: the texts of the audit.
        tokenizer: decodes token ids to text.
        config: the settings.
        now: outputs of the audited model.
        before: outputs of the model before unlearning; None without one.
        retrained: outputs of a model that never saw the forget set; None without one.
    """

    def __init__(
        self,
        texts: AuditTexts,
        tokenizer: Any,
        config: AuditConfig,
        now: Responses,
        before: Responses | None = None,
        retrained: Responses | None = None,
    ) -> None:
        self.texts, self.tokenizer, self.seed = texts, tokenizer, config.seed
        self.target_exposure, self.false_discovery_rate = config.target_exposure, config.false_discovery_rate
        self.now, self.before, self.retrained = now, before, retrained
        anchor = before or now
        self.non_members, expected = texts.non_members, texts.non_members.forget
        self.non_member_nll = -anchor.statistics["non_members"].mean_log_likelihood
        self.non_member_scores = self.non_member_nll - self.non_members.own.nll
        nll_now = -now.statistics["non_members"].mean_log_likelihood
        self.present = nll_now - self.non_members.own.nll
        self.anchor = anchor_after(self.non_member_scores, self.present)
        allowed = _WORSE * max(float(self.non_member_nll.mean()), 1.0)
        self.worse = float((nll_now - self.non_member_nll).mean()) > allowed
        self.nll = -now.statistics["forget"].mean_log_likelihood
        self.nll_before = -anchor.statistics["forget"].mean_log_likelihood
        self.scores, self.scores_before = self.nll - expected.nll, self.nll_before - expected.nll
        openings, written = texts.openings, now.continuations
        self.recited = np.array(
            [i in written and recited(written[i], t.scored) for i, t in enumerate(openings)], dtype=bool
        )
        self.left = None if before is None else self._left()
        self._attacks = bool(texts.holdout) and "membership" in config.metrics

    def assemble(self) -> Audit:
        """Return the audit, with the settings and the seconds left for the caller to fill in."""
        judged = self._verdict()
        exposures, m = judged.after.lower, len(self.non_member_scores)
        change = None
        if self.before is not None:
            change = paired_difference(-self.nll_before, -self.nll, seed=self.seed)
        prior = self._prior(self.now)
        passes = {"original": self.before, "model": self.now, "reference_model": self.retrained}
        audit = Audit(
            examples=self._examples(judged),
            non_members=self._non_members(),
            top_test=exposure_top_test(exposures, m, seed=self.seed),
            null_test=exposure_null_test(exposures, m, seed=self.seed),
            left_pvalue=None if self.left is None else self.left.pvalue,
            membership=self._membership(),
            change=change,
            answer_prior=None if prior is None else prior.mean,
            utility=self._utility(),
            writing=self._writing(self.now),
            writing_before=self._writing(self.before),
            passes={name: each.passes for name, each in passes.items() if each is not None},
            seconds=0.0,
            settings={},
            notes=self._notes(judged),
        )
        if audit.passed:
            audit.notes += self._told_apart(audit.membership)
        return audit

    def _verdict(self) -> metrics.Verdict:
        """Judge each text: anchored, but for what stands out, which is seen among the model's own non-members.

        No two models give unseen text the same likelihood, not even two that were trained alike. So a text is
        over-unlearned only if it is by these too, and lies far above all of them or the texts do all together
        (`metrics.left`), unless the model has become worse: where the non-members have lost more than 10 % (the
        holdout's budget in `unlearn`), those under the original model judge alone.
        """
        anchored = self._judged(self.anchor)
        if self.worse:
            return anchored
        alike = self._judged(self.present)
        chance = (anchored.verdict == _OVER) & (alike.verdict != _OVER)
        name = np.where(chance, alike.verdict, anchored.verdict)
        return anchored._replace(verdict=name, certain=anchored.certain & ~chance)

    def _judged(self, non_member_scores: Floats) -> metrics.Verdict:
        """Judge each text by its likelihood, its first-choice tokens and its continuation."""
        forget, anchor = self.now.statistics["forget"], (self.before or self.now).statistics["non_members"]
        return verdict(
            self.scores_before,
            self.scores,
            self.non_member_scores,
            non_member_scores_after=non_member_scores,
            extracted=forget.greedy_match - self.non_members.forget.greedy_match,
            non_member_extracted=anchor.greedy_match - self.non_members.own.greedy_match,
            recited=self.recited,
            standing_out=self._standing_out(),
            too_low=None if self.worse or self.left is None else self.left.too_low,
            target_exposure=self.target_exposure,
            false_discovery_rate=self.false_discovery_rate,
        )

    def _standing_out(self) -> NDArray[np.bool_] | None:
        """Return which texts stand out, of an audit with the original model: (n,), those that are recited too.

        Where the model would recite more than one in twenty non-members it can guess such text, which shows nothing.
        """
        if self.left is None or not self.recited.any():
            return None if self.left is None else self.left.standing_out
        forced = self.now.statistics["non_members"]
        hits = forced.each(forced.rank == 0)
        guessed = sum(is_guessed(t, hit) for t, hit in zip(self.texts.tokens["non_members"], hits, strict=True))
        few = 20 * (1 + guessed) <= len(hits) + 1
        return self.left.standing_out | (self.recited & few)

    def _left(self) -> Left:
        """Find what stands out among the non-members under the audited model."""
        shares = [
            expected.greedy_match - self.now.statistics[role].greedy_match
            for role, expected in (("forget", self.non_members.forget), ("non_members", self.non_members.own))
        ]
        return left(
            Scores(self.scores_before, self.non_member_scores),
            Scores(self.scores, self.present),
            Scores(*shares),
            rate=self.false_discovery_rate,
            seed=self.seed,
        )

    # -- each text

    def _examples(self, judged: metrics.Verdict) -> list[AuditedExample]:
        now = self._measures(self.now)
        before = [None] * len(now) if self.before is None else self._measures(self.before)
        verdicts = capped(judged.verdict, self.non_members.grade)
        examples = []
        for i, e in enumerate(self.texts.forget):
            opening, truth = self._shown(i)
            examples.append(
                AuditedExample(
                    index=i,
                    prompt=e.prompt if e.prompted else "",
                    text=e.scored_text,
                    opening=opening,
                    truth=truth,
                    tokens=len(self.texts.tokens["forget"][i].scored),
                    verdict=verdicts[i],
                    exposure=float(judged.after.lower[i]),
                    interval=(float(judged.low[i]), float(judged.high[i])),
                    certain=bool(judged.certain[i]),
                    upper_exposure=float(judged.after.upper[i]),
                    exposure_before=None if self.before is None else float(judged.before.lower[i]),
                    now=now[i],
                    before=before[i],
                    **self.texts.parts[i]._asdict(),
                )
            )
        return examples

    def _measures(self, responses: Responses) -> list[Measures]:
        """Compute the metrics of each text under one model."""
        forced = responses.statistics["forget"]
        matches = forced.each(forced.rank == 0)
        non_member_scores = -responses.statistics["non_members"].mean_log_likelihood - self.non_members.own.nll
        excess = -forced.mean_log_likelihood - self.non_members.forget.nll
        exposures = generalized_exposure(excess, non_member_scores).lower
        prior = self._prior(responses)
        gains = iter([] if prior is None else prior.gain.tolist())
        scores = self._scores(responses, "forget") if self._attacks else {}
        continuations = self._continuations(responses)
        return [
            Measures(
                float(forced.mean_log_likelihood[i]),
                float(exposures[i]),
                metrics.exact_memorization(matches[i]),
                metrics.extraction_strength(matches[i]),
                {name: float(values[i]) for name, values in scores.items()},
                next(gains) if e.prompted and prior is not None else None,
                *continuations[i],
            )
            for i, e in enumerate(self.texts.forget)
        ]

    def _prior(self, responses: Responses) -> metrics.AnswerPrior | None:
        """Compare the likelihood of prompted texts with that without their prompts."""
        prompted = np.array([e.prompted for e in self.texts.forget])
        without = responses.statistics.get("without_prompt")
        if without is None or not prompted.any():
            return None
        with_prompt = responses.statistics["forget"].mean_log_likelihood[prompted]
        return metrics.answer_prior(with_prompt, without.mean_log_likelihood)

    def _continuations(self, responses: Responses) -> list[tuple[str | None, int | None, float | None]]:
        """Return (continuation, longest run of tokens shared with the text, ROUGE-L recall) of each text."""
        rows: list[tuple[str | None, int | None, float | None]] = []
        for i, t in enumerate(self.texts.openings):
            ids = responses.continuations.get(i)
            if ids is None:
                rows.append((None, None, None))
                continue
            text, truth = self._text(ids), self._shown(i)[1]
            run = metrics.verbatim_match(ids, t.scored[:LONGEST]).longest
            latin = any(c.isascii() and c.isalnum() for c in truth)
            rouge = float(metrics.rouge_l([text], [truth], measure="recall")[0]) if latin and _ROUGE else None
            rows.append((text, run, rouge))
        return rows

    def _shown(self, i: int) -> tuple[str, str]:
        """Return (the opening, the true text after it, cut to the length of a continuation)."""
        t, e = self.texts.openings[i], self.texts.forget[i]
        opening = e.prompt if e.prompted else self._text(t.written[: t.first])
        return opening, self._text(t.scored[:LONGEST])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # -- the set

    def _non_members(self) -> NonMembers:
        drift = None
        if self.before is not None:
            after = -self.now.statistics["non_members"].mean_log_likelihood
            drift = non_member_drift(self.non_member_nll, after)
        return NonMembers(self.non_members.grade, self.before is not None, self.non_member_scores.tolist(), drift)

    def _notes(self, judged: metrics.Verdict) -> list[str]:
        """Say what the verdicts rest on, and what the evidence cannot show."""
        return evidence_notes(self.non_members, judged.verdict.tolist(), rate=self.false_discovery_rate)

    def _utility(self) -> RetainUtility | None:
        if "retain" not in self.now.statistics:
            return None
        nll = -self.now.statistics["retain"].mean_log_likelihood
        interval = metrics.mean_interval(nll)
        if self.before is None:
            return RetainUtility(len(nll), interval, None, None)
        first = -self.before.statistics["retain"].mean_log_likelihood
        before = metrics.mean_interval(first)
        return RetainUtility(len(nll), interval, before, paired_difference(first, nll, seed=self.seed))

    def _writing(self, responses: Responses | None) -> Writing | None:
        if responses is None or not responses.continuations:
            return None
        continuations = list(responses.continuations.values())
        distinct, repeated = (
            metrics.mean_interval([of(ids) for ids in continuations], bounds=(0, 1), seed=self.seed)
            for of in (partial(metrics.distinct_n, n=2), metrics.repetition)
        )
        n, count = len(continuations), sum(map(metrics.collapsed, continuations))
        low, high = clopper_pearson(count, n, 0.95)
        return Writing(distinct, repeated, Interval(count / n, float(low), float(high)))

    # -- membership

    def _membership(self) -> list[Membership]:
        """Attack the forget set with every score; the holdout is the text that was not trained on."""
        if not self._attacks:
            return []
        before = {} if self.before is None else self._both_sides(self.before)
        retrained = {} if self.retrained is None else self._both_sides(self.retrained)
        attacks = []
        for name, (forget, holdout) in self._both_sides(self.now).items():
            leak = None
            if name in retrained:
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

    def _told_apart(self, membership: list[Membership]) -> list[str]:
        """Say where a membership score tells the forget set from the holdout, though the audit passes.

        Windows of one text and copies depend on each other: sets that have some are not tested.
        """
        in_windows = len({part.record for part in self.texts.parts}) < len(self.texts.parts)
        if not membership or in_windows or any(map(groups_of_copies, (self.texts.forget, self.texts.holdout))):
            return []
        score, pvalue = told_apart(self._both_sides(self.now))
        if pvalue > _TOLD_APART:
            return []
        (area,) = (m.auc.estimate for m in membership if m.score == score)
        return [
            f"As a set, the forget texts look {'more' if area > 0.5 else 'less'} trained-on than the holdout, by the "
            f"membership score {score} (AUC {area:.2f}, p = {pvalue:.1g} for the best of {len(membership)}). "
            "No verdict depends on this."
        ]

    def _both_sides(self, responses: Responses) -> dict[str, tuple[Floats, Floats]]:
        """Return name -> (scores of the forget set, scores of the holdout)."""
        forget, holdout = (self._scores(responses, role) for role in ("forget", "non_members"))
        return {name: (forget[name], holdout[name]) for name in forget}

    def _scores(self, responses: Responses, role: str) -> dict[str, Floats]:
        """Return the membership scores of the texts of one role, by name; low = like a member."""
        forced = responses.statistics[role]
        mean = forced.mean_log_likelihood
        tokens, entropy, variance = (forced.each(x) for x in (forced.log_likelihood, forced.entropy, forced.variance))
        texts = [e.scored_text for e in (self.texts.forget if role == "forget" else self.texts.holdout)]
        scores = {
            "loss": metrics.loss_score(mean),
            "zlib": metrics.zlib_score(mean, texts),
            "min_k": metrics.min_k_score(tokens, k=_K),
            "min_k_plus_plus": metrics.min_k_plus_plus_score(tokens, entropy, variance, k=_K),
        }
        if self.retrained is not None and responses is not self.retrained:
            scores["reference"] = metrics.reference_score(mean, self.retrained.statistics[role].mean_log_likelihood)
        return scores


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
