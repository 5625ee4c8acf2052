"""Quality in the form of TOFU (Maini et al. 2024, arXiv 2401.06121): truth ratio, forget quality, model utility, and what an answer's prior explains.

Log-likelihoods of whole answers are length-normalised: the mean per scored token, in nats, so that exp of it is P(answer) ^ (1 / length).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, numbers, one_of, same_length
from pyunlearn.metrics.confidence import Interval, aggregate_interval, bootstrap_interval

UTILITY_PARTS = tuple(
    f"{split}_{metric}"
    for split in ("retain", "real_authors", "world_facts")
    for metric in ("probability", "rouge", "truth_ratio")
)
"""The nine numbers that model_utility takes."""


class TruthRatio(NamedTuple):
    """See truth_ratio."""

    ratio: Floats
    """(n,) wrong against correct, 0 and up; below 1 = the correct answer is preferred."""
    value: Floats
    """(n,) what the aggregate makes of each, 0 to 1."""
    mean: Interval
    """Mean of the values, with a bootstrap interval."""


class _Pair(NamedTuple):
    statistic: float
    """Kolmogorov-Smirnov distance, 0 to 1; low = like the retrained model."""
    pvalue: float
    """High = cannot be told from the retrained model."""


class ForgetQuality(_Pair):
    """See forget_quality. A pair, `statistic, pvalue = forget_quality(...)`, with two attributes more."""

    log10_floor: float
    """log10 of the least p-value that samples of these sizes can give."""
    saturated: bool
    """The samples do not overlap: the p-value stands at its floor and says nothing about how far apart they are."""

    def __new__(cls, statistic: float, pvalue: float, log10_floor: float, saturated: bool) -> ForgetQuality:
        found = super().__new__(cls, statistic, pvalue)
        found.log10_floor, found.saturated = log10_floor, saturated
        return found

    def __getnewargs__(self) -> tuple[float, float, float, bool]:  # type: ignore[override]
        return (*self, self.log10_floor, self.saturated)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, log10_floor={self.log10_floor!r}, saturated={self.saturated!r})"


class AnswerPrior(NamedTuple):
    """See answer_prior."""

    gain: Floats
    """(n,) nats a token that the prompt is worth."""
    explained: Floats
    """(n,) share of the answer's likelihood that needs no prompt: exp(-max(gain, 0)), 0 to 1."""
    mean: Interval
    """Mean gain, with a bootstrap interval."""


def truth_ratio(
    correct_log_likelihood: ArrayLike,
    wrong_log_likelihoods: ArrayLike,
    aggregate: str = "closer_to_1_better",
    *,
    mean: str = "geometric",
    seed: int = 0,
) -> TruthRatio:
    """How a model ranks wrong answers against the correct one (arXiv 2401.06121, section 2.2.1).

        R = mean over wrong answers of P(wrong) ^ (1 / length)  /  P(correct) ^ (1 / length)

    "closer_to_1_better"  min(R, 1/R): 1 = correct and wrong are alike, as after forgetting; for the forget set. Two-sided: R far above 1 is low too
    "true_better"         max(0, 1 - R): 1 = the correct answer is certain; for text that must survive
    "prob_mean"           1 / (1 + R) = P(correct) / (P(correct) + mean P(wrong)): 1 = certain, 1/2 = alike; high = remembered

    Trap: which mean. TOFU's forget quality and open-unlearning take the geometric one, exp of the mean log-likelihood; TOFU's model utility
    takes the arithmetic mean of the probabilities, which is never smaller. Compare like with like.

    Args:
        correct_log_likelihood: (n,) mean per token of the correct answer (in TOFU a paraphrase of it), nats.
        wrong_log_likelihoods: (n, P) mean per token of P wrong answers in the same form, nats; (P,) beside one number.
        aggregate: "closer_to_1_better", "true_better" or "prob_mean".
        mean: "geometric" or "arithmetic", over the wrong answers.
        seed: of the interval.

    Returns:
        TruthRatio(ratio, value, mean).

    Raises:
        ArgumentError: shapes that do not fit, no text, a number that is not finite or is above 0, an unknown choice.
    """
    one_of("aggregate", aggregate, ("closer_to_1_better", "true_better", "prob_mean"))
    one_of("mean", mean, ("geometric", "arithmetic"))
    correct, wrong = _answers(correct_log_likelihood, wrong_log_likelihoods)
    wrong_mean = wrong.mean(1) if mean == "geometric" else special.logsumexp(wrong, axis=1) - np.log(wrong.shape[1])
    log_ratio = wrong_mean - correct
    value = {
        "closer_to_1_better": np.exp(-np.abs(log_ratio)),
        "true_better": -np.expm1(np.minimum(log_ratio, 0)),
        "prob_mean": special.expit(-log_ratio),
    }[aggregate]
    with np.errstate(over="ignore"):
        return TruthRatio(np.exp(log_ratio), value, bootstrap_interval(value, seed=seed))


