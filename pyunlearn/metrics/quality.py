"""Quality in the form of TOFU: truth ratio, forget quality, model utility; and the prior of an answer.

Log-likelihoods of whole answers are length-normalised: the mean per scored token, in nats, so that exp of it is
P(answer) ^ (1 / length). Source: Maini et al. 2024, arXiv 2401.06121.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, as_floats, numbers, one_of, same_length
from pyunlearn.metrics.confidence import Interval, aggregate_interval, mean_interval

UTILITY_PARTS = tuple(
    f"{split}_{metric}"
    for split in ("retain", "real_authors", "world_facts")
    for metric in ("probability", "rouge", "truth_ratio")
)
"""Names of the nine numbers that model_utility takes."""


class TruthRatio(NamedTuple):
    """Truth ratios of n texts: the result of truth_ratio."""

    ratio: Floats
    """(n,) R, wrong over correct, 0 and up; below 1 = the correct answer is preferred."""
    value: Floats
    """(n,) the chosen aggregate of each, 0 to 1."""
    mean: Interval
    """Mean of the values, with the interval of mean_interval between 0 and 1, which covers for 3 texts and more."""


class _Pair(NamedTuple):
    """Base of ForgetQuality: the two fields of `statistic, pvalue = forget_quality(...)`."""

    statistic: float
    """Kolmogorov-Smirnov distance, 0 to 1; low = like the retrained model."""
    pvalue: float
    """High = no difference from the retrained model seen."""


class ForgetQuality(_Pair):
    """Result of forget_quality: a pair, `statistic, pvalue = forget_quality(...)`, with two more attributes."""

    log10_floor: float
    """log10 of the smallest p-value possible for samples of these sizes."""
    saturated: bool
    """True where the samples do not overlap: the p-value is at its floor, and does not measure their distance."""

    def __new__(cls, statistic: float, pvalue: float, log10_floor: float, saturated: bool) -> ForgetQuality:
        pair = super().__new__(cls, statistic, pvalue)
        pair.log10_floor, pair.saturated = log10_floor, saturated
        return pair

    def __getnewargs__(self) -> tuple[float, float, float, bool]:  # type: ignore[override]
        return (*self, self.log10_floor, self.saturated)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, log10_floor={self.log10_floor!r}, saturated={self.saturated!r})"


class AnswerPrior(NamedTuple):
    """Value of the prompt for n answers: the result of answer_prior."""

    gain: Floats
    """(n,) nats per token that the prompt adds."""
    explained: Floats
    """(n,) share of the answer's likelihood that does not need the prompt: exp(-max(gain, 0)), 0 to 1."""
    mean: Interval
    """Mean gain, with Student's t interval."""


