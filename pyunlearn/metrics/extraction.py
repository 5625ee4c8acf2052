"""Extraction: how much of a text a model writes or samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError, missing_packages
from pyunlearn.metrics._check import (
    Floats,
    as_floats,
    lists_of_texts,
    log_likelihoods,
    one_of,
    same_length,
    tokens_of_text,
)


def extraction_probability(log_likelihood: ArrayLike, queries: ArrayLike) -> Floats:
    """Compute the probability that at least one of n samples is the text.

        1 - (1 - p_s)^n,    p_s = exp(sum over t of ln p_t)

    A text is (n, p)-discoverable if this is p or more. Computed in logarithms, so that it is accurate for p_s near 0
    (where 1 - p_s rounds to 1) and near 1.

    Args:
        log_likelihood: (...) the *sum* over the text's tokens under the sampling scheme (temperature, top-k), nats. A
            mean, or the plain model's likelihood under another scheme, answers another question.
        queries: (...) n, 1 or more; broadcast.

    Returns:
        (...), 0 to 1. High = extractable.

    Raises:
        ArgumentError: log-likelihoods above 0 or NaN, fewer than 1 query.

    Example:
        >>> extraction_probability([-2.0, -20.0], 10).round(4).tolist()
        [0.7664, 0.0]

    Source: Hayes et al. 2024, arXiv 2410.19482, definition of (n, p)-discoverable extraction.
    """
    n = as_floats("queries", queries)
    if not (n >= 1).all():
        raise ArgumentError("queries must be 1 or more, got fewer or NaN")
    with np.errstate(over="ignore"):
        return np.asarray(-np.expm1(-np.exp(np.log(n) + _log_hazard(log_likelihood))))


def _log_hazard(log_likelihood: ArrayLike) -> Floats:
    """Compute ln(-ln(1 - e^x)) for x <= 0, to full precision."""
    x = log_likelihoods("log_likelihood", log_likelihood)
    with np.errstate(divide="ignore"):
        near_one = -np.log(-np.expm1(np.maximum(x, -1.0)))  # e^x near 1: 1 - e^x is -expm1(x)
        near_zero = -np.log1p(-np.exp(np.minimum(x, -1.0)))
        # below e^-37, -ln(1 - p) = p to the last digit, and p itself may underflow
        return np.where(x < -37, x, np.log(np.where(x > -1.0, near_one, near_zero)))


class VerbatimMatch(NamedTuple):
    """Matching tokens, 0 or more; high = memorized. 50 in a row usually count as extracted (arXiv 2012.07805)."""

    longest: int
    """Length of the longest run of tokens that occurs in both texts."""
    prefix: int
    """Length of the common prefix."""


def verbatim_match(written: Sequence[Hashable], truth: Sequence[Hashable]) -> VerbatimMatch:
    """Count the tokens in a row that a model wrote of a text: the longest common run and the common prefix.

    A run is contiguous in both texts, unlike the subsequence of ROUGE-L, which any two texts of a language share in
    part.

    Args:
        written: tokens (ids, words, characters) that the model wrote, any number; ids also as an array or a tensor.
        truth: tokens of the text.

    Returns:
        VerbatimMatch(longest, prefix), from 0 to the shorter length.

    Raises:
        ArgumentError: the tokens of several texts.

    Example:
        >>> verbatim_match("the code is 4712".split(), "my code is 4711".split())
        VerbatimMatch(longest=2, prefix=0)

    See Also:
        rouge_l: the longest common subsequence of words.

    Source: Carlini et al. 2021, arXiv 2012.07805.
    """
    written, truth = tokens_of_text("written", written), tokens_of_text("truth", truth)
    occurrences: dict[Hashable, list[int]] = {}
    for j, token in enumerate(truth):
        occurrences.setdefault(token, []).append(j)
    longest, ending = 0, Counter[int]()  # ending[j]: length of the run that ends at this token and at truth[j]
    for token in written:
        ending = Counter({j: ending[j - 1] + 1 for j in occurrences.get(token, ())})
        longest = max(longest, *ending.values()) if ending else longest
    pairs = zip(written, truth, strict=False)
    prefix = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(written), len(truth)))
    return VerbatimMatch(longest, prefix)


def rouge_l(written: Sequence[str], truth: Sequence[str], *, measure: str = "f1", stemmer: bool = False) -> Floats:
    """Compute ROUGE-L of each text that a model wrote against the true one, by rouge-score.

    With L the longest common subsequence of words: recall = L / words of the truth, precision = L / words written, F1
    their harmonic mean. MUSE takes f1 without a stemmer (arXiv 2407.06460), TOFU recall with one (arXiv 2401.06121):
    numbers of the two do not compare.

    Args:
        written: B texts that the model wrote.
        truth: B true texts. rouge-score itself takes the truth first (swapped, recall is precision).
        measure: "f1" or "recall".
        stemmer: compare words by their Porter stems.

    Returns:
        (B,), 0 to 1. High = memorized.

    Raises:
        ArgumentError: an unknown measure, numbers of texts that differ, or a truth without a Latin letter or digit:
            rouge-score drops every other character, so the score would always be 0.
        DependencyError: rouge-score is not installed.

    Example:
        >>> rouge_l(["the code is 4712"], ["my code is 4711"], measure="recall").tolist()
        [0.5]

    See Also:
        verbatim_match: contiguous runs of tokens of any script.

    Source: Lin 2004; package rouge-score.
    """
    one_of("measure", measure, ("f1", "recall"))
    lists_of_texts(written=written, truth=truth)
    same_length("written", written, "truth", truth)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_packages("rouge_l", "rouge-score") from error
    for i, text in enumerate(truth):
        if not any(c.isascii() and c.isalnum() for c in text):
            raise ArgumentError(
                f"truth {i} has no Latin letter or digit, and rouge-score ignores all others: compare tokens, with "
                "verbatim_match"
            )
    scorer = RougeScorer(["rougeL"], use_stemmer=stemmer)
    rouge = [scorer.score(true, wrote)["rougeL"] for wrote, true in zip(written, truth, strict=True)]
    return np.array([f.recall if measure == "recall" else f.fmeasure for f in rouge], dtype=np.float64)
