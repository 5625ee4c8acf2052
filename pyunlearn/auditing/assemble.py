"""Compute all audit metrics from collected model outputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn import metrics
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.auditing.membership import MembershipAttacks
from pyunlearn.auditing.responses import AuditTexts, Responses
from pyunlearn.auditing.result import (
    Audit,
    AuditedExample,
    Measures,
    NonMembers,
    RetainUtility,
    Writing,
)
from pyunlearn.metrics import (
    Interval,
    exposure_null_test,
    exposure_top_test,
    generalized_exposure,
    non_member_drift,
    paired_difference,
    verdict,
)
from pyunlearn.metrics._binomial import clopper_pearson
from pyunlearn.metrics.families import families_of
from pyunlearn.metrics.left import Left, Scores, left_by_form, newly_known
from pyunlearn.metrics.verdict import anchor_after, discoveries_within
from pyunlearn.probes.non_members import capped, evidence_notes, power_notes
from pyunlearn.probes.recitation import LONGEST, is_guessed, recited

Floats = NDArray[np.float64]
_WORSE = 0.10  # relative rise of the non-members' NLL, 1 nat at least, from which a model has become worse
_OVER, _EXPOSED = "over-unlearned", "still exposed"
_ROUGE = importlib.util.find_spec("rouge_score") is not None


class AuditAssembler:
    """Verdicts and metrics of an audit, computed from the outputs of up to three models.

    Other forms of the texts have verdicts of their own, each among the non-members in the same form; the numbers of the
    set are those of the texts as they are.

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
        self.forms, own = self.non_members.groups, self.non_members.as_they_are
        self.as_they_are = texts.as_they_are
        self.non_member_nll = -anchor.statistics["non_members"].mean_log_likelihood
        self.non_member_scores = self.non_member_nll - self.non_members.own.nll
        nll_now = -now.statistics["non_members"].mean_log_likelihood
        self.present = nll_now - self.non_members.own.nll
        self.anchor = anchor_after(self.non_member_scores, self.present, self.forms[1])
        allowed = _WORSE * max(float(self.non_member_nll[own].mean()), 1.0)
        self.worse = float((nll_now - self.non_member_nll)[own].mean()) > allowed
        self.nll = -now.statistics["forget"].mean_log_likelihood
        self.nll_before = -anchor.statistics["forget"].mean_log_likelihood
        self.scores, self.scores_before = self.nll - expected.nll, self.nll_before - expected.nll
        exposure = generalized_exposure(self.scores_before, self.non_member_scores, groups=self.forms).lower
        self.families = families_of(exposure, *self.forms)  # (B,) in which the memorized ones are selected
        self.memorized, _ = discoveries_within(self.families, exposure, rate=config.false_discovery_rate)  # (B,)
        openings, written = texts.openings, now.continuations
        self.recited = np.array(
            [i in written and recited(written[i], t.scored) for i, t in enumerate(openings)], dtype=bool
        )
        self.left = None if before is None else self._left()
        self.newly_known = np.zeros_like(self.memorized)  # (B,)
        if before is not None and texts.holdout:
            now_scores = Scores(self.scores, self.present)
            self.newly_known = newly_known(now_scores, self.forms, self.memorized, rate=config.false_discovery_rate)
        self.membership: MembershipAttacks | None = None
        if texts.holdout and "membership" in config.metrics:
            reference = None if self.non_members.by_reference is False else retrained  # it is the model itself
            self.membership = MembershipAttacks(texts, now, before, reference, seed=config.seed)

    def assemble(self) -> Audit:
        """Return the audit, with the settings and the seconds left for the caller to fill in."""
        judged = self._verdict()
        plain, m = self.as_they_are, len(self.non_members.as_they_are)
        exposures, change = judged.after.lower[plain], None
        if self.before is not None:
            change = paired_difference(-self.nll_before[plain], -self.nll[plain], seed=self.seed)
        prior = self._prior(self.now, plain)
        attacks = [] if self.membership is None else self.membership.attacks()
        passes = {"original": self.before, "model": self.now, "reference_model": self.retrained}
        audit = Audit(
            examples=self._examples(judged),
            non_members=self._non_members(),
            top_test=exposure_top_test(exposures, m, seed=self.seed),
            null_test=exposure_null_test(exposures, m, seed=self.seed),
            left_pvalue=None if self.left is None else self.left.pvalue,
            forms_left_pvalue=None if self.left is None else self.left.forms_pvalue,
            membership=attacks,
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
        if audit.passed and self.membership is not None:
            audit.notes += self.membership.told_apart(attacks)
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
            groups=self.non_members.forms,
            families=self.families,
            target_exposure=self.target_exposure,
            false_discovery_rate=self.false_discovery_rate,
        )

    def _standing_out(self) -> NDArray[np.bool_] | None:
        """Return which texts stand out, of an audit with the original model: (n,), memorized ones that are recited too.

        Where the model would recite more than one in twenty non-members in a text's form, it can guess such text, which
        shows nothing.
        """
        if self.left is None:
            return None
        standing = self.left.standing_out | self.newly_known
        if not self.recited.any():
            return standing
        forced = self.now.statistics["non_members"]
        hits = forced.each(forced.rank == 0)
        tokens = self.texts.tokens["non_members"]
        guessed = np.array([is_guessed(t, hit) for t, hit in zip(tokens, hits, strict=True)])
        few = np.zeros(len(self.recited), dtype=bool)
        for form in np.unique(self.forms[0]):
            own = self.forms[1] == form
            few[self.forms[0] == form] = 20 * (1 + guessed[own].sum()) <= own.sum() + 1
        return standing | (self.recited & few & self.memorized)

    def _left(self) -> Left:
        """Find what stands out among the non-members under the audited model."""
        shares = [
            expected.greedy_match - self.now.statistics[role].greedy_match
            for role, expected in (("forget", self.non_members.forget), ("non_members", self.non_members.own))
        ]
        return left_by_form(
            Scores(self.scores_before, self.non_member_scores),
            Scores(self.scores, self.present),
            Scores(*shares),
            self.forms,
            self.memorized,
            names=self.texts.forms,
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
                    form=self.texts.forms[i],
                    memorized=bool(self.memorized[i]),
                )
            )
        return examples

    def _measures(self, responses: Responses) -> list[Measures]:
        """Compute the metrics of each text under one model."""
        forced = responses.statistics["forget"]
        matches = forced.each(forced.rank == 0)
        non_member_scores = -responses.statistics["non_members"].mean_log_likelihood - self.non_members.own.nll
        excess = -forced.mean_log_likelihood - self.non_members.forget.nll
        exposures = generalized_exposure(excess, non_member_scores, groups=self.forms).lower
        prior = self._prior(responses)
        gains = iter([] if prior is None else prior.gain.tolist())
        scores = {} if self.membership is None else self.membership.scores(responses)
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

    def _prior(self, responses: Responses, indices: Sequence[int] | None = None) -> metrics.AnswerPrior | None:
        """Compare the likelihood of prompted texts, those at `indices` or all, with that without their prompts."""
        prompted = np.flatnonzero([e.prompted for e in self.texts.forget])
        chosen = np.ones(len(prompted), dtype=bool) if indices is None else np.isin(prompted, indices)
        without = responses.statistics.get("without_prompt")
        if without is None or not chosen.any():
            return None
        with_prompt = responses.statistics["forget"].mean_log_likelihood[prompted[chosen]]
        return metrics.answer_prior(with_prompt, without.mean_log_likelihood[chosen])

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
        drift, own = None, self.non_members.as_they_are
        if self.before is not None:
            after = -self.now.statistics["non_members"].mean_log_likelihood
            drift = non_member_drift(self.non_member_nll[own], after[own])
        scores = self.non_member_scores[own].tolist()
        return NonMembers(self.non_members.grade, self.before is not None, scores, drift)

    def _notes(self, judged: metrics.Verdict) -> list[str]:
        """Say what the verdicts rest on, and what the evidence cannot show."""
        rate, others = self.false_discovery_rate, self.forms[0] > 0
        notes = evidence_notes(self.non_members, judged.verdict[~others & ~self.newly_known].tolist(), rate=rate)
        if others.any() and not self.memorized[others].any():
            fewest = int(np.bincount(self.forms[1])[1:].min())
            notes += power_notes(fewest, int(others.sum()), rate=rate, noun="other forms")
        exposed = np.flatnonzero(self.newly_known & (judged.verdict == _EXPOSED)).tolist()
        if count := len({self.texts.parts[i].record for i in exposed}):
            which = f"{count} texts stand out" if count > 1 else "One text stands out"
            notes.append(
                f"{which}, and not under the original model: check that it is this model before unlearning, and that "
                "nothing was trained on the texts since."
            )
        return notes

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
        written = {} if responses is None else responses.continuations
        if not (continuations := [written[i] for i in self.as_they_are if i in written]):
            return None
        distinct, repeated = (
            metrics.mean_interval([of(ids) for ids in continuations], bounds=(0, 1), seed=self.seed)
            for of in (partial(metrics.distinct_n, n=2), metrics.repetition)
        )
        n, count = len(continuations), sum(map(metrics.collapsed, continuations))
        low, high = clopper_pearson(count, n, 0.95)
        return Writing(distinct, repeated, Interval(count / n, float(low), float(high)))