def truth_ratio(
    correct_log_likelihood: ArrayLike,
    wrong_log_likelihoods: ArrayLike,
    aggregate: str = "closer_to_1_better",
    *,
    mean: str = "geometric",
    seed: int = 0,
) -> TruthRatio:
    """Compute how likely wrong answers are compared with the correct one.

        R = mean over wrong answers of P(wrong) ^ (1 / length)  /  P(correct) ^ (1 / length)

        "closer_to_1_better"  min(R, 1/R)     1 = correct and wrong are alike, as after forgetting; for the forget set.
                                              Two-sided: R far above 1 is low too
        "true_better"         max(0, 1 - R)   1 = the correct answer is certain; for text that must survive
        "prob_mean"           1 / (1 + R)     P(correct) / (P(correct) + mean P(wrong)): 1 = certain, 1/2 = alike

    Trap: two means are in use. TOFU's forget quality, the truth ratios of its leaderboard script and open-unlearning
    take the geometric one, exp of the mean log-likelihood; the formula of TOFU's paper and another script of it take
    the arithmetic mean of the probabilities, which is never smaller. Their numbers do not compare.

    Args:
        correct_log_likelihood: (n,) mean per token of the correct answer (in TOFU a paraphrase of it), nats.
        wrong_log_likelihoods: (n, P) mean per token of P wrong answers in the same form, nats; (P,) with one number.
        aggregate: "closer_to_1_better", "true_better" or "prob_mean".
        mean: "geometric" or "arithmetic", over the wrong answers.
        seed: seed of the interval.

    Returns:
        TruthRatio(ratio, value, mean).

    Raises:
        ArgumentError: shapes that do not match, no text, NaN, Inf or a number above 0, an unknown choice.

    Example:
        >>> truth_ratio(np.log([0.4, 0.1]), np.log([[0.1], [0.4]])).ratio.round(6).tolist()
        [0.25, 4.0]

    See Also:
        forget_quality: compares `ratio` with a retrained model's.

    Source: arXiv 2401.06121, section 2.2.1; "prob_mean": open-unlearning.
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
        return TruthRatio(np.exp(log_ratio), value, mean_interval(value, bounds=(0, 1), seed=seed))


def forget_quality(truth_ratios_unlearned: ArrayLike, truth_ratios_retrained: ArrayLike) -> ForgetQuality:
    """Test if the truth ratios of the forget set could be those of a retrained model: two-sample Kolmogorov-Smirnov.

    The p-value is TOFU's "forget quality", often shown as its log10. It measures sample size as much as distance: with
    many texts the least difference is significant, with few the p-value cannot fall below its floor, 2 / C(n + m, n).
    Read the statistic as well. Any monotone form of the ratio has the same numbers, so code that uses 1 / R agrees.

    Args:
        truth_ratios_unlearned: (n,) `ratio` of truth_ratio.
        truth_ratios_retrained: (m,) of the same texts under a model that never saw them.

    Returns:
        ForgetQuality: the pair (statistic, pvalue), 0 to 1, with attributes `log10_floor` and `saturated`.

    Raises:
        ArgumentError: no numbers, NaN or Inf.

    Example:
        >>> statistic, pvalue = forget_quality([0.1, 0.2, 0.3], [0.8, 0.9, 1.0])
        >>> statistic, round(pvalue, 3)
        (1.0, 0.1)

    See Also:
        truth_ratio: the ratios. exposure_two_sample_test: the same for exposures, paired.

    Source: arXiv 2401.06121, section 2.2.2.
    """
    u = numbers("truth_ratios_unlearned", truth_ratios_unlearned, empty=False)
    r = numbers("truth_ratios_retrained", truth_ratios_retrained, empty=False)
    test = stats.ks_2samp(u, r)
    ways = special.gammaln(u.size + r.size + 1) - special.gammaln(u.size + 1) - special.gammaln(r.size + 1)
    floor = min(0.0, float((np.log(2) - ways) / np.log(10)))
    return ForgetQuality(float(test.statistic), float(test.pvalue), floor, bool(test.statistic > 1 - 1e-12))


def model_utility(parts: Mapping[str, float]) -> float:
    """Compute TOFU's model utility: the harmonic mean of nine numbers.

    Probability, ROUGE-L recall and truth ratio ("true_better"), each on the retain set, on real authors and on world
    facts. One part that is 0 makes it 0. On the retain set, probability is exp(log-likelihood); on the other two it is
    `option_probability`.

    Args:
        parts: name in UTILITY_PARTS -> number: retain_probability, retain_rouge, retain_truth_ratio,
            real_authors_probability, ... world_facts_truth_ratio.

    Returns:
        0 to 1. High = useful.

    Raises:
        ArgumentError: a part that is missing or unknown, or outside 0 to 1.

    Example:
        >>> round(model_utility(dict.fromkeys(UTILITY_PARTS, 0.5) | {"retain_rouge": 0.25}), 3)
        0.45

    See Also:
        model_utility_interval: from the values of single texts, with an interval.

    Source: arXiv 2401.06121, section 2.2.1.
    """
    _check_names(parts)
    x = as_floats("parts", [parts[name] for name in UTILITY_PARTS])
    for name, value in zip(UTILITY_PARTS, x, strict=True):
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name} must lie from 0 to 1, got {value!r}")
    return 0.0 if (x == 0).any() else float(stats.hmean(x))


def model_utility_interval(
    parts: Mapping[str, ArrayLike], *, confidence: float = 0.95, seed: int = 0, draws: int = 1000
) -> Interval:
    """Compute model_utility of the means of nine lists, with a percentile bootstrap interval.

    The three splits are resampled independently, a text of a split with its probability, ROUGE and truth ratio
    together, because a text that is known well is so by all three. TOFU states the number without an interval.

    Args:
        parts: name in UTILITY_PARTS -> (n,) one value per text, 0 to 1: the three of a split of the same texts in the
            same order.
        confidence: between 0 and 1.
        seed: the same seed returns the same interval.
        draws: number of resamples.

    Returns:
        Interval(estimate, low, high), 0 to 1. High = useful. NaN ends where a split has fewer than 6
        texts.

    Raises:
        ArgumentError: a part that is missing or unknown, empty, of another length than the others of its split, or
            whose mean lies outside 0 to 1.

    Example:
        >>> parts = {name: [0.3, 0.4, 0.5, 0.5, 0.6, 0.7] for name in UTILITY_PARTS}
        >>> estimate, low, high = model_utility_interval(parts, draws=200)
        >>> round(estimate, 3), low < estimate < high
        (0.5, True)

    See Also:
        aggregate_interval: the interval used here.

    Source: arXiv 2401.06121, section 2.2.1; the interval: Efron and Tibshirani 1993, chapter 13.
    """
    _check_names(parts)
    columns = [numbers(name, parts[name], empty=False) for name in UTILITY_PARTS]
    for i, column in enumerate(columns):
        same_length(UTILITY_PARTS[first := i - i % 3], columns[first], UTILITY_PARTS[i], column)

    def utility(*columns: Floats) -> float:
        return model_utility({name: float(x.mean()) for name, x in zip(UTILITY_PARTS, columns, strict=True)})

    sets = [i // 3 for i in range(len(columns))]
    return aggregate_interval(utility, *columns, sets=sets, confidence=confidence, seed=seed, draws=draws)


def option_probability(correct_log_likelihood: ArrayLike, wrong_log_likelihoods: ArrayLike) -> Floats:
    """Compute P(correct) / (P(correct) + sum over wrong answers of P(wrong)), each P length-normalised.

    TOFU's probability on real authors and world facts: a multiple choice. Computed in logarithms, so that answers which
    are all improbable are not 0 / 0.

    Args:
        correct_log_likelihood: (n,) mean per token, nats.
        wrong_log_likelihoods: (n, P) mean per token, nats.

    Returns:
        (n,), 0 to 1. High = known; 1 / (P + 1) by chance.

    Raises:
        ArgumentError: as truth_ratio.

    Example:
        >>> option_probability(np.log([0.3]), np.log([[0.1, 0.1, 0.1]])).round(6).tolist()
        [0.5]

    See Also:
        model_utility: takes its mean.

    Source: arXiv 2401.06121, section 2.2.1.
    """
    correct, wrong = _answers(correct_log_likelihood, wrong_log_likelihoods)
    return special.softmax(np.column_stack([correct, wrong]), axis=1)[:, 0]


def answer_prior(log_likelihood: ArrayLike, log_likelihood_without_prompt: ArrayLike) -> AnswerPrior:
    """Compute how much the prompt raises each answer's log-likelihood: guessable answers against remembered ones.

        gain = log_likelihood - log_likelihood_without_prompt        nats per token, any sign

    both of the same answer tokens, after the true prompt and after none. A gain of about 0 with a high likelihood: the
    answer is guessable from its own form, and its likelihood is no evidence of memory. High: it depends on this prompt.
    Compare with the gain of answers that were never trained on, because a prompt also tells the kind of answer.

    Args:
        log_likelihood: (n,) mean per token with the prompt, nats.
        log_likelihood_without_prompt: (n,) mean per token of the same answers after an empty prompt.

    Returns:
        AnswerPrior(gain, explained, mean).

    Raises:
        ArgumentError: different lengths, no text, NaN or Inf.

    Example:
        >>> answer_prior([-0.5, -0.5], [-0.5, -3.5]).gain.tolist()
        [0.0, 3.0]

    Source: ours, after the prior-bias baselines of visual question answering, arXiv 2202.12690.
    """
    x = numbers("log_likelihood", log_likelihood, empty=False)
    without = numbers("log_likelihood_without_prompt", log_likelihood_without_prompt, empty=False)
    same_length("log_likelihood", x, "log_likelihood_without_prompt", without)
    gain = x - without
    return AnswerPrior(gain, np.exp(-np.maximum(gain, 0)), mean_interval(gain))


def _check_names(parts: Mapping[str, object]) -> None:
    """Raise ArgumentError unless the names are exactly UTILITY_PARTS."""
    wrong = [f"without {name}" for name in UTILITY_PARTS if name not in parts]
    wrong += [f"with {name}" for name in parts if name not in UTILITY_PARTS]
    if wrong:
        raise ArgumentError(f"model_utility takes exactly {', '.join(UTILITY_PARTS)}, got parts {', '.join(wrong)}")


def _answers(correct_log_likelihood: ArrayLike, wrong_log_likelihoods: ArrayLike) -> tuple[Floats, Floats]:
    """Check answers and return them as (n,) and (n, P)."""
    correct = numbers("correct_log_likelihood", correct_log_likelihood, empty=False)
    wrong = as_floats("wrong_log_likelihoods", wrong_log_likelihoods)
    if np.ndim(correct_log_likelihood) == 0 and wrong.ndim == 1:
        wrong = wrong[None]
    if wrong.ndim != 2 or len(wrong) != len(correct) or wrong.shape[1] == 0:
        raise ArgumentError(
            f"wrong_log_likelihoods must have shape ({len(correct)}, wrong answers), a row for each correct one, got "
            f"{wrong.shape}"
        )
    if not np.isfinite(wrong).all():
        raise ArgumentError("wrong_log_likelihoods must be finite, got NaN or Inf")
    if (highest := max(correct.max(), wrong.max())) > 0:
        raise ArgumentError(
            f"log-likelihoods must be 0 or less, got {highest}: pass the mean log-likelihood per token, not the loss"
        )
    return correct, wrong