def forget_quality(truth_ratios_unlearned: ArrayLike, truth_ratios_retrained: ArrayLike) -> ForgetQuality:
    """Whether the truth ratios of the forget set could be those of a retrained model: two-sample Kolmogorov-Smirnov (arXiv 2401.06121, section 2.2.2).

    The p-value is TOFU's "forget quality", often shown as its log10. It measures sample size as much as distance: with many texts the least
    difference is significant, with few the p-value cannot fall below its floor, 2 / C(n + m, n). Read the statistic beside it. Any
    monotone form of the ratio gives the same numbers, so it does not matter that code for it uses 1 / R.

    Args:
        truth_ratios_unlearned: (n,) `ratio` of truth_ratio.
        truth_ratios_retrained: (m,) of the same texts under a model that never saw them.

    Returns:
        ForgetQuality: the pair (statistic, pvalue), with the attributes `log10_floor` and `saturated`.

    Raises:
        ArgumentError: no numbers, one that is not finite.
    """
    u = numbers("truth_ratios_unlearned", truth_ratios_unlearned, least=1)
    r = numbers("truth_ratios_retrained", truth_ratios_retrained, least=1)
    found = stats.ks_2samp(u, r)
    ways = special.gammaln(u.size + r.size + 1) - special.gammaln(u.size + 1) - special.gammaln(r.size + 1)
    floor = min(0.0, float((np.log(2) - ways) / np.log(10)))
    return ForgetQuality(float(found.statistic), float(found.pvalue), floor, bool(found.statistic > 1 - 1e-12))


def model_utility(parts: Mapping[str, float]) -> float:
    """The harmonic mean of nine numbers, 0 to 1, high = useful (arXiv 2401.06121, section 2.2.1): TOFU's model utility.

    Probability, ROUGE-L recall and truth ratio ("true_better"), each on the retain set, on real authors and on world facts. One part that is 0
    makes it 0. On the retain set probability is `exp(log-likelihood)`, on the other two option_probability. `model_utility_interval` takes the single texts' values.

    Args:
        parts: UTILITY_PARTS -> number: retain_probability, retain_rouge, retain_truth_ratio, real_authors_probability, ... world_facts_truth_ratio.

    Raises:
        ArgumentError: a part that is missing or unknown, or outside 0 to 1.
    """
    _check_names(parts)
    x = np.array([parts[name] for name in UTILITY_PARTS], dtype=np.float64)
    for name, value in zip(UTILITY_PARTS, x, strict=True):
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name} must lie from 0 to 1, got {value!r}")
    return 0.0 if (x == 0).any() else float(stats.hmean(x))


