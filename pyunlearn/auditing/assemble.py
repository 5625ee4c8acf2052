"""From the models' answers to the verdicts: every metric of an audit, on numbers alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn import metrics
from pyunlearn.auditing.responses import LONGEST, Asked
from pyunlearn.auditing.result import Audit, AuditedExample, Kept, Measures, Membership, References, Writing
from pyunlearn.data import Tokens
from pyunlearn.data.examples import Example
from pyunlearn.metrics import (
    Interval,
    auc,
    exposure_null_test,
    generalized_exposure,
    paired_difference,
    reference_drift,
    verdict,
)
from pyunlearn.metrics._binomial import clopper_pearson

Floats = NDArray[np.float64]
_K = 0.4  # the share of tokens of min-k, as in MUSE and TOFU
_ROUGE = importlib.util.find_spec("rouge_score") is not None


class Evidence:
    """The answers of the model now, of the original before (None: not given) and of a retrained model, put together into an Audit."""

    def __init__(
        self, examples: Sequence[Example], tokens: Sequence[Tokens], references: Sequence[Tokens], openings: Sequence[Tokens],
        tokenizer: Any, now: Asked, before: Asked | None, retrained: Asked | None, *, holdout: Sequence[Example], until: float, metrics: tuple[str, ...],
        seed: int,
    ) -> None:  # fmt: skip
        self.examples, self.tokens, self.openings, self.tokenizer = examples, tokens, openings, tokenizer
        self.now, self.before, self.retrained = now, before, retrained
        self.holdout, self.until, self.metrics, self.seed = holdout, until, metrics, seed
        anchor = before or now
        self.reference_scores = -anchor.forced["references"].mean_log_likelihood
        self._attacked = bool(holdout) and "membership" in metrics
        self.scores = -now.forced["forget"].mean_log_likelihood
        self.scores_before = -anchor.forced["forget"].mean_log_likelihood

    def audit(self) -> Audit:
        """Everything."""
        found = verdict(self.scores_before, self.scores, self.reference_scores, until=self.until)
        now, before = self._measures(self.now), None if self.before is None else self._measures(self.before)
        audited = []
        for i, e in enumerate(self.examples):
            opening, truth = self._shown(i)
            audited.append(AuditedExample(
                i, e.prompt, e.completion, opening, truth, len(self.tokens[i].scored), str(found.verdict[i]), float(found.after.lower[i]),
                (float(found.low[i]), float(found.high[i])), bool(found.certain[i]), float(found.after.upper[i]),
                None if before is None else float(found.before.lower[i]), now[i], None if before is None else before[i],
            ))  # fmt: skip
        null = exposure_null_test(found.after.lower, len(self.reference_scores), seed=self.seed)
        change = None
        if self.before is not None:
            change = paired_difference(-self.scores_before, -self.scores, seed=self.seed)
        prior = self._prior(self.now)
        return Audit(
            examples=audited, non_members=self._references(), null_test=null, membership=self._membership(), change=change,
            answer_prior=None if prior is None else prior.mean, utility=self._kept(), writing=self._writing(self.now),
            writing_before=self._writing(self.before), passes={}, seconds=0.0, settings={},
        )  # fmt: skip

    # -- each text

    def _measures(self, asked: Asked) -> list[Measures]:
        """What one model shows of each text."""
        forced = asked.forced["forget"]
        matches = forced.each(forced.rank == 0)
        exposures = generalized_exposure(
            -forced.mean_log_likelihood, -asked.forced["references"].mean_log_likelihood
        ).lower
        prior = self._prior(asked)
        gains = iter([] if prior is None else prior.gain.tolist())
        members = self._scores(asked, "forget") if self._attacked else {}
        written = self._written(asked)
        return [
            Measures(
                float(forced.mean_log_likelihood[i]), float(exposures[i]), metrics.exact_memorization(matches[i]),
                metrics.extraction_strength(matches[i]),
                {name: float(values[i]) for name, values in members.items()}, next(gains) if e.prompt and prior is not None else None, *written[i],
            )
            for i, e in enumerate(self.examples)
        ]  # fmt: skip

    def _prior(self, asked: Asked) -> metrics.AnswerPrior | None:
        """What the prompts are worth, of the texts that have one."""
        prompted = np.array([bool(e.prompt) for e in self.examples])
        without = asked.forced.get("without prompt")
        if without is None or not prompted.any():
            return None
        with_it = asked.forced["forget"].mean_log_likelihood[prompted]
        return metrics.answer_prior(with_it, without.mean_log_likelihood, seed=self.seed)

    def _written(self, asked: Asked) -> list[tuple[str | None, int | None, float | None]]:
        """(continuation, longest run of tokens shared with the text, ROUGE-L recall) of each text."""
        found: list[tuple[str | None, int | None, float | None]] = []
        for i, t in enumerate(self.openings):
            said = asked.continuations.get(i)
            if said is None:
                found.append((None, None, None))
                continue
            text, truth = self._text(said), self._shown(i)[1]
            run = metrics.verbatim_match(said, t.scored[:LONGEST]).longest
            latin = any(c.isascii() and c.isalnum() for c in truth)
            rouge = float(metrics.rouge_l([text], [truth], measure="recall")[0]) if latin and _ROUGE else None
            found.append((text, run, rouge))
        return found

    def _shown(self, i: int) -> tuple[str, str]:
        """(what the model was given, what follows there in truth, as far as a continuation goes)."""
        t, e = self.openings[i], self.examples[i]
        return e.prompt or self._text(t.written[: t.first]), self._text(t.scored[:LONGEST])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # -- the set

    def _references(self) -> References:
        drift = None
        if self.before is not None:
            after = -self.now.forced["references"].mean_log_likelihood
            drift = reference_drift(self.reference_scores, after, seed=self.seed)
        source = (
            "holdout"
            if self.holdout
            else "sampled from the model"
            if self.before is None
            else "sampled from the original model"
        )
        return References(source, self.before is not None, self.reference_scores.tolist(), drift)

    def _kept(self) -> Kept | None:
        """The retain set."""
        if "retain" not in self.now.forced:
            return None
        nll = -self.now.forced["retain"].mean_log_likelihood
        interval = metrics.bootstrap_interval(nll, seed=self.seed)
        if self.before is None:
            return Kept(len(nll), interval, None, None)
        first = -self.before.forced["retain"].mean_log_likelihood
        before = metrics.bootstrap_interval(first, seed=self.seed)
        return Kept(len(nll), interval, before, paired_difference(first, nll, seed=self.seed))

    def _writing(self, asked: Asked | None) -> Writing | None:
        """Whether what a model writes has collapsed."""
        if asked is None or not asked.continuations:
            return None
        said = list(asked.continuations.values())
        distinct, repeated = (
            metrics.bootstrap_interval([of(s) for s in said], seed=self.seed)
            for of in (partial(metrics.distinct_n, n=2), metrics.repetition)
        )
        count = sum(map(metrics.collapsed, said))
        low, high = clopper_pearson(count, len(said), 0.95)
        return Writing(distinct, repeated, Interval(count / len(said), float(low), float(high)))

    # -- membership

    def _membership(self) -> list[Membership]:
        """Every attack on the forget set, with the holdout as text that was never trained on."""
        if not self._attacked:
            return []
        found = []
        before = {} if self.before is None else self._both_sides(self.before)
        retrained = {} if self.retrained is None else self._both_sides(self.retrained)
        for name, (forget, holdout) in self._both_sides(self.now).items():
            area = auc(forget, holdout)
            leak = None
            if name in retrained:
                leak = metrics.privleak_interval(forget, holdout, *retrained[name], seed=self.seed)
            found.append(Membership(
                name, area, metrics.tpr_at_fpr(forget, holdout, 0.01), metrics.tpr_at_fpr(forget, holdout, 0.001), roc_curve(forget, holdout),
                auc(*before[name]) if name in before else None, leak,
            ))  # fmt: skip
        return found

    def _both_sides(self, asked: Asked) -> dict[str, tuple[Floats, Floats]]:
        """The scores of the forget set and of the holdout by name."""
        sides = [self._scores(asked, role) for role in ("forget", "references")]
        return {name: (sides[0][name], sides[1][name]) for name in sides[0]}

    def _scores(self, asked: Asked, role: str) -> dict[str, Floats]:
        """Membership scores of the texts of one role, by name; low = like a member."""
        forced = asked.forced[role]
        log_likelihood, entropy, variance = (
            forced.each(x) for x in (forced.log_likelihood, forced.entropy, forced.variance)
        )
        texts = [e.completion for e in (self.examples if role == "forget" else self.holdout)]
        found = {
            "loss": metrics.loss_score(forced.mean_log_likelihood), "zlib": metrics.zlib_score(forced.mean_log_likelihood, texts),
            "min_k": metrics.min_k(log_likelihood, k=_K), "min_k_plus_plus": metrics.min_k_plus_plus(log_likelihood, entropy, variance, k=_K),
        }  # fmt: skip
        if self.retrained is not None and asked is not self.retrained:
            base = self.retrained.forced[role].mean_log_likelihood
            found["reference"] = metrics.reference_score(forced.mean_log_likelihood, base)
        return found


def roc_curve(forget: Floats, holdout: Floats) -> list[tuple[float, float]]:
    """(false, true) positive rates of every threshold on the scores, low scores being members; from (0, 0) to (1, 1)."""
    thresholds = np.unique(np.concatenate([forget, holdout]))
    rates = [np.searchsorted(np.sort(side), thresholds, side="right") / len(side) for side in (holdout, forget)]
    return [(0.0, 0.0), *zip(*(rate.tolist() for rate in rates), strict=True)]