def model_utility_interval(
    parts: Mapping[str, ArrayLike], *, confidence: float = 0.95, seed: int = 0, draws: int = 1000
) -> Interval:
    """model_utility of the means of nine lists with a percentile bootstrap interval, 0 to 1, high = useful.

    The three splits are drawn again each on its own, a text of a split with its probability, ROUGE and truth ratio together, for a text that is
    known well is so by all three (Efron and Tibshirani 1993, chapter 13). TOFU gives the number without an interval.

    Args:
        parts: UTILITY_PARTS -> (n,) one value for each text, 0 to 1: the three of a split of the same texts in the same order.
        confidence: between 0 and 1.
        seed: the same seed gives the same interval.
        draws: resamples.

    Returns:
        Interval(estimate, low, high). NaN ends where a split is one text.

    Raises:
        ArgumentError: a part that is missing or unknown, empty, of another length than the others of its split, or whose mean lies outside 0 to 1.
    """
    _check_names(parts)
    columns = [numbers(name, parts[name], least=1) for name in UTILITY_PARTS]
    for i, column in enumerate(columns):
        same_length(UTILITY_PARTS[first := i - i % 3], columns[first], UTILITY_PARTS[i], column)

    def utility(*columns: Floats) -> float:
        return model_utility({name: float(x.mean()) for name, x in zip(UTILITY_PARTS, columns, strict=True)})

    sets = [i // 3 for i in range(len(columns))]
    return aggregate_interval(utility, *columns, sets=sets, confidence=confidence, seed=seed, draws=draws)


def option_probability(correct_log_likelihood: ArrayLike, wrong_log_likelihoods: ArrayLike) -> Floats:
    """P(correct) / (P(correct) + sum over wrong answers of P(wrong)), (n,), each P length-normalised; 0 to 1, high = known; 1 / (P + 1) by chance.

    TOFU's probability on real authors and world facts (arXiv 2401.06121, section 2.2.1): a multiple choice. Sums in logarithms, so that answers which
    are all improbable are not 0 / 0.

    Args:
        correct_log_likelihood: (n,) mean per token, nats.
        wrong_log_likelihoods: (n, P) mean per token, nats.

    Raises:
        ArgumentError: as truth_ratio.
    """
    correct, wrong = _answers(correct_log_likelihood, wrong_log_likelihoods)
    return special.softmax(np.column_stack([correct, wrong]), axis=1)[:, 0]


def answer_prior(log_likelihood: ArrayLike, log_likelihood_without_prompt: ArrayLike, *, seed: int = 0) -> AnswerPrior:
    """What the prompt is worth: guessable answers against remembered ones.

        gain = log_likelihood - log_likelihood_without_prompt        nats a token, any sign

    both of the same answer tokens, after the true prompt and after none. About 0 and a high likelihood: the answer is guessable from its own form,
    and its likelihood says nothing about memory. High: it hangs on this prompt. Compare with the gain of answers that were never trained on,
    for a prompt also tells what kind of answer is wanted. Ours, after the prior-bias baselines of visual question answering (arXiv 2202.12690).

    Args:
        log_likelihood: (n,) mean per token with the prompt, nats.
        log_likelihood_without_prompt: (n,) mean per token of the same answers after an empty prompt.
        seed: of the interval.

    Returns:
        AnswerPrior(gain, explained, mean).

    Raises:
        ArgumentError: different lengths, no text, a number that is not finite.
    """
    x = numbers("log_likelihood", log_likelihood, least=1)
    without = numbers("log_likelihood_without_prompt", log_likelihood_without_prompt, least=1)
    same_length("log_likelihood", x, "log_likelihood_without_prompt", without)
    gain = x - without
    return AnswerPrior(gain, np.exp(-np.maximum(gain, 0)), bootstrap_interval(gain, seed=seed))


def _check_names(parts: Mapping[str, object]) -> None:
    wrong = [f"without {name}" for name in UTILITY_PARTS if name not in parts]
    wrong += [f"with {name}" for name in parts if name not in UTILITY_PARTS]
    if wrong:
        raise ArgumentError(f"model_utility takes exactly {', '.join(UTILITY_PARTS)}, got parts {', '.join(wrong)}")


def _answers(correct_log_likelihood: ArrayLike, wrong_log_likelihoods: ArrayLike) -> tuple[Floats, Floats]:
    """(n,) and (n, P), checked."""
    correct = numbers("correct_log_likelihood", correct_log_likelihood, least=1)
    wrong = np.asarray(wrong_log_likelihoods, dtype=np.float64)
    if np.ndim(correct_log_likelihood) == 0 and wrong.ndim == 1:
        wrong = wrong[None]
    if wrong.ndim != 2 or len(wrong) != len(correct) or wrong.shape[1] == 0:
        raise ArgumentError(
            f"wrong_log_likelihoods must have shape ({len(correct)}, wrong answers), a row for each correct one, got {wrong.shape}"
        )
    if not np.isfinite(wrong).all():
        raise ArgumentError("wrong_log_likelihoods must be finite, got NaN or Inf")
    if (highest := max(correct.max(), wrong.max())) > 0:
        raise ArgumentError(
            f"log-likelihoods must be 0 or less, got {highest}: pass the mean log-likelihood per token, not the loss"
        )
    return correct, wrong
